"""Fits heads on labelled rows, one C after another, in memory or by passes over a file."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.progress import Progress
from robustfeat.serving.bulk.stacked import Rows
from robustfeat.serving.heads.head import Head
from robustfeat.serving.heads.kinds import KINDS, Array
from robustfeat.serving.heads.solver.losses import loss_of
from robustfeat.serving.heads.solver.newton import Newton
from robustfeat.serving.heads.solver.rows import ScaledRows

__all__ = ["Fits", "TrainingSet"]


class TrainingSet:
    """Labelled rows.

    Args:
        values: (n, D) features, possibly memory-mapped.
        rows: (m,) int64, ascending: the rows with labels.
        targets: (m,) int64, or (m, K) bool. Only numbers that occur are classes.
        kind: one of `KINDS`.
        threads: number of processors.
        progress: shows the passes.

    Attributes:
        targets, kind: see Args.
        multi_label: whether a row may have several labels.
        numbers: numbers of the K classes, ascending.
        outputs: K, or 1 for two classes of a linear kind.
    """

    def __init__(
        self,
        values: Rows,
        rows: NDArray[np.int64],
        targets: NDArray[Any],
        kind: str,
        threads: int = 1,
        progress: Progress | None = None,
    ) -> None:
        self._values, self._rows, self.targets, self.kind = values, rows, targets, kind
        self._threads, self._progress = threads, progress
        self.multi_label = targets.ndim == 2
        if self.multi_label:
            self.numbers, self._classes = tuple(range(targets.shape[1])), targets
        else:
            present, self._classes = np.unique(targets, return_inverse=True)
            self.numbers = tuple(present.tolist())
        parted = KINDS[kind].linear and len(self.numbers) == 2 and not self.multi_label
        self.outputs = 1 if parted else len(self.numbers)

    def fits(self, scaling: str, places: NDArray[np.int64]) -> Fits:
        """Starts fits on these positions, (m',) int64, with this scaling."""
        places = np.sort(places)
        rows = ScaledRows(self._values, self._rows[places], scaling, self._threads, spanned=KINDS[self.kind].linear)
        return Fits(self, rows, self._classes[places], scaling, self._progress)

    def margins(self, head: Head, places: NDArray[np.int64]) -> Array:
        """Raw margins of these positions, (n, outputs)."""
        return head.raw_margins(self._values, self._rows[places])


class Fits:
    """Fits heads on the same scaled rows. Each C starts at the minimum of the previous one."""

    def __init__(
        self, data: TrainingSet, rows: ScaledRows, targets: NDArray[Any], scaling: str, progress: Progress | None
    ) -> None:
        self._data, self._rows, self._targets, self._scaling = data, rows, targets, scaling
        self._progress, self._c = progress, 0.0
        self._newton = self._create_newton() if KINDS[data.kind].linear else None

    def fit(self, c: float | None) -> tuple[Head, bool]:
        """Fits a head, whose classes are numbers, and returns whether the solver converged.

        Args:
            c: None for kinds without C.

        Raises:
            ValueError: the features overflow.
        """
        if self._newton is None:
            arrays, converged = _class_means(self._data, self._rows, self._targets), True
        else:
            self._c = float(c or 1.0)
            weights, converged = self._newton.minimise(self._c)
            weights = self._rows.to_features(weights)
            arrays = {
                "coefficients": np.ascontiguousarray(weights[:, :-1]),
                "intercepts": np.ascontiguousarray(weights[:, -1]),
            }
        data = self._data
        arrays = self._rows.arrays | arrays
        return Head(data.kind, data.numbers, self._scaling, arrays, multi_label=data.multi_label), converged

    def rest(self) -> None:
        """Frees memory that the next fit does not need."""
        if self._newton is not None:
            self._newton.forget()

    def _create_newton(self) -> Newton:
        data, size = self._data, self._rows.size
        # In liblinear, the intercept is the weight of a constant feature and is regularised like the others.
        shrunk = np.ones(size)
        shrunk[-1] = float(data.kind == "svm")
        loss = loss_of(data.kind, self._targets, data.outputs)
        return Newton(self._rows, loss, shrunk, data.outputs, self._report)

    def _report(self, number: int) -> None:
        if self._progress:
            self._progress.advance(0, f"C {self._c:g}, {self._scaling} scaling, pass {number}")


def _class_means(data: TrainingSet, rows: ScaledRows, targets: NDArray[Any]) -> dict[str, Array]:
    """Means, variances and shares of the classes, or of the rows without and with each label."""
    classes, size = len(data.numbers), rows.size - 1
    groups = classes * (2 if data.multi_label else 1)

    def sums(part: slice, padded: Array) -> tuple[Array, Array, Array]:
        x, member = padded[:, :-1], _members(targets[part], classes)
        return member.sum(0), member.T @ x, member.T @ x**2

    count, first, second = rows.sum(sums)
    means = first / count[:, None]
    of_all = slice(0, 2 if data.multi_label else groups)
    overall = first[of_all].sum(0) / rows.count
    total = second[of_all].sum(0) / rows.count - overall**2
    # The smoothing is that which GaussianNB(var_smoothing=1e-9) uses.
    variances = np.maximum(second / count[:, None] - means**2, 0) + 1e-9 * total.max()
    shape = (classes, 2) if data.multi_label else (classes,)
    found = {
        "means": means.reshape(*shape, size),
        "variances": variances.reshape(*shape, size),
        "priors": (count / rows.count).reshape(shape),
    }
    return {name: found[name] for name in KINDS[data.kind].shapes}


def _members(targets: NDArray[Any], classes: int) -> Array:
    """Membership, (n, groups) 0 or 1, of classes, or of rows without and with each label."""
    if targets.ndim == 2:
        return np.stack([~targets, targets], 2).reshape(len(targets), -1).astype(np.float64)
    members: Array = np.eye(classes)[targets]
    return members
