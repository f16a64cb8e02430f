"""Comparisons at scales with a margin of equivalence: the mean over targets by Dunnett, each target by Holm."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from robustfeat.training.comparison.statistics import Difference, dunnett, equivalence_mark, holm, pooled
from robustfeat.training.comparison.tables import p_value, percent_interval, spread
from robustfeat.training.evaluation.answers import unpack
from robustfeat.training.paper.exhibit import TITLES, Exhibit
from robustfeat.training.paper.gate import measure_gate
from robustfeat.training.paper.measures import Measures
from robustfeat.training.paper.scale import METHODS, TABLES

__all__ = ["Cell", "cell_columns", "compare_targets", "equivalence"]

_LEVEL = 0.05


@dataclass(frozen=True)
class Cell:
    """A method against ERM on one target.

    Attributes:
        difference: with the pooled deviation.
        p: corrected by Holm's method; None where no deviation is known.
    """

    difference: Difference
    p: float | None

    @property
    def mark(self) -> str:
        """The verdict: holds (better than ERM), fails (worse) or undecided."""
        if self.p is None or self.p >= _LEVEL:
            return "undecided"
        return "holds" if self.difference.mean > 0 else "fails"


def compare_targets(measures: Measures) -> dict[tuple[str, str], Cell]:
    """By method and target. The paper's methods and the others are two families for Holm's correction."""
    found, by_method = {}, _shares(measures)
    for place, target in enumerate(TABLES.values()):
        accuracies = {method: shares[:, place].tolist() for method, shares in by_method.items()}
        found.update({(method, target): one for method, one in pooled(accuracies, "erm").items()})
    corrected: dict[tuple[str, str], float] = {}
    for of_paper in (True, False):
        known = {key: one.p for key, one in found.items() if one.p is not None and (key[0] in METHODS) is of_paper}
        planned = [method for method in measures.scale.methods if method != "erm" and (method in METHODS) is of_paper]
        corrected |= zip(known, holm(list(known.values()), len(planned) * len(TABLES)), strict=True)
    return {key: Cell(one, corrected.get(key)) for key, one in found.items()}


def cell_columns(cell: Cell | None) -> dict[str, str]:
    """Columns of a comparison on one target, empty for the baseline."""
    if cell is None:
        return dict.fromkeys(("here, minus ERM", "95 % pooled", "p, Holm", "verdict"), "")
    return {
        "here, minus ERM": f"{100 * cell.difference.mean:+.2f}",
        "95 % pooled": percent_interval(cell.difference.interval),
        "p, Holm": p_value(cell.p),
        "verdict": cell.mark,
    }


def equivalence(measures: Measures) -> Exhibit:
    """The primary comparison with ERM of the mean over the targets, and each target beside it."""
    scale, study = measures.scale, measures.study
    assert scale.margin is not None  # otherwise the verdicts have another rule
    means = {method: shares.mean(1).tolist() for method, shares in _shares(measures).items()}
    planned = len(scale.methods) - 1
    differences, cells = dunnett(means, "erm", planned), compare_targets(measures)
    rows = []
    for method, accuracies in means.items():
        one = differences.get(method)
        row = {"method": TITLES[method], "seeds": len(accuracies), "mean of targets": _spread(accuracies)}
        row |= {
            "minus ERM": f"{100 * one.mean:+.2f}" if one else "",
            "95 %, Dunnett": percent_interval(one.interval) if one else "",
            "p, Dunnett": p_value(one.p) if one else "",
            "verdict": equivalence_mark(one.interval, scale.margin) if one else "",
        }
        for target in TABLES.values():
            own = cells.get((method, target))
            row[study.target_title(target)] = f"{100 * own.difference.mean:+.2f} {own.mark}" if own else ""
        rows.append(row)
    return Exhibit(
        f"verdicts{study.suffix}",
        f"SVM accuracy minus ERM's, in points; pre-trained on {study.title}",
        rows,
        notes=_notes(measures, planned),
    )


def _notes(measures: Measures, planned: int) -> list[str]:
    scale = measures.scale
    assert scale.margin is not None
    notes = [
        f"Primary is the mean of the targets. Its intervals hold together for {planned} planned comparisons with ERM. "
        f"A method is equivalent if its interval lies within {100 * scale.margin:g} points on both sides of 0.",
        "The targets are secondary. Their marks are of p-values with a pooled deviation, corrected by Holm's method. "
        "Rules: docs/protocol.md.",
    ]
    missing = [TITLES[method] for method in scale.methods if method not in measures.methods]
    if missing:
        notes.append(f"Not in this table: {', '.join(missing)}.")
    if scale.gate:
        notes.append(f"Gate: {measure_gate(measures)}.")
    return notes


def _shares(measures: Measures) -> dict[str, NDArray[np.float64]]:
    """By method the accuracies, (seeds, targets)."""
    return {
        method: np.array([
            [unpack(measures.score(method, seed, target)["right"]).mean() for target in TABLES.values()]
            for seed in measures.scale.seeds
        ])
        for method in measures.methods
    }  # fmt: skip


def _spread(shares: list[float]) -> str:
    return spread([100 * share for share in shares])
