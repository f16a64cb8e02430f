"""Checks the arguments of an import before slow work. Loads no PyTorch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from robustfeat.errors import InputError
from robustfeat.hub.remote import is_hub_name

__all__ = ["LIBRARIES", "Source", "check_import", "parse_channels", "read_source", "weights_error"]

LIBRARIES = ("timm", "torchvision")

_EXPECTED = "timm:NAME, torchvision:NAME, hf:ORG/NAME, FILE.onnx, or a folder of transformers"

_NETWORKS = {*LIBRARIES, "onnx"}
_KINDS_OF = {
    "weights": set(LIBRARIES),
    "image_size": _NETWORKS,
    "crop_pct": _NETWORKS,
    "mean": {"onnx"},
    "std": {"onnx"},
    "interpolation": {"onnx"},
    "crop_mode": {"onnx"},
    "output": {"onnx"},
    "pooling": {"onnx", "hub", "folder"},
    "revision": {"hub"},
}
"""The options that not every kind of source has, with those that have them."""

_NAMES = {"hub": "hf:ORG/NAME", "folder": "a folder", "onnx": "FILE.onnx", "timm": "timm:NAME"}


@dataclass(frozen=True)
class Source:
    """The source of an import.

    Attributes:
        kind: `timm`, `torchvision`, `hub`, `onnx` (a file) or `folder`.
        name: name of the architecture, the repository, the file or the folder.
    """

    kind: str
    name: str


def read_source(source: str, options: Mapping[str, object] = {}) -> Source:
    """The source that a user names, and whether these options belong to its kind.

    Args:
        source: timm:NAME, torchvision:NAME, hf:ORG/NAME, FILE.onnx or a folder.
        options: values by name; None for options that were not passed.

    Raises:
        InputError: it is none of these, is not there, or has no such option.
    """
    found = _find(source)
    for name, value in options.items():
        kinds = _KINDS_OF.get(name)
        if value is not None and kinds is not None and found.kind not in kinds:
            expected = " and ".join(_NAMES[kind] for kind in _NAMES if kind in kinds)
            raise InputError(
                f"belongs to {expected}, not to {source}", argument=name, value=value, fix=f"leave `{name}` out"
            )
    return found


def _find(source: str) -> Source:
    prefix, colon, name = source.partition(":")
    if colon and prefix in LIBRARIES and name:
        return Source(prefix, name)
    if colon and prefix == "hf":
        if not is_hub_name(name):
            raise InputError(
                "expected hf:ORG/NAME, a repository on the Hub, such as hf:facebook/dinov2-small",
                argument="source",
                value=source,
            )
        return Source("hub", name)
    path = Path(source)
    if path.suffix.lower() == ".onnx" and path.is_file():
        return Source("onnx", source)
    if path.is_dir():
        return Source("folder", source)
    what = f"expected {_EXPECTED}, such as timm:resnet50"
    if path.is_file():
        what = f"is a file, and not named as an ONNX file; expected {_EXPECTED}"
    elif path.suffix.lower() == ".onnx" or path.parent.name:
        what = f"no such file or folder; expected {_EXPECTED}"
    fix = f"write hf:{source} for a repository on the Hub" if is_hub_name(source) else None
    raise InputError(what, argument="source", value=source, fix=fix)


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


def parse_channels(name: str, text: str) -> tuple[float, ...]:
    """One number, or three between commas; each may be a fraction such as 1/255.

    Raises:
        InputError: it is something else; `name` is the option.
    """
    try:
        values = tuple(float(Fraction(part.strip())) for part in text.split(","))
    except (ValueError, ZeroDivisionError, OverflowError):
        values = ()
    if len(values) not in (1, 3) or not all(map(math.isfinite, values)):
        raise InputError(
            "expected one number, or three between commas, such as 0.5, 1/255 or 0.485,0.456,0.406",
            argument=name,
            value=text,
        )
    return values


def weights_error(weights: str | Path, reason: str) -> InputError:
    """The error for a file of weights that cannot be read."""
    return InputError(
        f"cannot be read ({reason})",
        argument="weights",
        value=weights,
        fix="pass a .safetensors file or a saved state dict",
    )
