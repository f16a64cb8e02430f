"""A feature network as ONNX, in fp32 and int8."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnxscript.optimizer
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

from robustfeat.errors import ExportError, first_line
from robustfeat.hub.preprocessing import Preprocessing
from robustfeat.serving.engine import HASH_KEY

__all__ = ["export_onnx", "quantize_onnx"]


def export_onnx(network: nn.Module, contract: Preprocessing, file: Path) -> None:
    """Writes `network` ((N, 3, S, S) to (N, D), in eval mode) as one fp32 file with any batch size.

    Weights keep their names, and BatchNorm its own nodes: engines fuse them when they load the file.

    Raises:
        ExportError: the network cannot be exported.
    """
    side = contract.image_size
    example = torch.zeros(2, 3, side, side)
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _quiet():
            torch.onnx.export(
                network,
                (example,),
                str(file),
                dynamo=True,
                external_data=False,
                optimize=False,
                verbose=False,
                input_names=["pixel_values"],
                output_names=["features"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
    except Exception as exc:  # the exporter's errors share no base class
        _raise_of_the_system(exc)
        raise ExportError(
            f"this network cannot be exported to ONNX ({first_line(exc)})", fix="choose another architecture"
        ) from exc
    model = onnx.load(file)
    # Not the exporter's own optimiser: it folds BatchNorm into the weights, which then are not model.safetensors'.
    onnxscript.optimizer.fold_constants(model)
    onnxscript.optimizer.remove_unused_nodes(model)
    _stamp(model, contract)
    onnx.save(model, file)


def quantize_onnx(source: Path, batches: Sequence[NDArray[np.float32]], contract: Preprocessing, target: Path) -> None:
    """Writes a static int8 (QDQ) copy of `source`, its ranges taken from `batches` of real, prepared images.

    Activations are QUInt8, weights QInt8 per channel with a reduced range, since the full one saturates on
    processors without VNNI.

    Raises:
        ExportError: the graph cannot be quantised.
    """
    try:
        with _quiet(), tempfile.TemporaryDirectory() as scratch:
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
        _raise_of_the_system(exc)
        raise ExportError(
            f"this network cannot be quantised ({first_line(exc)})", fix="pass `int8=False` to leave int8 out"
        ) from exc
    model = onnx.load(target)
    _stamp(model, contract)
    onnx.save(model, target)


def _raise_of_the_system(exc: BaseException) -> None:
    """Raises the error of the system, such as a full disk, that lies behind another one; no network is to blame.

    Raises:
        OSError: if there is one.
    """
    cause: BaseException | None = exc
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            raise cause
        cause = cause.__cause__ or cause.__context__


class _Batches(CalibrationDataReader):  # type: ignore[misc]
    """Prepared images, as the quantiser reads them."""

    def __init__(self, batches: Sequence[NDArray[np.float32]]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"pixel_values": batch}


def _stamp(model: onnx.ModelProto, contract: Preprocessing) -> None:
    """Keeps the preprocessing hash, and drops the traces of the exporting machine (paths, stack traces)."""
    del model.metadata_props[:]
    model.metadata_props.add(key=HASH_KEY, value=contract.hash)
    model.graph.doc_string = model.doc_string = ""
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        del value.metadata_props[:]


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters' chatter is about their own internals; what matters is checked afterwards."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
