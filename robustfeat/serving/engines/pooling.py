"""Pools the output of a network to one vector per image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.errors import EngineError, ModelFolderError
from robustfeat.hub.outputs import POOLED, Outputs
from robustfeat.serving.engines.options import AUTO

__all__ = ["FEATURES", "Pooling", "choose_pooling"]

Shape = Sequence[int | str | None]

_TOKENS, _MAP = 3, 4
"""Number of dimensions of tokens, and of a map."""


@dataclass(frozen=True)
class Pooling:
    """How the output of a network becomes features.

    Attributes:
        name: a way of `POOLED`; None if the network outputs features.
        output: the name of the output.
        prefix: number of tokens before the patches, which `mean` skips.
    """

    name: str | None
    output: str
    prefix: int = 0

    @property
    def skipped_tokens(self) -> int | None:
        """`prefix` if it affects the features, else None."""
        return self.prefix if self.name == "mean" else None

    def __call__(self, values: NDArray[Any]) -> NDArray[Any]:
        """Pools the output to features, (N, D).

        Args:
            values: (N, D), (N, D, 1, 1), tokens (N, T, D) or a map (N, D, H, W).

        Raises:
            ValueError: the output has no patch tokens to average.
        """
        if self.name == "cls":
            return np.ascontiguousarray(values[:, 0])
        if self.name == "mean" and values.ndim == _TOKENS:
            if values.shape[1] <= self.prefix:
                raise ValueError(f"it has {values.shape[1]} tokens, of which the first {self.prefix} are not patches")
            return _mean(values[:, self.prefix :], 1)
        if self.name == "mean":
            return _mean(values.reshape(*values.shape[:2], -1), 2)
        if self.name == "pooler" and values.ndim == _MAP and values.shape[2:] == (1, 1):
            return values[:, :, 0, 0]
        return values

    def feature_shape(self, shape: Shape) -> list[int | str | None]:
        """The shape of the features for an output of this shape."""
        if self.name is None:
            return list(shape)
        tokens = len(shape) == _TOKENS and self.name in {"cls", "mean"}
        return [shape[0], shape[2 if tokens else 1]]


FEATURES = Pooling(None, "features")
"""Pooling of robustfeat's own networks."""


def choose_pooling(asked: str, outputs: Outputs | None, given: Mapping[str, Shape], file: Path) -> Pooling:
    """Chooses the output of a network and how it becomes features.

    Args:
        asked: auto, or a way of `POOLED`.
        outputs: the meaning of the network's outputs; None for robustfeat's own networks.
        given: the network's outputs, with their shapes.
        file: the network's name in messages.

    Raises:
        EngineError: the network lacks the output that `asked` or its model type requires.
        ModelFolderError: one of robustfeat's networks has no output `features`.
    """
    if outputs is None:
        if asked != AUTO:
            raise EngineError(
                f"{file}: the network outputs features directly", argument="pooling", value=asked, fix="leave it out"
            )
        if FEATURES.output not in given:
            raise ModelFolderError(f"{file}: needs an output {FEATURES.output}; it has {', '.join(given)}")
        return FEATURES
    ways = (asked,) if asked != AUTO else (*outputs.preferred, "mean")
    reasons = {}
    for way in ways:
        reason = _obstacle(way, outputs, given)
        if reason is None:
            return Pooling(way, POOLED[way], outputs.prefix or 0)
        reasons[way] = reason
    possible = [way for way in POOLED if _obstacle(way, outputs, given) is None]
    fix = f"pass `pooling={possible[0]}`" if possible else "use a model for image features"
    has = f"it has {', '.join(f'{name} {_said(shape)}' for name, shape in given.items())}"
    if asked != AUTO:
        raise EngineError(f"{file}: {reasons[asked]}; {has}", argument="pooling", value=asked, fix=fix)
    raise EngineError(f"{file}: the output with the features of a {outputs.model_type} is unknown; {has}", fix=fix)


def _mean(values: NDArray[Any], axis: int) -> NDArray[Any]:
    mean: NDArray[Any] = values.mean(axis=axis, dtype=np.float64)
    return mean.astype(values.dtype)


def _obstacle(way: str, outputs: Outputs, given: Mapping[str, Shape]) -> str | None:
    """Why this way cannot make features; None if it can."""
    name = POOLED[way]
    if name not in given:
        return f"the network has no output {name}"
    dimensions = len(given[name])
    if way == "embeds" and dimensions != 2:
        return f"{name} is not one vector per image"
    if way == "pooler" and dimensions not in {2, _MAP}:  # only the values show whether a map is 1 x 1
        return f"{name} is not one vector per image"
    if way == "cls" and (dimensions != _TOKENS or outputs.prefix == 0):
        return f"a {outputs.model_type} has no class token"
    if way == "mean" and (dimensions not in {_TOKENS, _MAP} or (dimensions == _TOKENS and outputs.prefix is None)):
        return f"the patch tokens of a {outputs.model_type} are unknown"
    return None


def _said(shape: Shape) -> str:
    return f"({', '.join('?' if side is None else str(side) for side in shape)})"
