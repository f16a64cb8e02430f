"""Writes model folders: weights, ONNX files, golden images and config, each checked against PyTorch."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor, nn

import robustfeat
from robustfeat.errors import DataError, DecodeError, ExportError, HubError, InputError
from robustfeat.files import new_folder
from robustfeat.hub.card import render_card
from robustfeat.hub.config import Evaluation, ModelConfig
from robustfeat.hub.folder import COMPACT_ONNX, GOLDEN_FEATURES, ONNX, TRAINING, WEIGHTS, ModelFolder, seal_folder
from robustfeat.hub.preprocessing import Preprocessing, decode, preprocess
from robustfeat.serving.extractor import FeatureExtractor, cosine
from robustfeat.serving.inputs.listing import list_inputs
from robustfeat.serving.verify import MIN_COSINE
from robustfeat.training.data.opening import open_training_data
from robustfeat.training.export.compact import compact_onnx
from robustfeat.training.export.onnx_files import export_onnx, quantize_onnx
from robustfeat.training.loop.checkpoint import load_checkpoint
from robustfeat.training.loop.journal import read_metrics
from robustfeat.training.network import build_network
from robustfeat.training.recipe import Recipe

__all__ = ["Backbone", "ExportReport", "export_run", "folder_images", "write_model_folder"]

CALIBRATION_IMAGES = 256
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


def export_run(
    run: str | Path,
    out: str | Path,
    *,
    name: str | None = None,
    image_size: int | None = None,
    crop_pct: float | None = None,
    calibration: str | Path | None = None,
    int8: bool = True,
    compact: bool = False,
    results: Mapping[str, Any] | None = None,
    evaluations: Sequence[Evaluation] = (),
    terms: str | None = None,
    license_id: str | None = None,
    datasets: Sequence[str] = (),
) -> ExportReport:
    """The model folder of a run of `robustfeat train`.

    Args:
        run: the run's folder or a checkpoint file.
        out: the folder to make.
        name: the model's name, with its version; by default the run folder's name.
        image_size, crop_pct: of the preprocessing contract; by default the recipe's validation size and crop.
        calibration: a folder of images for int8; by default the run's own training images.
        int8: also write onnx/model_int8.onnx.
        compact: weights once, in fp16, shared by model.safetensors and model.onnx.
        results: measured results for the card.
        evaluations: measured numbers for the Hub's lists.
        terms: under which terms the weights may be used, for the card.
        license_id: the Hub's name of a license; by default the card says `other` and refers to the terms.
        datasets: the Hub's names of the datasets that it was trained on.

    Raises:
        CheckpointError, DataError: the run or the calibration images cannot be used.
        ExportError: a file disagrees with PyTorch; nothing is left behind.
    """
    run = Path(run)
    checkpoint = load_checkpoint(run)
    recipe = Recipe.from_dict(checkpoint.recipe)
    if checkpoint.epoch < recipe.epochs:
        raise ExportError(
            f"{run}: training stands at epoch {checkpoint.epoch} of {recipe.epochs}; "
            "finish it with robustfeat train --resume"
        )
    try:
        contract = recipe.preprocessing(image_size, crop_pct)
    except ValueError as exc:
        raise InputError(f"{run}: {exc}") from exc
    # A folder is published: what it says of the recipe must not tell of this machine's paths.
    told = {**checkpoint.recipe, "concepts": Path(recipe.concepts).name}
    network = build_network(len(checkpoint.classes))
    network.load_state_dict(checkpoint.model)
    classifier = network.get_submodule("fc")
    assert isinstance(classifier, nn.Linear)
    network.fc = nn.Identity()
    folder = run if run.is_dir() else run.parent
    config = ModelConfig(
        name=name or folder.resolve().name,
        architecture="resnet18",
        feature_size=classifier.in_features,
        num_classes=len(checkpoint.classes),
        preprocessing=contract,
        concepts=tuple(checkpoint.concepts),
        recipe=told,
        provenance={
            "source": "robustfeat train",
            "data": {key: value for key, value in checkpoint.data.items() if key != "root"},
            "terms": terms or "those of the training images",
            **({"license": license_id} if license_id else {}),
            **({"datasets": list(datasets)} if datasets else {}),
            "versions": _versions(),
        },
        results=dict(results or {}),
        evaluations=tuple(evaluations),
    )
    training = {
        "recipe": told,
        "classes": checkpoint.classes,
        "concepts": checkpoint.concepts,
        "concept_of_class": checkpoint.concept_of_class,
        "data": config.provenance["data"],
        "versions": _versions(),
        "metrics": read_metrics(folder),
    }
    images = None
    if int8:
        images = folder_images(calibration) if calibration else _training_images(checkpoint.data, recipe)
    backbone = Backbone(network, checkpoint.model, config, training)
    return write_model_folder(backbone, out, calibration=images, compact=compact)


def write_model_folder(
    backbone: Backbone, out: str | Path, *, calibration: Sequence[Image.Image] | None, compact: bool = False
) -> ExportReport:
    """Writes the folder, checks it and only then gives it its name.

    Args:
        calibration: decoded images for int8, besides the golden ones; None leaves int8 out.
        compact: see `export_run`.

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
        golden = _write_golden(path)
        inputs = preprocess(golden, contract)
        before = _torch_features(network, inputs)
        # PyTorch's answers come from the written weights, the classifier left aside.
        missing = network.load_state_dict(load_file(path / WEIGHTS), strict=False).missing_keys
        assert not missing, missing
        expected = _torch_features(network, inputs)
        if expected.shape != (len(golden), config.feature_size) or not np.isfinite(expected).all():
            raise ExportError(f"{config.name}: PyTorch gives {expected.shape} features or values that are not finite")
        if not (worst := float(cosine(before, expected).min())) >= MIN_COSINE["fp32"]:
            raise ExportError(
                f"{config.name}: rounding the weights changes the features (cosine {worst:.5f} on a golden image, "
                f"{MIN_COSINE['fp32']} needed); nothing was written: export without --compact"
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
        cosines[precision] = worst = FeatureExtractor.open(folder, precision, device="cpu").golden_cosine()
        if not worst >= MIN_COSINE[precision]:
            remedy = "pass --no-int8 or more --calibration images" if precision == "int8" else "report this network"
            raise ExportError(
                f"{folder.config.name}: {precision} ONNX disagrees with PyTorch (cosine {worst:.5f} on a golden image, "
                f"{MIN_COSINE[precision]} needed); nothing was written: {remedy}"
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


def _write_golden(path: Path) -> list[Image.Image]:
    (path / "golden").mkdir()
    images = golden_images()
    for name, data in images:
        (path / "golden" / name).write_bytes(data)
    return [decode(data) for _, data in images]


def _preprocessor_config(contract: Preprocessing) -> dict[str, Any]:
    side = contract.image_size
    return {
        "image_processor_type": "TimmWrapperImageProcessor",
        "crop_size": {"height": side, "width": side},
        "size": {"shortest_edge": contract.resize_size},
        "resample": {"bilinear": 2, "bicubic": 3}[contract.interpolation],
        "image_mean": list(contract.mean),
        "image_std": list(contract.std),
    }


def _training_images(data: Mapping[str, Any], recipe: Recipe) -> list[Image.Image]:
    try:
        train, _ = open_training_data(
            data["root"], val_fraction=recipe.val_fraction, seed=recipe.seed, parts=recipe.parts
        )
    except (DataError, HubError) as exc:
        raise DataError(f"int8 needs real images: {exc}; pass --calibration FOLDER or --no-int8") from exc
    if train.fingerprint != data["fingerprint"]:
        raise DataError(f"{data['root']}: has changed since training; pass --calibration FOLDER or --no-int8")
    order = np.random.default_rng(0).permutation(len(train))
    images: list[Image.Image] = []
    for index in order[: 2 * CALIBRATION_IMAGES]:
        if len(images) == CALIBRATION_IMAGES:
            break
        try:
            images.append(train.image(int(index)))
        except DecodeError:
            continue
    return images


def folder_images(folder: str | Path) -> list[Image.Image]:
    """The first images of a folder that can be decoded, for calibration.

    Raises:
        DataError: there is none.
    """
    images = []
    with list_inputs([folder]) as listed:
        for image in listed:
            try:
                images.append(decode(image.read()))
            except (DecodeError, OSError):
                continue
            if len(images) == CALIBRATION_IMAGES:
                break
    if not images:
        raise DataError(f"--calibration {folder}: none of its images can be decoded")
    return images


def _versions() -> dict[str, str]:
    return {
        "robustfeat": robustfeat.__version__,
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
