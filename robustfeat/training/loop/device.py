"""Chooses PyTorch's device."""

from __future__ import annotations

import torch

from robustfeat.errors import InputError
from robustfeat.serving.engines.options import AUTO, DEVICES

__all__ = ["measuring_device", "torch_device"]


def torch_device(name: str) -> torch.device:
    """The device that auto, cpu or cuda means here.

    Raises:
        InputError: another name, or cuda where PyTorch sees no GPU.
    """
    if name not in {AUTO, *DEVICES}:
        raise InputError("expected auto, cpu or cuda", argument="device", value=name)
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise InputError(
            "PyTorch sees no GPU", argument="device", value=name, fix="check the driver, or pass `device=cpu`"
        )
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def measuring_device(name: str) -> torch.device:
    """`torch_device`, where from now on fp32 means fp32, whatever was trained in this process before."""
    chosen = torch_device(name)
    if chosen.type == "cuda":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return chosen
