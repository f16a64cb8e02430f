"""curves.png: what a run's metrics look like."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustfeat.files import new_file
from robustfeat.palette import SERIES
from robustfeat.training.loop.journal import read_metrics
from robustfeat.training.loop.run_folder import CURVES_NAME

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_curves"]


def draw_curves(run: Path, concepts: Sequence[str]) -> None:
    """Draws loss, accuracy and, where the method has one, the path of q, over the epochs.

    Args:
        run: the run's folder, with metrics.jsonl.
        concepts: the K names, in the order of q.
    """
    import matplotlib as mpl
    from cycler import cycler

    with mpl.rc_context({"axes.prop_cycle": cycler(color=SERIES)}):
        _draw(run, concepts)


def _draw(run: Path, concepts: Sequence[str]) -> None:
    from matplotlib.figure import Figure

    events = read_metrics(run)
    steps = [event for event in events if event["event"] == "train"]
    epochs = [event for event in events if event["event"] == "epoch"]
    probes = [event for event in events if event["event"] == "probe"]
    with_q = [event for event in steps if len(event.get("q", ())) == len(concepts)]
    figure = Figure(figsize=(13 if with_q else 9, 4), dpi=110, layout="constrained")
    loss, accuracy, *rest = figure.subplots(1, 3 if with_q else 2)
    for axes, key, title in ((loss, "loss", "loss"), (accuracy, "accuracy", "accuracy")):
        marker = "o-" if len(steps) < _FEW_POINTS else "-"
        axes.plot(
            [event["epoch"] for event in steps], [event.get(key, math.nan) for event in steps], marker, ms=2, lw=1,
            label="training images",
        )  # fmt: skip
        axes.plot(
            [e["epoch"] for e in epochs],
            [e.get(f"validation_{key}", math.nan) for e in epochs],
            "o-",
            ms=3,
            label="validation",
        )
        if probes and key == "accuracy":
            axes.plot([e["epoch"] for e in probes], [e["accuracy"] for e in probes], "o-", ms=3, label="probe")
        axes.set(xlabel="epoch", title=title)
        axes.grid(alpha=0.3)
        axes.legend()
    if with_q:
        (axes,) = rest
        lines = zip(*(event["q"] for event in with_q), strict=True)
        for number, (name, shares) in enumerate(zip(concepts, lines, strict=True)):
            if len(concepts) <= _LABELLED_CONCEPTS:
                marker, style = "o" if len(with_q) < _FEW_POINTS else "", _STYLES[number // len(SERIES) % len(_STYLES)]
                axes.plot([e["epoch"] for e in with_q], shares, ls=style, marker=marker, ms=2, label=name, lw=1)
            else:
                axes.plot([e["epoch"] for e in with_q], shares, lw=0.5)
        _shade_noise(axes, with_q)
        axes.set(xlabel="epoch", title="q, the weight of each concept's loss")
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        axes.grid(alpha=0.3)
        if len(concepts) <= _LABELLED_CONCEPTS:
            axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    with new_file(run / CURVES_NAME) as partial:
        figure.savefig(partial, format="png")


def _shade_noise(axes: Axes, events: Sequence[dict[str, Any]]) -> None:
    """Grey where sampling moves the weights more than the losses do."""
    label = "noise above signal"
    for before, event in pairwise([{"epoch": 0.0}, *events]):
        if event.get("weight_noise", 0.0) > event.get("weight_signal", 0.0):
            axes.axvspan(before["epoch"], event["epoch"], color="0.9", lw=0, zorder=0, label=label)
            label = "_"  # one line in the legend


_LABELLED_CONCEPTS = 30
_FEW_POINTS = 20  # a line through one or two is not seen
_STYLES = ("-", "--", ":", "-.", (0, (8, 2)))  # all colours, then another line
