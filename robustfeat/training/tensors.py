"""Files of `torch.save`, read without running code and with their checksums compared."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

__all__ = ["load_tensors"]


def load_tensors(file: Path) -> Any:
    """What `torch.save` wrote: tensors and plain data.

    PyTorch's reader does not compare the checksums in the file, so that a flipped bit would be another weight.

    Raises:
        Exception: of many kinds, where the file is damaged or holds something else.
    """
    if zipfile.is_zipfile(file):  # as PyTorch writes it since version 1.6
        with zipfile.ZipFile(file) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} in it is damaged")
    return torch.load(file, map_location="cpu", weights_only=True)
