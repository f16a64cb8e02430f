"""Line plots and forest plots as files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from robustfeat.palette import SERIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Curve", "Forest", "Panel", "draw"]


@dataclass(frozen=True)
class Curve:
    """A line of a figure, or only its `points` (x, y) if they are not `joined`."""

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


@dataclass(frozen=True)
class Forest:
    """Estimates below each other, with a line at 0.

    Attributes:
        title, x_label: texts.
        rows: label, estimate, and its interval if there is one.
    """

    title: str
    x_label: str
    rows: Sequence[tuple[str, float, tuple[float, float] | None]]


def draw(panels: Sequence[Panel | Forest], kind: str, name: str) -> bytes:
    """Draws panels side by side. The same panels give the same bytes.

    Args:
        panels: at least one.
        kind: png or svg.
        name: name of the figure. SVGs with different names can be on one page.
    """
    import matplotlib as mpl
    from cycler import cycler
    from matplotlib.figure import Figure

    # Identifiers within an SVG would be random, and clash with the next SVG on the page.
    with mpl.rc_context({"svg.hashsalt": name, "axes.prop_cycle": cycler(color=SERIES)}):
        figure = Figure(figsize=(5.5 * len(panels) + 1.5, 4), dpi=110, layout="constrained")
        drawn = figure.subplots(1, len(panels), squeeze=False)[0]
        for place, (axes, panel) in enumerate(zip(drawn, panels, strict=True)):
            axes.set(title=_plain(panel.title), xlabel=panel.x_label)
            axes.grid(alpha=0.3)
            if isinstance(panel, Forest):
                _draw_forest(axes, panel)
            else:
                _draw_curves(axes, panel, panels[place + 1 :])
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return _follow_page(buffer.getvalue()) if kind == "svg" else buffer.getvalue()


def _follow_page(svg: bytes) -> bytes:
    """Turns light into dark on dark pages, and keeps the hues."""
    style = b"<style>@media (prefers-color-scheme: dark) { svg { filter: invert(1) hue-rotate(180deg); } }</style>"
    start = svg.index(b">", svg.index(b"<svg")) + 1
    return svg[:start] + b"\n " + style + svg[start:]


def _draw_curves(axes: Axes, panel: Panel, later: Sequence[Panel | Forest]) -> None:
    for curve in panel.curves:
        style = "o" if not curve.joined else "o-" if len(curve.points) < 40 else "-"
        axes.plot(*zip(*curve.points, strict=True), style, ms=3, label=_plain(curve.label))
    axes.set_ylabel(panel.y_label)
    if all(float(x).is_integer() for curve in panel.curves for x, _ in curve.points):
        axes.locator_params("x", integer=True)
    if _labels(panel) not in map(_labels, later):  # otherwise a later panel has the same legend
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))  # beside the curves, of which it would hide some


def _labels(panel: Panel | Forest) -> list[str]:
    return [] if isinstance(panel, Forest) else [curve.label for curve in panel.curves]


def _draw_forest(axes: Axes, panel: Forest) -> None:
    places = range(len(panel.rows))
    axes.axvline(0, color="black", lw=0.8)
    for place, (_, _, interval) in zip(places, panel.rows, strict=True):
        if interval:
            axes.plot(interval, (place, place), "-", color="C0", lw=1.5)
    axes.plot([estimate for _, estimate, _ in panel.rows], list(places), "o", color="C0", ms=4)
    axes.set_yticks(list(places), [_plain(label) for label, _, _ in panel.rows])
    axes.set_ylim(len(panel.rows) - 0.5, -0.5)  # the first one on top


def _plain(text: str) -> str:
    """Escapes text for matplotlib, which reads text between dollars as formulas."""
    return text.replace("$", r"\$")
