"""Measures how well predictions agree with labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from robustfeat.counts import format_count
from robustfeat.hub.markdown import cell
from robustfeat.serving.heads.reports.answers import Answers
from robustfeat.serving.heads.reports.confusion import draw_confusion
from robustfeat.serving.heads.reports.intervals import wilson_interval

__all__ = ["ClassScore", "Report"]

_NAMED = 5
"""Number of classes without rows that are named."""


@dataclass(frozen=True)
class ClassScore:
    """The scores of one class, and its number of rows."""

    name: str
    rows: int
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True, eq=False)
class Report:
    """Scores of predictions against labels.

    Attributes:
        rows: number of rows.
        accuracy: the share of right rows; with several labels per row, all labels must be right.
        balanced_accuracy: the mean recall of the classes that occur. With several labels per row, the mean over the
            labels that occur of the mean recall of rows with and without the label.
        macro_f1: the mean F1 of the classes that occur.
        classes: the scores of each class.
        confusion: (K, K) int64, rows by label, columns by prediction; None with several labels per row.
        answers: the rows, if made by `of_answers`.
        unseen: whether the rows were held out, so labels that the head contradicts are suspicious.
        settings: the settings that a selection tried on these rows, as rows of a table.
    """

    rows: int
    accuracy: float
    balanced_accuracy: float
    macro_f1: float
    classes: tuple[ClassScore, ...]
    confusion: NDArray[np.int64] | None
    answers: Answers | None = None
    unseen: bool = False
    settings: tuple[dict[str, str], ...] = ()

    @classmethod
    def of(cls, predicted: NDArray[Any], targets: NDArray[Any], classes: Sequence[str | int]) -> Report:
        """Computes the scores.

        Args:
            predicted, targets: (m,) int64 into `classes`, or (m, K) bool; m > 0.
            classes: K names.
        """
        # Without scikit-learn, whose import takes ten times as long as the rest.
        count, confusion = len(classes), None
        if targets.ndim == 1:
            confusion = np.bincount(targets * count + predicted, minlength=count**2).reshape(count, count)
            right = predicted == targets
            true, rows, guessed = np.diag(confusion), confusion.sum(1), confusion.sum(0)
        else:
            right = (predicted == targets).all(1)
            true, rows, guessed = (predicted & targets).sum(0), targets.sum(0), predicted.sum(0)
        recall, precision = _share(true, rows), _share(true, guessed)
        f1 = _share(2 * true, rows + guessed)
        if confusion is None:
            balanced = (recall + _share((~predicted & ~targets).sum(0), len(targets) - rows)) / 2
        else:
            balanced = recall
        occurs = rows > 0 if rows.any() else np.ones(count, bool)
        columns = (rows.tolist(), precision.tolist(), recall.tolist(), f1.tolist())
        return cls(
            rows=len(targets),
            accuracy=float(right.mean()),
            balanced_accuracy=float(balanced[occurs].mean()),
            macro_f1=float(f1[occurs].mean()),
            classes=tuple(ClassScore(str(name), *row) for name, *row in zip(classes, *columns, strict=True)),
            confusion=confusion,
        )

    @classmethod
    def of_answers(cls, answers: Answers, *, unseen: bool = False) -> Report:
        """Computes the scores of `answers`, and keeps them."""
        report = cls.of(answers.predicted, answers.targets, answers.classes)
        return replace(report, answers=answers, unseen=unseen)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the accuracy (see `wilson_interval`)."""
        return wilson_interval(self.accuracy, self.rows)

    @property
    def absent(self) -> tuple[str, ...]:
        """The classes without a row, which balanced accuracy and macro F1 leave out; empty if no class has one."""
        names = tuple(one.name for one in self.classes if not one.rows)
        return names if len(names) < len(self.classes) else ()

    @property
    def suspects(self) -> int:
        """Number of labels of held-out rows that are probably wrong."""
        return len(self.answers.suspects) if self.answers and self.unseen else 0

    def to_dict(self) -> dict[str, Any]:
        """Converts the scores to JSON, without the confusion matrix."""
        return {
            "rows": self.rows,
            "accuracy": self.accuracy,
            "interval": list(self.interval),
            "balanced_accuracy": self.balanced_accuracy,
            "macro_f1": self.macro_f1,
            "classes": [vars(one) for one in self.classes],
        }

    def to_text(self, title: str) -> str:
        """Renders the table for a terminal, with each name on one line."""
        return self._lay_out(title, lambda text: " ".join(text.splitlines()))

    def to_markdown(self, title: str) -> str:
        """Renders the table in Markdown, with escaped names."""
        return self._lay_out(title, cell)

    def _lay_out(self, title: str, shown: Callable[[str], str]) -> str:
        low, high = self.interval
        absent = [shown(name) for name in self.absent[:_NAMED]] + ["..."] * (len(self.absent) > _NAMED)
        left_out = f"; means leave out {format_count(len(self.absent), 'class')} without rows: {', '.join(absent)}"
        head = (
            f"{shown(title)}: accuracy {self.accuracy:.4f} (95 %: {low:.4f} to {high:.4f}), "
            f"balanced accuracy {self.balanced_accuracy:.4f}, macro F1 {self.macro_f1:.4f} "
            f"on {format_count(self.rows, 'row')}{left_out if absent else ''}"
        )
        names = [shown(one.name) for one in self.classes]
        width = max(5, *map(len, names))
        lines = [head, "", f"| {'class':{width}} |   rows | precision | recall |     F1 |"]
        lines.append(f"|{'-' * (width + 2)}|-------:|----------:|-------:|-------:|")
        for name, one in zip(names, self.classes, strict=True):
            lines.append(
                f"| {name:{width}} | {one.rows:6} | {one.precision:9.4f} | {one.recall:6.4f} | {one.f1:6.4f} |"
            )
        return "\n".join(lines)

    @cached_property
    def picture(self) -> Image.Image | None:
        """Draws the confusion matrix (see `draw_confusion`); None with several labels per row."""
        if self.confusion is None:
            return None
        return draw_confusion(self.confusion, [one.name for one in self.classes])


def _share(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    """A share, or 0 of no rows."""
    shares: NDArray[np.float64] = part / np.maximum(1, whole)
    return shares
