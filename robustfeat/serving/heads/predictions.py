"""Predictions for rows of features, as CSV or JSON lines, and the rows to label next."""

from __future__ import annotations

import csv
import heapq
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.progress import json_line
from robustfeat.serving.heads.cells import quote_cell
from robustfeat.serving.heads.features import Features
from robustfeat.serving.heads.head import Head
from robustfeat.serving.heads.kinds import Array
from robustfeat.serving.heads.labels import SEPARATOR
from robustfeat.serving.inputs.sources import path_fields

__all__ = ["Prediction", "Suggestions", "predict_rows", "to_csv", "to_jsonl"]


@dataclass(frozen=True, eq=False)
class Prediction:
    """One row.

    Attributes:
        path: as the index has it.
        labels: the class, or the labels; none where the image failed.
        margins: (K,); None where the image failed.
        probabilities: (K,), if they were asked for.
        certainty: see `Head.certainty`.
        error: why the image failed.
    """

    path: str
    labels: tuple[str | int, ...] = ()
    margins: Array | None = None
    probabilities: Array | None = None
    certainty: float = float("nan")
    error: str | None = None


def predict_rows(head: Head, features: Features, *, probabilities: bool = False) -> Iterator[Prediction]:
    """A prediction for every row, in order.

    Raises:
        InputError: the features are another model's, or not finite.
        HeadError: probabilities were asked for, and the head has no calibration.
    """
    head.require_features(features, "this head")
    for rows, values in features.chunks():
        good = np.array([row for row in rows if row not in features.errors], np.int64)
        margins = head.margins(values[good - rows.start])
        decided = head.decide(margins)
        certainty = head.certainty(margins) if len(good) else np.empty(0)
        shares = head.calibrate(margins) if probabilities else None
        place = 0
        for row in rows:
            if row in features.errors:
                yield Prediction(features.paths[row], error=features.errors[row])
                continue
            yield Prediction(
                features.paths[row],
                labels_of(head, decided[place]),
                margins[place],
                None if shares is None else shares[place],
                float(certainty[place]),
            )
            place += 1


def labels_of(head: Head, decided: NDArray[Any] | Any) -> tuple[str | int, ...]:
    """The classes of one row of `Head.decide`."""
    if head.multi_label:
        return tuple(head.classes[at] for at in np.flatnonzero(decided))
    value: str | int = decided.item()
    return (value,)


def answer_of(head: Head, prediction: Prediction) -> dict[str, Any]:
    """A prediction as a JSON object."""
    labels = list(prediction.labels)
    answer: dict[str, Any] = {
        **path_fields(prediction.path),
        "prediction": None if prediction.error is not None else labels if head.multi_label else labels[0],
        "margins": _named(head.classes, prediction.margins),
    }
    if prediction.probabilities is not None:
        answer["probabilities"] = _named(head.classes, prediction.probabilities)
    answer["error"] = prediction.error
    return answer


def _named(classes: Sequence[str | int], values: Array | None) -> dict[str, float] | None:
    return None if values is None else dict(zip(map(str, classes), values.tolist(), strict=True))


def to_jsonl(head: Head, predictions: Iterator[Prediction]) -> Iterator[str]:
    """One JSON object a line: path, prediction, margins, probabilities if asked for, error or null."""
    for prediction in predictions:
        yield json_line(answer_of(head, prediction)) + "\n"


def to_csv(head: Head, predictions: Iterator[Prediction], *, probabilities: bool = False) -> Iterator[str]:
    """A header and a line a row: path, prediction, error, the margin of each class, and its probability if asked for.

    Several labels are joined by `|`. Names that are not UTF-8 keep their bytes as lone surrogates, and text that a
    spreadsheet would run as a formula stands behind a `'`; `read_labels` undoes both.
    """
    line = io.StringIO()
    writer = csv.writer(line, lineterminator="\n")

    def taken() -> str:
        text = line.getvalue()
        line.seek(0)
        line.truncate()
        return text

    header = ["path", "prediction", "error", *(f"margin:{name}" for name in head.classes)]
    writer.writerow(header + [f"probability:{name}" for name in head.classes if probabilities])
    yield taken()
    for one in predictions:
        cells: list[Any] = [quote_cell(text) for text in (one.path, _joined(one.labels), one.error or "")]
        for values in (one.margins, one.probabilities):
            if values is not None:
                cells += [f"{value:.6g}" for value in values]
        writer.writerow(cells + [""] * (len(header) - len(cells)))
        yield taken()


def _joined(labels: Sequence[str | int]) -> str:
    return SEPARATOR.join(map(str, labels))


class Suggestions:
    """Keeps the least certain predictions that pass by.

    Args:
        count: how many.
        known: paths that need no label any more.
    """

    def __init__(self, count: int, known: Callable[[str], bool] = lambda path: False) -> None:
        self._count, self._known = count, known
        self._least: list[tuple[float, int, Prediction]] = []

    def watch(self, predictions: Iterator[Prediction]) -> Iterator[Prediction]:
        """The same predictions."""
        for number, prediction in enumerate(predictions):
            if prediction.error is None and not self._known(prediction.path):
                # The largest of those kept is on top, the later of equals first.
                heapq.heappush(self._least, (-prediction.certainty, -number, prediction))
                if len(self._least) > self._count:
                    heapq.heappop(self._least)
            yield prediction

    def found(self) -> list[Prediction]:
        """The least certain first."""
        return [prediction for _, _, prediction in sorted(self._least, key=lambda entry: (-entry[0], -entry[1]))]

    def to_csv(self) -> str:
        """The same: path, prediction, certainty."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["path", "prediction", "certainty"])
        for one in self.found():
            writer.writerow([quote_cell(one.path), quote_cell(_joined(one.labels)), f"{one.certainty:.6g}"])
        return text.getvalue()
