"""A full disk is not the network's fault."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from torch import nn

from robustfeat.hub.preprocessing import Preprocessing
from robustfeat.training.export.onnx_files import export_onnx
from robustfeat.training.export.quantisation import quantize_onnx


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_full_disk_at_export_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrapped: bool) -> None:
    def fail(*_: object, **__: object) -> None:
        full = OSError(errno.ENOSPC, "No space left on device")
        if not wrapped:
            raise full
        raise RuntimeError("the exporter failed") from full

    monkeypatch.setattr("torch.onnx.export", fail)
    monkeypatch.setattr("robustfeat.training.export.quantisation.quant_pre_process", fail)
    with pytest.raises(OSError, match="No space left"):
        export_onnx(nn.Identity(), Preprocessing(32), tmp_path / "m.onnx")
    with pytest.raises(OSError, match="No space left"):
        quantize_onnx(tmp_path / "m.onnx", [], Preprocessing(32), tmp_path / "q.onnx")
