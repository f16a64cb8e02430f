"""Checks whether probabilities are calibrated."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from robustfeat.serving.heads.kinds import Array
from robustfeat.serving.heads.probabilities import sigmoid, softmax

__all__ = ["Reliability", "draw_reliability", "uncalibrated"]

_BINS = 10
_SIDE = 240


@dataclass(frozen=True, eq=False)
class Reliability:
    """Confidence and accuracy in non-empty bins of equal width.

    Attributes:
        confidence, accuracy: (b,) means per bin.
        rows: (b,) number of rows per bin.
        error: the expected calibration error, the mean distance weighted by rows (Guo et al., ICML 2017).
    """

    confidence: Array
    accuracy: Array
    rows: NDArray[np.int64]
    error: float

    @classmethod
    def of(cls, probabilities: Array, targets: NDArray[np.int64] | NDArray[np.bool_]) -> Reliability:
        """Ten bins of (m, K) probabilities with (m,) int64 or (m, K) bool targets, of which each label counts."""
        if targets.ndim == 1:
            confidence, right = probabilities.max(1), probabilities.argmax(1) == targets
        else:
            confidence = np.maximum(probabilities, 1 - probabilities).ravel()
            right = ((probabilities > 0.5) == targets).ravel()
        return cls.of_confidence(confidence, right)

    @classmethod
    def of_confidence(cls, confidence: Array, right: NDArray[np.bool_], count: int = _BINS) -> Reliability:
        """Puts (m,) probabilities of predictions, and whether these are right, into `count` bins."""
        bins = np.minimum((confidence * count).astype(np.int64), count - 1)
        rows = np.bincount(bins, minlength=count)
        some = rows > 0
        means = [np.bincount(bins, of, count)[some] / rows[some] for of in (confidence, right.astype(np.float64))]
        error = float((rows[some] * np.abs(means[0] - means[1])).sum() / rows.sum())
        return cls(means[0], means[1], rows[some], error)


def uncalibrated(margins: Array, *, multi_label: bool) -> Array:
    """Probabilities without calibration, which treat (m, K) margins as logits."""
    if multi_label:
        return sigmoid(margins)
    if margins.shape[1] == 2 and np.array_equal(margins[:, 0], -margins[:, 1]):  # one margin of a linear kind
        return sigmoid(margins)
    return softmax(margins)


def draw_reliability(before: Reliability, after: Reliability) -> str:
    """Draws an SVG of accuracy over confidence, which agree on the diagonal."""

    def points(one: Reliability) -> list[tuple[float, float]]:
        return [
            (round(float(x) * _SIDE, 1), round((1 - float(y)) * _SIDE, 1))
            for x, y in zip(one.confidence, one.accuracy, strict=True)
        ]

    parts = []
    for name, one in (("before", before), ("after", after)):
        path = " ".join(f"{x},{y}" for x, y in points(one))
        parts.append(f'<polyline class="{name}" points="{path}"/>')
        parts += [f'<circle class="{name}" cx="{x}" cy="{y}" r="4"/>' for x, y in points(one)]
    ticks = "".join(
        f'<text x="{share * _SIDE}" y="{_SIDE + 16}" text-anchor="middle">{share:g}</text>'
        f'<text x="-6" y="{(1 - share) * _SIDE + 4}" text-anchor="end">{share:g}</text>'
        for share in (0, 0.5, 1)
    )
    return (
        f'<svg class="reliability" viewBox="-56 -10 {_SIDE + 72} {_SIDE + 56}" role="img" '
        f'aria-label="Accuracy by confidence"><rect width="{_SIDE}" height="{_SIDE}"/>'
        f'<line x1="0" y1="{_SIDE}" x2="{_SIDE}" y2="0"/>{ticks}{"".join(parts)}'
        f'<text x="{_SIDE / 2}" y="{_SIDE + 36}" text-anchor="middle">Confidence</text>'
        f'<text transform="translate(-36 {_SIDE / 2}) rotate(-90)" text-anchor="middle">Accuracy</text></svg>'
    )
