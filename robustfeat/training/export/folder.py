"""Model folders of networks: weights, ONNX files, golden images and config, each checked against PyTorch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor, nn

from robustfeat.errors import ExportError
from robustfeat.files import new_folder
from robustfeat.hub.card import render_card
from robustfeat.hub.config import ModelConfig
from robustfeat.hub.folder import COMPACT_ONNX, GOLDEN_FEATURES, ONNX, TRAINING, WEIGHTS, ModelFolder, seal_folder
from robustfeat.hub.preprocessing import INTERPOLATIONS, Preprocessing, decode, preprocess
from robustfeat.serving.extractor import FeatureExtractor
from robustfeat.serving.options import RunOptions
from robustfeat.serving.verify import check_golden, compare
from robustfeat.training.export.compact import compact_onnx
from robustfeat.training.export.onnx_files import export_onnx, quantize_onnx

__all__ = ["Backbone", "ExportReport", "write_model_folder"]

_CALIBRATION_BATCH = 16


@dataclass(frozen=True)
class Backbone:
    """A network to make a folder of.

    Attributes:
        network: images to (N, D) features, without the classifier, in eval mode; parameter names as in `state`.
        state: the state dict with the classifier, as timm's namesake loads it.
        config: without `files`.
        training: the content of training.json.
    """

    network: nn.Module
    state: dict[str, Tensor]
    config: ModelConfig
    training: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ExportReport:
    """A folder that was accepted.

    Attributes:
        folder: the result.
        cosines: precision to the smallest cosine against PyTorch over the golden images.
    """

    folder: ModelFolder
    cosines: dict[str, float]


def write_model_folder(
    backbone: Backbone, out: str | Path, *, calibration: Sequence[Image.Image] | None, compact: bool = False
) -> ExportReport:
    """Writes the folder, checks it and only then gives it its name.

    Args:
        calibration: decoded images for int8, besides the golden ones; None leaves int8 out.
        compact: weights once, in fp16, shared by model.safetensors and model.onnx.

    Raises:
        ExportError: a file disagrees with PyTorch; nothing is left behind.
    """
    config, network = backbone.config, backbone.network.eval()
    contract = config.preprocessing
    with new_folder(out) as path:
        state = {key: value.detach().cpu().contiguous() for key, value in backbone.state.items()}
        if compact:
            # BatchNorm's vectors and the biases stay fp32: they are few, and running statistics need the range.
            state = {key: value.half() if value.ndim > 1 else value for key, value in state.items()}
        # Not save_file: it makes the file readable by its owner alone.
        (path / WEIGHTS).write_bytes(save(state, metadata={"format": "pt"}))
        golden = _write_golden(path, contract)
        inputs = preprocess(golden, contract)
        before = _torch_features(network, inputs)
        # PyTorch's answers come from the written weights, the classifier left aside.
        missing = network.load_state_dict(load_file(path / WEIGHTS), strict=False).missing_keys
        assert not missing, missing
        expected = _torch_features(network, inputs)
        if expected.shape != (len(golden), config.feature_size) or not np.isfinite(expected).all():
            raise ExportError(f"{config.name}: PyTorch gives {expected.shape} features or values that are not finite")
        rounded = compare(before, expected, engine="pytorch")
        if rounded.short:
            raise ExportError(
                f"{config.name}: rounding the weights changes the features (cosine {rounded.cosine:.5f} on a golden "
                f"image, {rounded.needed} needed); nothing was written",
                fix="export without `compact=True`",
            )
        np.save(path / GOLDEN_FEATURES, expected)

        single = path / ONNX["fp32"]
        export_onnx(network, contract, single)
        if calibration is not None:
            # The golden images join in: some lie on plain ground, where activations reach furthest.
            images = [*calibration, *golden]
            batches = [
                preprocess(images[first : first + _CALIBRATION_BATCH], contract)
                for first in range(0, len(images), _CALIBRATION_BATCH)
            ]
            quantize_onnx(single, batches, contract, path / ONNX["int8"])
        if compact:
            compact_onnx(single, path / WEIGHTS, path / COMPACT_ONNX)
            single.unlink()
            if not any(single.parent.iterdir()):
                single.parent.rmdir()

        (path / "preprocessor_config.json").write_text(json.dumps(_preprocessor_config(contract), indent=2) + "\n")
        training = json.dumps(dict(backbone.training), ensure_ascii=False)
        (path / TRAINING).write_text(training + "\n", "utf-8")
        folder = seal_folder(path, config, render_card(config))
        cosines = _check(folder)
    return ExportReport(ModelFolder(out), cosines)


def _check(folder: ModelFolder) -> dict[str, float]:
    cosines: dict[str, float] = {}
    for precision in folder.precisions:
        check = check_golden(FeatureExtractor.open(folder, RunOptions(precision, device="cpu")))
        assert check.cosine is not None
        cosines[precision] = check.cosine
        if check.short:
            fix = "pass `int8=False` or more images as `calibration`" if precision == "int8" else "report this network"
            raise ExportError(
                f"{folder.config.name}: {precision} ONNX disagrees with PyTorch (cosine {check.cosine:.5f} on a golden "
                f"image, {check.needed} needed); nothing was written",
                fix=fix,
            )
    return cosines


def _torch_features(network: nn.Module, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    with torch.no_grad():
        features: NDArray[np.float32] = network.float()(torch.from_numpy(inputs)).numpy()
    return features


def golden_images() -> list[tuple[str, bytes]]:
    """Name and bytes of the golden images: small CC0 photographs in the formats and modes that users have."""
    folder = resources.files("robustfeat.training.export").joinpath("golden")
    return [(entry.name, entry.read_bytes()) for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)]


def _write_golden(path: Path, contract: Preprocessing) -> list[Image.Image]:
    (path / "golden").mkdir()
    images = golden_images()
    for name, data in images:
        (path / "golden" / name).write_bytes(data)
    return [decode(data, version=contract.version) for _, data in images]


_SIZE_KEYS = {"center": ("shortest_edge",), "squash": ("height", "width"), "border": ("longest_edge",)}


def _preprocessor_config(contract: Preprocessing) -> dict[str, Any]:
    side = contract.image_size
    return {
        "image_processor_type": "TimmWrapperImageProcessor",
        "crop_size": {"height": side, "width": side},
        "size": dict.fromkeys(_SIZE_KEYS[contract.crop_mode], contract.resize_size),
        "resample": INTERPOLATIONS[contract.interpolation].value,
        "image_mean": list(contract.mean),
        "image_std": list(contract.std),
    }
