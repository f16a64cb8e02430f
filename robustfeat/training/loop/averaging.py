"""The moving average of a network's weights, which is what a run validates and gives away."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from robustfeat.training.network import Outputs

__all__ = ["MovingAverage"]

_WARMUP = 10


class MovingAverage:
    """An exponential moving average of parameters and of BatchNorm's running statistics.

    After update t the average is a_t = d_t a_(t-1) + (1 - d_t) theta_t, d_t = min(decay, (1 + t) / (10 + t)). The
    small d_t of the first updates let a_t forget the start weights a_0 = theta_0. Counters, such as BatchNorm's
    number of batches, are copied.

    Args:
        outputs: the network and its heads, on their device, as they start.
        decay: below 1.

    Attributes:
        outputs: the averaged network and heads; no gradient reaches them.

    Source: Polyak and Juditsky, SIAM J. Control Optim. 1992, for averages of weights; the exponential form and
    the rising d_t are as in TensorFlow's ExponentialMovingAverage (num_updates) and timm's ModelEmaV3.
    """

    def __init__(self, outputs: Outputs, decay: float) -> None:
        self.outputs = copy.deepcopy(outputs).requires_grad_(False).eval()
        self._decay, self._updates = decay, 0

    def restart(self, outputs: Outputs) -> None:
        """Begins anew at these weights, as a run with given start weights does before its first update."""
        self.outputs.load_state_dict(outputs.state_dict())
        self._updates = 0

    @torch.no_grad()
    def update(self, outputs: Outputs) -> None:
        """Takes in the weights after an update of the optimiser; nothing here waits for the device."""
        self._updates += 1
        decay = min(self._decay, (1 + self._updates) / (_WARMUP + self._updates))
        averages, values = [], []
        pairs = zip(_tensors(self.outputs), _tensors(outputs), strict=True)
        for average, value in pairs:
            if average.is_floating_point():
                averages.append(average)
                values.append(value)
            else:
                average.copy_(value)
        torch._foreach_lerp_(averages, values, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint: `model`, `heads` and the number of `updates`."""
        return {
            "model": self.outputs.network.state_dict(),
            "heads": self.outputs.heads.state_dict(),
            "updates": self._updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from a checkpoint."""
        self.outputs.network.load_state_dict(state["model"])
        self.outputs.heads.load_state_dict(state["heads"])
        self._updates = int(state["updates"])


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]
