"""Files of `torch.save`, read without running code and with their checksums compared."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

__all__ = ["NotTensorsError", "load_tensors"]

_RECORDS = (
    "argparse.Namespace",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    *(
        f"numpy.{name}"
        for name in ("float16", "float32", "float64", "int32", "int64", "uint8", "bool", "bool_", "str_")
    ),
    *(
        f"{module}.{name}"
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path", "PurePath")
    ),
)
"""Objects that many programs save with weights: arguments, NumPy's numbers and types, and paths."""


class NotTensorsError(ValueError):
    """A complete file has other contents than tensors and plain data. The message says what."""


class Record:
    """Replaces an object of `_RECORDS` without its content, so neither NumPy nor pathlib creates anything."""

    def __new__(cls, *_: object, **__: object) -> Record:
        """An empty one."""
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


def load_tensors(file: Path) -> Any:
    """Reads a file of `torch.save` with tensors and plain data. Objects of `_RECORDS` become an empty `Record`.

    PyTorch's reader does not compare the checksums in the file, so that a flipped bit would be another weight. Nor
    does it mind entries that are compressed, or that share their bytes, or tensors larger than what is stored of them:
    a small file could fill the memory.

    Raises:
        NotTensorsError: it holds objects whose making runs code, or a program.
        Exception: the file is damaged. Many kinds are raised.
    """
    if zipfile.is_zipfile(file):  # PyTorch's format since version 1.6
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if any(entry.filename.endswith("/constants.pkl") for entry in entries):
                raise NotTensorsError("it is a TorchScript program: save its state_dict()")
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            if not stored or sum(entry.file_size for entry in entries) > file.stat().st_size:
                raise ValueError("its entries claim more bytes than it has")
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} in it is damaged")
    with torch.serialization.safe_globals([(Record, name) for name in _RECORDS]):
        try:
            held = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as exc:
            if code := _code_in(file):
                raise NotTensorsError(
                    f"it holds {code}, which runs code when it is loaded: save tensors alone"
                ) from exc
            raise
    _require_own_bytes(held)
    return held


def _code_in(file: Path) -> str:
    """Names of some objects in a file that PyTorch does not load safely; empty where there are none to be found."""
    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # an older format, or damaged
        return ""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _require_own_bytes(held: Any) -> None:
    waiting = [held]
    seen: set[int] = set()  # containers may hold each other, and themselves
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            if value.layout is not torch.strided or value.device.type != "cpu" or value.is_quantized:
                raise ValueError("it holds tensors that are not plain")
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise ValueError("a tensor in it is larger than what is stored of it")
        elif isinstance(value, dict | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value
