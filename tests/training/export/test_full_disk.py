"""A full disk is not the network's fault."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
from torch import nn

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
    with pytest.raises(OSError, match="No space left"):
        quantize_onnx(tmp_path / "m.onnx", NO_GOLDEN, [], Preprocessing(32), tmp_path / "q.onnx")
