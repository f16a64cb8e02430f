"""A feature network's ONNX file in int8. Loads no PyTorch."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from robustfeat.errors import ExportError, first_line
from robustfeat.hub.preprocessing import Preprocessing
from robustfeat.training.export.stamp import INPUT, quiet, raise_of_the_system, stamp_onnx

__all__ = ["quantize_onnx"]


def quantize_onnx(source: Path, batches: Sequence[NDArray[np.float32]], contract: Preprocessing, target: Path) -> None:
    """Writes a static int8 (QDQ) copy of `source`, its ranges taken from `batches` of real, prepared images.

    Activations are QUInt8, weights QInt8 per channel with a reduced range, since the full one saturates on
    processors without VNNI.

    Raises:
        ExportError: the graph cannot be quantised.
    """
    try:
        with quiet(), tempfile.TemporaryDirectory() as scratch:
            # Shape inference and BatchNorm folded into the convolutions, which are then quantised as one.
            prepared = Path(scratch, "prepared.onnx")
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            quantize_static(
                str(prepared),
                str(target),
                _Batches(batches),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                per_channel=True,
                reduce_range=True,
            )
    except Exception as exc:  # the quantiser's errors share no base class either
        raise_of_the_system(exc)
        raise ExportError(
            f"this network cannot be quantised ({first_line(exc)})", fix="pass `int8=False` to leave int8 out"
        ) from exc
    model = onnx.load(target)
    stamp_onnx(model, contract)
    onnx.save(model, target)


class _Batches(CalibrationDataReader):  # type: ignore[misc]
    """Prepared images, as the quantiser reads them."""

    def __init__(self, batches: Sequence[NDArray[np.float32]]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: batch}
