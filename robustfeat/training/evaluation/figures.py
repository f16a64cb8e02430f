"""Line plots as files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Curve", "Panel", "draw"]


@dataclass(frozen=True)
class Curve:
    """A line of a figure, or its `points` (x, y) alone where they are not `joined`."""

    label: str
    points: Sequence[tuple[float, float]]
    joined: bool = True


@dataclass(frozen=True)
class Panel:
    """Curves on the same axes."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]


def draw(panels: Sequence[Panel], kind: str, name: str) -> bytes:
    """The panels beside each other; the same ones give the same bytes.

    Args:
        panels: at least one.
        kind: png or svg.
        name: of the figure; SVGs with different names go on one page.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # Identifiers within an SVG would be random, and clash with those of the next one on the page.
    with mpl.rc_context({"svg.hashsalt": name}):
        figure = Figure(figsize=(5.5 * len(panels) + 1.5, 4), dpi=110, layout="constrained")
        labels = [[curve.label for curve in panel.curves] for panel in panels]
        for place, axes in enumerate(figure.subplots(1, len(panels), squeeze=False)[0]):
            panel = panels[place]
            for curve in panel.curves:
                style = "o" if not curve.joined else "o-" if len(curve.points) < 40 else "-"
                axes.plot(*zip(*curve.points, strict=True), style, ms=3, label=_plain(curve.label))
            axes.set(title=_plain(panel.title), xlabel=panel.x_label, ylabel=panel.y_label)
            if all(float(x).is_integer() for curve in panel.curves for x, _ in curve.points):
                axes.locator_params("x", integer=True)
            axes.grid(alpha=0.3)
            if labels[place] not in labels[place + 1 :]:  # otherwise a later panel's legend tells the same
                axes.legend(loc="upper left", bbox_to_anchor=(1, 1))  # beside the curves, of which it would hide some
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def _plain(text: str) -> str:
    """For matplotlib, which takes what is between dollars for formulas."""
    return text.replace("$", r"\$")
