"""A PyTorch network as ONNX."""

from __future__ import annotations

import mmap
import tempfile
from pathlib import Path

import onnx
import onnxscript.optimizer
import torch
from onnxscript import ir
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from robustfeat.errors import ExportError, first_line
from robustfeat.hub.external_data import MAX_BYTES, write_with_data_inside
from robustfeat.hub.preprocessing import Preprocessing
from robustfeat.training.export.stamp import INPUT, OUTPUT, quiet, raise_of_the_system, stamp_onnx

__all__ = ["export_onnx", "require_onnx_size"]

_GRAPH_BYTES = 2**24
"""Bytes reserved for everything except weights in an ONNX file."""


def require_onnx_size(network: nn.Module, name: str) -> None:
    """Checks that the network's weights in fp32 fit into an ONNX file that engines can read.

    Args:
        network: may be without values.
        name: what the message calls it.

    Raises:
        ExportError: they are too many.
    """
    count = sum(value.numel() for value in {*network.parameters(), *network.buffers()})
    if 4 * count > MAX_BYTES - _GRAPH_BYTES:
        raise ExportError(
            f"{name}: has {count / 1e6:,.0f} million weights, {4 * count / 1e9:.1f} GB in fp32; engines read ONNX "
            "files of at most 2 GB from memory",
            fix="choose a smaller network",
        )


def export_onnx(network: nn.Module, contract: Preprocessing, file: Path) -> None:
    """Writes `network` ((N, 3, S, S) to (N, D), in eval mode) as one fp32 file with any batch size.

    Weights keep their names, and BatchNorm its own nodes: engines fuse them when they load the file. They go from the
    network to the file one by one.

    Raises:
        ExportError: the network cannot be exported.
    """
    require_onnx_size(network, "this network")
    side = contract.image_size
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        graph, weights = Path(scratch, "graph.onnx"), Path(scratch, "weights")
        try:
            with quiet():
                program = _trace(network, side)
                # Not the exporter's own optimiser: it folds BatchNorm into the weights, which then are not
                # model.safetensors'.
                onnxscript.optimizer.fold_constants(program.model)
                onnxscript.optimizer.remove_unused_nodes(program.model)
                ir.save(program.model, graph, external_data=weights.name)
        except Exception as exc:  # the exporter's errors share no base class
            raise_of_the_system(exc)
            raise ExportError(
                f"this network cannot be exported to ONNX ({_root(exc)})", fix="choose another architecture"
            ) from exc
        model = onnx.load(graph, load_external_data=False)
        stamp_onnx(model, contract)
        with open(weights, "rb") as handle, open(file, "wb") as target:
            data = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) if weights.stat().st_size else b""
            write_with_data_inside(model.SerializeToString(), lambda _: data, target)


def _trace(network: nn.Module, side: int) -> torch.onnx.ONNXProgram:
    def export() -> torch.onnx.ONNXProgram:
        program = torch.onnx.export(
            network,
            (torch.zeros(2, 3, side, side),),
            dynamo=True,
            optimize=False,
            verbose=False,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
        assert program is not None
        return program

    try:
        return export()
    except Exception:
        # Fused attention returns other strides than the exporter assumes, which reshapes after it, as MaxViT's, show.
        with sdpa_kernel(SDPBackend.MATH):
            return export()


def _root(exc: BaseException) -> str:
    """The cause of an exporter's error, whose own message only names the failed step."""
    while exc.__cause__ is not None:
        exc = exc.__cause__
    return first_line(exc)
