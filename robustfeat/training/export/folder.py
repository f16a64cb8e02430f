"""Model folders of PyTorch networks: weights, ONNX files, golden images and config, each checked against PyTorch."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from robustfeat.errors import ExportError
from robustfeat.hub.config import ModelConfig
from robustfeat.hub.folder import CLASSIFIER, ONNX, WEIGHTS
from robustfeat.progress import remark
from robustfeat.serving.verify import compare
from robustfeat.training.export.assembly import ExportReport, FolderParts, assemble_folder
from robustfeat.training.export.onnx_files import export_onnx

__all__ = ["Backbone", "ExportReport", "write_model_folder"]


@dataclass(frozen=True)
class Backbone:
    """A network to make a folder of.

    Attributes:
        network: images to (N, D) features, without the classifier, in eval mode; parameter names as in `state`.
        state: the state dict with the classifier, as timm's namesake loads it.
        config: without `files`.
        training: the content of training.json.
        classifier: `weight` (C, D) and `bias` of a classifier that `state` does not have.
    """

    network: nn.Module
    state: dict[str, Tensor]
    config: ModelConfig
    training: Mapping[str, Any] = field(default_factory=dict)
    classifier: Mapping[str, Tensor] | None = None


def write_model_folder(
    backbone: Backbone,
    out: str | Path,
    *,
    calibration: Sequence[NDArray[np.uint8]] | None,
    compact: bool = False,
    quiet: bool = True,
) -> ExportReport:
    """Writes the folder, checks it and only then gives it its name.

    Args:
        backbone: the network. Its weights are freed once they are written.
        out: the folder to make.
        calibration: squares (S, S, 3) for int8, besides the golden images; None leaves int8 out.
        compact: weights once, in fp16, shared by model.safetensors and model.onnx.
        quiet: say nothing of the steps on stderr.

    Raises:
        ExportError: a file disagrees with PyTorch; nothing is left behind.
    """
    network, name = backbone.network.eval(), backbone.config.name

    def write(path: Path, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        remark(f"{name}: writing {WEIGHTS}; PyTorch embeds the golden images", quiet=quiet)
        expected = _write_weights(backbone, path / WEIGHTS, inputs, compact=compact)
        if backbone.classifier:
            _save(dict(backbone.classifier), path / CLASSIFIER)
        remark(f"{name}: writes {ONNX['fp32']}", quiet=quiet)
        export_onnx(network, backbone.config.preprocessing, path / ONNX["fp32"])
        # Engines hold the weights three times during loading, for which the folder's check needs memory.
        backbone.state.clear()
        network.to("meta")
        gc.collect()  # exported programs refer to themselves
        return expected

    parts = FolderParts(backbone.config, write, training=backbone.training)
    return assemble_folder(parts, out, calibration=calibration, compact=compact, quiet=quiet)


def _write_weights(
    backbone: Backbone, file: Path, inputs: NDArray[np.float32], *, compact: bool
) -> NDArray[np.float32]:
    """Writes model.safetensors; PyTorch's features of `inputs`, (n, 3, S, S) to (n, D), from the written weights."""
    network = backbone.network
    state = {key: value.detach().cpu().contiguous() for key, value in backbone.state.items()}
    if compact:
        # BatchNorm's vectors and the biases stay fp32: they are few, and running statistics need the range.
        state = {key: value.half() if value.ndim > 1 else value for key, value in state.items()}
    _save(state, file)
    before = _torch_features(network, inputs)
    # The classifier is left aside.
    missing = network.load_state_dict(load_file(file), strict=False).missing_keys
    assert not missing, missing
    expected = _torch_features(network, inputs)
    rounded = compare(before, expected, engine="pytorch")
    if rounded.short and np.isfinite(expected).all():
        raise ExportError(
            f"{backbone.config.name}: rounding the weights changes the features (cosine {rounded.cosine:.5f} on a "
            f"golden image, {rounded.needed} needed); nothing was written",
            fix="export without `compact=True`",
        )
    return expected


def _each_its_own(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors that share their values with an earlier one, as in CoaT: a file keeps each by itself."""
    seen: set[int] = set()
    own: dict[str, Tensor] = {}
    for name, value in state.items():
        shared = value.untyped_storage().data_ptr() in seen
        seen.add(value.untyped_storage().data_ptr())
        own[name] = value.clone() if shared else value
    return own


def _save(state: dict[str, Tensor], file: Path) -> None:
    try:
        save_file(_each_its_own(state), file, metadata={"format": "pt"})
    except SafetensorError as exc:
        if number := re.search(r"os error (\d+)", str(exc)):  # such as a full disk
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from exc
        raise
    file.chmod(file.parent.stat().st_mode & 0o666)  # it may be readable by its owner only


def _torch_features(network: nn.Module, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    with torch.no_grad():
        features: NDArray[np.float32] = network.float()(torch.from_numpy(inputs)).numpy()
    return features
