"""Files of `torch.save`, read without running code and with their checksums compared."""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path
from typing import Any

import torch

__all__ = ["load_tensors"]


def load_tensors(file: Path) -> Any:
    """What `torch.save` wrote: tensors and plain data.

    PyTorch's reader does not compare the checksums in the file, so that a flipped bit would be another weight. Nor
    does it mind entries that are compressed, or that share their bytes, or tensors larger than what is stored of them:
    a small file could fill the memory.

    Raises:
        Exception: of many kinds, where the file is damaged or holds something else.
    """
    if zipfile.is_zipfile(file):  # as PyTorch writes it since version 1.6
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            if not stored or sum(entry.file_size for entry in entries) > file.stat().st_size:
                raise ValueError("its entries claim more bytes than it has")
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} in it is damaged")
    # What many programs save beside weights: their arguments. It is a plain record, of which nothing is run.
    with torch.serialization.safe_globals([argparse.Namespace]):
        held = torch.load(file, map_location="cpu", weights_only=True)
    _require_own_bytes(held)
    return held


def _require_own_bytes(held: Any) -> None:
    waiting = [held]
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            if value.layout is not torch.strided or value.device.type != "cpu" or value.is_quantized:
                raise ValueError("it holds tensors that are not plain")
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise ValueError("a tensor in it is larger than what is stored of it")
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple | set):
            waiting += value
