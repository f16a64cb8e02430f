"""One update of a network's parameters, in one precision: what pre-training and fine-tuning share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from robustfeat.errors import InputError

__all__ = ["Descent"]


class Descent:
    """SGD with momentum on all parameters of a network.

    Args:
        network: on its device.
        device: the network's.
        lr: the first learning rate.
        momentum, weight_decay: of SGD.
        precision: fp32, bf16 or fp16 (with loss scaling).

    Raises:
        InputError: the device does not have this precision.
    """

    def __init__(
        self,
        network: nn.Module,
        device: torch.device,
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        precision: str = "fp32",
    ) -> None:
        if precision == "fp16" and device.type != "cuda":
            raise InputError(
                "needs a GPU (on a CPU it is 50 times slower than bf16)",
                argument="precision",
                value=precision,
                fix="pass `precision=bf16`",
            )
        self._device, self._precision = device, precision
        # On a CPU the fused optimiser saves 3 ms a step and is not bit for bit the plain one.
        fused = device.type == "cuda"
        self._optimizer = torch.optim.SGD(
            network.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay, fused=fused
        )
        if precision == "fp16":
            # Where the first step overflows, the fused optimiser skips it and leaves buffers that it never wrote.
            for parameter in network.parameters():
                self._optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self._scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def autocast(self) -> torch.autocast:
        """The precision of forward passes."""
        dtype = torch.float16 if self._precision == "fp16" else torch.bfloat16
        return torch.autocast(self._device.type, dtype, enabled=self._precision != "fp32")

    def update(self, loss: Tensor, lr: float) -> None:
        """One step along the gradient of a scalar, at this learning rate."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.zero_grad()
        self._scaler.scale(loss).backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: optimizer and scaler."""
        return {"optimizer": self._optimizer.state_dict(), "scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from a checkpoint."""
        # fused is this machine's choice, not the checkpoint's.
        groups = [{**group, "fused": self._device.type == "cuda"} for group in state["optimizer"]["param_groups"]]
        self._optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        if state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])
