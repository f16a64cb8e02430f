"""One update of a network's parameters, in one precision: what pre-training and fine-tuning share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from robustfeat.errors import InputError

__all__ = ["Descent"]


class Descent:
    """Gradient descent on all parameters of a network.

    Args:
        network: on its device.
        device: the network's.
        lr: the first learning rate.
        momentum: momentum of SGD.
        weight_decay: weight decay of either optimiser.
        precision: fp32, bf16 or fp16 (with loss scaling).
        optimizer: `sgd`, with momentum; or `adamw`, with PyTorch's betas 0.9 and 0.999.
        decay_norms: decay the weights of normalisation layers and biases, too: parameters of less than two dimensions.
        clip_norm: largest L2 norm of the gradient of all parameters together; a longer one is scaled down. 0: none.

    Raises:
        InputError: the device does not have this precision.

    Source: AdamW: Loshchilov and Hutter, ICLR 2019. Clipping: Pascanu, Mikolov and Bengio, ICML 2013.
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
        optimizer: str = "sgd",
        decay_norms: bool = True,
        clip_norm: float = 0.0,
    ) -> None:
        if precision == "fp16" and device.type != "cuda":
            raise InputError(
                "needs a GPU (on a CPU it is 50 times slower than bf16)",
                argument="precision",
                value=precision,
                fix="pass `precision=bf16`",
            )
        self._device, self._precision, self._clip_norm = device, precision, clip_norm
        self._parameters = list(network.parameters())
        groups = _parameter_groups(self._parameters, weight_decay, decay_norms)
        # On a CPU the fused optimiser saves 3 ms a step and is not bit for bit the plain one.
        fused = device.type == "cuda"
        self._optimizer: torch.optim.Optimizer
        if optimizer == "adamw":
            self._optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=fused)
        else:
            self._optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=fused)
        if precision == "fp16" and optimizer == "sgd":
            # Where the first step overflows, the fused optimiser skips it and leaves buffers that it never wrote.
            for parameter in self._parameters:
                self._optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self._scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self._pending = False

    @property
    def pending(self) -> bool:
        """Whether gradients were added since the last update."""
        return self._pending

    @property
    def gradients(self) -> list[Tensor]:
        """The gradients added so far, for the parameters that have some."""
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]

    def autocast(self) -> torch.autocast:
        """The precision of forward passes."""
        dtype = torch.float16 if self._precision == "fp16" else torch.bfloat16
        return torch.autocast(self._device.type, dtype, enabled=self._precision != "fp32")

    def add(self, loss: Tensor) -> None:
        """Adds the gradient of a scalar to the next update's."""
        if not self._pending:
            self._optimizer.zero_grad()
        self._scaler.scale(loss).backward()
        self._pending = True

    def update(self, lr: float) -> Tensor | None:
        """One step along the gradients that were added, at this learning rate.

        Returns:
            With `clip_norm`, the gradient's norm before it was clipped; not finite where fp16 overflowed.
        """
        norm = None
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if self._clip_norm:
            self._scaler.unscale_(self._optimizer)
            # Data parallelism has averaged the gradients in the backward pass, so each rank sees the same norm.
            norm = nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._pending = False
        return norm

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint: optimizer and scaler."""
        return {"optimizer": self._optimizer.state_dict(), "scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from a checkpoint."""
        # fused is this machine's choice, not the checkpoint's.
        groups = [{**group, "fused": self._device.type == "cuda"} for group in state["optimizer"]["param_groups"]]
        self._optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        if state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])


def _parameter_groups(parameters: list[nn.Parameter], weight_decay: float, decay_norms: bool) -> list[dict[str, Any]]:
    """One group, or a second one of the parameters whose weights do not decay."""
    if decay_norms:
        return [{"params": parameters}]
    return [
        {"params": [one for one in parameters if one.ndim > 1], "weight_decay": weight_decay},
        {"params": [one for one in parameters if one.ndim < 2], "weight_decay": 0.0},
    ]
