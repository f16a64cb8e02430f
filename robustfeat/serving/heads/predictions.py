"""Predicts rows of features as CSV or JSON lines, and suggests rows to label next."""

from __future__ import annotations

import csv
import heapq
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.progress import json_line
from robustfeat.serving.heads.cells import SEPARATOR, quote_cell
from robustfeat.serving.heads.features import Features
from robustfeat.serving.heads.head import Head
from robustfeat.serving.heads.kinds import Array
from robustfeat.serving.inputs.sources import path_fields

__all__ = ["Prediction", "Rejection", "Suggestions", "predict", "predict_rows", "to_csv", "to_jsonl"]


@dataclass(frozen=True, eq=False)
class Prediction:
    """The prediction for one row.

    Attributes:
        path: path in the index.
        labels: the class, or the labels; empty for a failed image.
        margins: (K,); None for a failed image.
        probabilities: (K,), if requested.
        certainty: see `Head.certainty`.
        typicality: see `Head.typicality`; None for a failed image, or a head without distances.
        error: the error of a failed image.
    """

    path: str
    labels: tuple[str | int, ...] = ()
    margins: Array | None = None
    probabilities: Array | None = None
    certainty: float = float("nan")
    typicality: float | None = None
    error: str | None = None


def predict_rows(head: Head, features: Features, *, probabilities: bool = False) -> Iterator[Prediction]:
    """Yields a prediction for every row, in order.

    Raises:
        InputError: the features belong to another model or are not finite.
        HeadError: probabilities were requested, but the head has no calibration.
    """
    head.require_features(features, "this head")
    for rows, values in features.chunks():
        good = [row for row in rows if row not in features.errors]
        names = [features.paths[row] for row in good]
        found = iter(predict(head, values[np.array(good, np.int64) - rows.start], names, probabilities=probabilities))
        for row in rows:
            failed = features.errors.get(row)
            yield next(found) if failed is None else Prediction(features.paths[row], error=failed)


def predict(head: Head, values: NDArray[Any], paths: Sequence[str], *, probabilities: bool = False) -> list[Prediction]:
    """Predicts (n, D) features of good images, with their n paths."""
    if not len(values):
        return []
    margins = head.margins(values)
    decided, certainty = head.decide(margins), head.certainty(margins)
    shares = head.calibrate(margins) if probabilities else None
    typicality = head.typicality(values) if head.tells_typicality else None
    return [
        Prediction(
            path,
            labels_of(head, decided[at]),
            margins[at],
            None if shares is None else shares[at],
            float(certainty[at]),
            None if typicality is None else float(typicality[at]),
        )
        for at, path in enumerate(paths)
    ]


class Rejection:
    """Removes the labels of predictions with a small typicality, which belong to no class.

    Args:
        least: smallest accepted typicality.

    Attributes:
        count: number of rejected predictions so far.
    """

    def __init__(self, least: float) -> None:
        self._least, self.count = least, 0

    def watch(self, predictions: Iterator[Prediction]) -> Iterator[Prediction]:
        """Passes predictions on, the rejected ones without labels."""
        for one in predictions:
            if one.typicality is None or one.typicality >= self._least:
                yield one
            else:
                self.count += 1
                yield replace(one, labels=())


def labels_of(head: Head, decided: NDArray[Any] | Any) -> tuple[str | int, ...]:
    """The classes of one row of `Head.decide`."""
    if head.multi_label:
        return tuple(head.classes[at] for at in np.flatnonzero(decided))
    value: str | int = decided.item()
    return (value,)


def answer_of(head: Head, prediction: Prediction) -> dict[str, Any]:
    """Converts a prediction to a JSON object."""
    labels = list(prediction.labels)
    one = labels[0] if labels else None
    answer: dict[str, Any] = {
        **path_fields(prediction.path),
        "prediction": labels if head.multi_label and prediction.error is None else one,
        "margins": _named(head.classes, prediction.margins),
    }
    if prediction.probabilities is not None:
        answer["probabilities"] = _named(head.classes, prediction.probabilities)
    if head.tells_typicality:
        answer["typicality"] = prediction.typicality
    answer["error"] = prediction.error
    return answer


def _named(classes: Sequence[str | int], values: Array | None) -> dict[str, float] | None:
    return None if values is None else dict(zip(map(str, classes), values.tolist(), strict=True))


def to_jsonl(head: Head, predictions: Iterator[Prediction]) -> Iterator[str]:
    """Yields JSON lines: path, prediction, margins, error, and if available probabilities and typicality."""
    for prediction in predictions:
        yield json_line(answer_of(head, prediction)) + "\n"


def to_csv(head: Head, predictions: Iterator[Prediction], *, probabilities: bool = False) -> Iterator[str]:
    """Yields a CSV header and one line per row: path, prediction, error, typicality, margins and probabilities.

    Typicality needs a head with distances. Probabilities are optional.

    Several labels are joined by `|`. Names that are not UTF-8 keep their bytes as lone surrogates. A `'` precedes text
    that a spreadsheet would run as a formula. `read_labels` reverses both.
    """
    line = io.StringIO()
    writer = csv.writer(line, lineterminator="\n")

    def taken() -> str:
        text = line.getvalue()
        line.seek(0)
        line.truncate()
        return text

    typicality = ["typicality"] if head.tells_typicality else []
    header = ["path", "prediction", "error", *typicality, *(f"margin:{name}" for name in head.classes)]
    writer.writerow(header + [f"probability:{name}" for name in head.classes if probabilities])
    yield taken()
    for one in predictions:
        cells: list[Any] = [quote_cell(text) for text in (one.path, _joined(one.labels), one.error or "")]
        if one.typicality is not None:
            cells.append(f"{one.typicality:.6g}")
        for values in (one.margins, one.probabilities):
            if values is not None:
                cells += [f"{value:.6g}" for value in values]
        writer.writerow(cells + [""] * (len(header) - len(cells)))
        yield taken()


def _joined(labels: Sequence[str | int]) -> str:
    return SEPARATOR.join(map(str, labels))


class Suggestions:
    """Keeps the least certain of a stream of predictions.

    Args:
        count: number of predictions to keep.
        known: paths that need no label.
    """

    def __init__(self, count: int, known: Callable[[str], bool] = lambda path: False) -> None:
        self._count, self._known = count, known
        self._least: list[tuple[float, int, Prediction]] = []

    def watch(self, predictions: Iterator[Prediction]) -> Iterator[Prediction]:
        """Passes all predictions on."""
        for number, prediction in enumerate(predictions):
            if prediction.error is None and not self._known(prediction.path):
                # The most certain kept prediction is on top, the later among equals first.
                heapq.heappush(self._least, (-prediction.certainty, -number, prediction))
                if len(self._least) > self._count:
                    heapq.heappop(self._least)
            yield prediction

    def found(self) -> list[Prediction]:
        """The kept predictions, least certain first."""
        return [prediction for _, _, prediction in sorted(self._least, key=lambda entry: (-entry[0], -entry[1]))]

    def to_csv(self) -> str:
        """The kept predictions as CSV: path, prediction, certainty, and typicality if the head has distances."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        found = self.found()
        told = any(one.typicality is not None for one in found)
        writer.writerow(["path", "prediction", "certainty", *(["typicality"] if told else [])])
        for one in found:
            numbers = [one.certainty] if one.typicality is None else [one.certainty, one.typicality]
            cells = [quote_cell(one.path), quote_cell(_joined(one.labels)), *(f"{number:.6g}" for number in numbers)]
            writer.writerow(cells)
        return text.getvalue()
