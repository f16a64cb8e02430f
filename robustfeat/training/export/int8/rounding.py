"""Weights as 8-bit integers that no processor's sums overflow, rounded so that the layer's outputs change least."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

__all__ = ["Rounded", "round_by_inputs", "round_to_nearest"]

_PAIR = 128
"""Two weights of an output may add up to this: processors without VNNI keep 255 * (a + b) in 16 bits."""

_DAMPING = 0.05
_BLOCK = 128


@dataclass(frozen=True)
class Rounded:
    """Weights of a layer in int8.

    Attributes:
        integers: (G, R, K) int8.
        scales: (G, R, 1) float32; integer times scale is a weight.
    """

    integers: NDArray[np.int8]
    scales: NDArray[np.float32]

    @property
    def weights(self) -> NDArray[np.float32]:
        """(G, R, K) float32: what the integers stand for."""
        return self.integers * self.scales


def round_to_nearest(weights: NDArray[np.float32]) -> Rounded:
    """Rounds each weight of (G, R, K) by itself."""
    scales, limits = _grid(weights)
    return Rounded(_rounded(weights, scales, limits).astype(np.int8), scales)


def round_by_inputs(weights: NDArray[np.float32], moments: NDArray[np.float32]) -> Rounded:
    """Rounds one weight after the other, so each compensates for the errors of the earlier ones.

    Args:
        weights: (G, R, K).
        moments: (G, K, K): sums of x x^T over inputs x of the layer.

    Source: GPTQ (Frantar et al., ICLR 2023), written as Babai's nearest plane: where the moments are L L^T, errors e of
    an output's weights change that output by the length of e L.
    """
    scales, limits = _grid(weights)
    power = np.einsum("gkk->gk", moments)
    # Inputs of large power come last in L and are rounded first, while all others can still make up.
    order = np.argsort(power, axis=1, kind="stable")
    lower = np.take_along_axis(np.take_along_axis(moments, order[:, :, None], 1), order[:, None, :], 2)
    places = np.arange(weights.shape[2])
    lower[:, places, places] += _DAMPING * np.maximum(power.mean(1, keepdims=True), 1e-12)
    # SciPy's, a few times as fast as NumPy's on large matrices.
    lower = np.stack([scipy.linalg.cholesky(moment, lower=True, check_finite=False) for moment in lower])
    lower /= np.einsum("gkk->gk", lower)[:, None, :]
    order = order[:, None, :]
    wanted, limits = np.take_along_axis(weights, order, 2), np.take_along_axis(limits, order, 2)
    integers = np.empty(weights.shape, np.int8)
    np.put_along_axis(integers, order, _nearest_plane(wanted, lower, scales, limits), 2)
    return Rounded(integers, scales)


def _nearest_plane(
    weights: NDArray[np.float32], lower: NDArray[np.float32], scales: NDArray[np.float32], limits: NDArray[np.float32]
) -> NDArray[np.int8]:
    """The integers of (G, R, K) weights, from the last column to the first; `lower` has ones on its diagonal."""
    integers, errors = np.empty(weights.shape, np.int8), np.zeros_like(weights)
    targets = weights.copy()
    for stop in range(weights.shape[2], 0, -_BLOCK):
        start = max(0, stop - _BLOCK)
        # What the blocks before this one left is one large product; within the block each column waits for the last.
        targets[:, :, start:stop] += errors[:, :, stop:] @ lower[:, stop:, start:stop]
        for place in range(stop - 1, start - 1, -1):
            here, rest = slice(place, place + 1), slice(place + 1, stop)
            target = targets[:, :, here] + errors[:, :, rest] @ lower[:, rest, here]
            rounded = _rounded(target, scales, limits[:, :, here])
            integers[:, :, here] = rounded
            errors[:, :, here] = weights[:, :, here] - rounded * scales
    return integers


def _rounded(
    weights: NDArray[np.float32], scales: NDArray[np.float32], limits: NDArray[np.float32]
) -> NDArray[np.float32]:
    steps: NDArray[np.float32] = np.clip(np.rint(weights / scales), -limits, limits)
    return steps


def _grid(weights: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scales (G, R, 1) and the largest integer of each weight (G, R, K), by which no two exceed `_PAIR`."""
    sizes = np.abs(weights)
    largest = sizes.max(2, keepdims=True)
    second = np.partition(sizes, -2, axis=2)[:, :, -2:-1] if sizes.shape[2] > 1 else np.zeros_like(largest)
    scales = np.maximum((largest + second) / (_PAIR - 1), largest / 127)
    scales = np.where(scales > 0, scales, 1).astype(np.float32)
    others = np.rint(second / scales)
    one = np.arange(sizes.shape[2]) == sizes.argmax(2)[:, :, None]
    return scales, np.where(one, np.minimum(127, _PAIR - others), others).astype(np.float32)
