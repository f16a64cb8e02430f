"""A full disk is not the network's fault."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from robustfeat.errors import InputError
from robustfeat.hub.preprocessing import Preprocessing
from robustfeat.training.export.int8.quantise import Golden, quantize_onnx
from robustfeat.training.export.onnx_files import export_onnx

NO_GOLDEN = Golden(np.empty((0, 3, 32, 32), np.float32), np.empty((0, 8), np.float32))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_full_disk_at_export_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrapped: bool) -> None:
    def fail(*_: object, **__: object) -> None:
        full = OSError(errno.ENOSPC, "No space left on device")
        if not wrapped:
            raise full
        raise RuntimeError("the exporter failed") from full

    monkeypatch.setattr("torch.onnx.export", fail)
    monkeypatch.setattr("robustfeat.training.export.int8.quantise.quant_pre_process", fail)
    with pytest.raises(OSError, match="No space left"):
        export_onnx(nn.Identity(), Preprocessing(32), tmp_path / "m.onnx")
    (tmp_path / "m.onnx").touch()
    with pytest.raises(OSError, match="No space left"):
        quantize_onnx(tmp_path / "m.onnx", NO_GOLDEN, [], Preprocessing(32), tmp_path / "q.onnx")


def test_a_temporary_folder_without_room_is_an_error_and_no_missing_int8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a network is what the writers of onnx leave there, and it cannot be told from a damaged one."""
    asked = list[int]()

    def full(descriptor: int, offset: int, length: int) -> None:
        asked.append(length)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    (tmp_path / "m.onnx").write_bytes(bytes(3_000_000))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(InputError, match=r"has no room for 7 MB of temporary files \(No space left.*set TMPDIR"):
        quantize_onnx(tmp_path / "m.onnx", NO_GOLDEN, [], Preprocessing(32), tmp_path / "q.onnx")
    assert asked == [2 * 3_000_000 + 2**20]
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
