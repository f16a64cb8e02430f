"""What can be wrong with the arguments of an import and costs nothing to find out. Loads no PyTorch."""

from __future__ import annotations

from pathlib import Path

from robustfeat.errors import InputError

__all__ = ["LIBRARIES", "check_import", "weights_error"]

LIBRARIES = ("timm", "torchvision")


def check_import(source: str, weights: str | Path | None) -> None:
    """A source names a library and an architecture, and a file of weights is there.

    Raises:
        InputError: it does not, or is not.
    """
    library, _, architecture = source.partition(":")
    if library not in LIBRARIES or not architecture:
        raise InputError(
            "expected timm:NAME or torchvision:NAME, such as timm:resnet50", argument="source", value=source
        )
    if weights is not None and not Path(weights).exists():
        raise weights_error(weights, "no such file")


def weights_error(weights: str | Path, reason: str) -> InputError:
    """The error for a file of weights that cannot be read."""
    return InputError(
        f"cannot be read ({reason})",
        argument="weights",
        value=weights,
        fix="pass a .safetensors file or a saved state dict",
    )
