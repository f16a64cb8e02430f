"""A PyTorch network as ONNX."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxscript.optimizer
import torch
from torch import nn

from robustfeat.errors import ExportError, first_line
from robustfeat.hub.preprocessing import Preprocessing
from robustfeat.training.export.stamp import INPUT, OUTPUT, quiet, raise_of_the_system, stamp_onnx

__all__ = ["export_onnx"]


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
        with quiet():
            torch.onnx.export(
                network,
                (example,),
                str(file),
                dynamo=True,
                external_data=False,
                optimize=False,
                verbose=False,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
    except Exception as exc:  # the exporter's errors share no base class
        raise_of_the_system(exc)
        raise ExportError(
            f"this network cannot be exported to ONNX ({first_line(exc)})", fix="choose another architecture"
        ) from exc
    model = onnx.load(file)
    # Not the exporter's own optimiser: it folds BatchNorm into the weights, which then are not model.safetensors'.
    onnxscript.optimizer.fold_constants(model)
    onnxscript.optimizer.remove_unused_nodes(model)
    stamp_onnx(model, contract)
    onnx.save(model, file)
