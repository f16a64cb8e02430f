"""Compares a head's predictions with labels, and finds labels that are probably wrong."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from robustfeat.hub.markdown import table
from robustfeat.serving.heads.cells import SEPARATOR, quote_cell
from robustfeat.serving.heads.head import Head
from robustfeat.serving.heads.kinds import Array
from robustfeat.serving.inputs.sources import printable

__all__ = ["Answers", "suspects_csv", "suspects_text"]

_LISTED = 50

_DOUBTFUL = 0.05
"""Relative probability below which a label is suspicious: the label's probability over the prediction's.

It finds more planted errors in digits than confident learning (Northcutt et al., 2021).
"""


@dataclass(frozen=True, eq=False)
class Answers:
    """Labelled rows with a head's predictions.

    Attributes:
        paths: m names of rows.
        classes: K names.
        targets, predicted: (m,) int64 into `classes`, or (m, K) bool.
        margins: (m, K).
        probabilities: (m, K) calibrated; None for a head without calibration.
        certainty: (m,), see `Head.certainty`.
    """

    paths: Sequence[str]
    classes: Sequence[str | int]
    targets: NDArray[np.int64] | NDArray[np.bool_]
    predicted: NDArray[np.int64] | NDArray[np.bool_]
    margins: Array
    probabilities: Array | None
    certainty: Array

    @classmethod
    def of(
        cls,
        head: Head,
        margins: Array,
        targets: NDArray[np.int64] | NDArray[np.bool_],
        paths: Sequence[str],
        classes: Sequence[str | int],
    ) -> Answers:
        """Makes answers from (m, K) margins of `head`; `classes` are the classes of the targets."""
        shares = head.calibrate(margins) if head.calibrated else None
        predicted = margins > 0 if head.multi_label else margins.argmax(1)
        return cls(paths, classes, targets, predicted, margins, shares, head.certainty(margins))

    @cached_property
    def right(self) -> NDArray[np.bool_]:
        """(m,) bool: whether the prediction is right; with several labels, all of them."""
        same = np.reshape(self.predicted == self.targets, (len(self.targets), -1))
        return np.asarray(same.all(1))

    @cached_property
    def confidence(self) -> Array | None:
        """(m,) probability of the prediction; with several labels, of the least probable part."""
        shares = self.probabilities
        if shares is None:
            return None
        best: Array = shares.max(1) if self.targets.ndim == 1 else np.maximum(shares, 1 - shares).min(1)
        return best

    @cached_property
    def doubt(self) -> Array | None:
        """(m,) probability of the label over the prediction's, 1 if they agree; the smallest of several labels."""
        shares = self.probabilities
        if shares is None:
            return None
        if self.targets.ndim == 2:
            given = np.where(self.targets, shares, 1 - shares)
            ratios: Array = np.minimum(given / np.maximum(1 - given, 1e-300), 1).min(1)
            return ratios
        given = shares[np.arange(len(shares)), self.targets]
        ratio: Array = given / np.maximum(shares.max(1), 1e-300)
        return ratio

    @cached_property
    def suspects(self) -> list[int]:
        """Held-out rows whose label is probably wrong, most doubtful first."""
        doubt = self.doubt
        if doubt is None:
            return []
        order = np.argsort(doubt, kind="stable")
        found: list[int] = order[doubt[order] < _DOUBTFUL].tolist()
        return found

    def given(self, at: int) -> str:
        """The label or labels of a row."""
        return self._names(self.targets[at])

    def answer(self, at: int) -> str:
        """The prediction for a row."""
        return self._names(self.predicted[at])

    def _names(self, value: NDArray[np.generic] | np.generic) -> str:
        numbers = np.flatnonzero(value).tolist() if self.targets.ndim == 2 else [value.item()]
        return SEPARATOR.join(str(self.classes[number]) for number in numbers)


def suspects_csv(answers: Answers) -> str:
    """All suspicious labels as CSV: path, label, prediction, and relative probability."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", "prediction", "relative_probability"])
    doubt = answers.doubt
    for at in answers.suspects:
        assert doubt is not None
        names = (answers.paths[at], answers.given(at), answers.answer(at))
        writer.writerow([*map(quote_cell, names), f"{doubt[at]:.3g}"])
    return text.getvalue()


def suspects_text(answers: Answers) -> str:
    """The most doubtful labels, at most 50, in Markdown."""
    found, doubt = answers.suspects, answers.doubt
    if doubt is None or not len(found):
        return f"Labels that are probably wrong: none of {len(answers.paths):,}.\n"
    rows = [
        {
            "path": printable(answers.paths[at]),
            "label": answers.given(at),
            "prediction": answers.answer(at),
            "relative probability": f"{doubt[at]:.2g}",
        }
        for at in found[:_LISTED]
    ]
    more = f"; the first {_LISTED}, all are in suspects.csv" if len(found) > _LISTED else ""
    return (
        f"Labels that are probably wrong: {len(found):,} of {len(answers.paths):,}{more}. "
        "Relative probability: of the label, as a share of the prediction's.\n\n" + table(rows)
    )
