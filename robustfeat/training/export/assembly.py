"""Model folders around a network's files: golden images, int8 and config, each file checked. Loads no PyTorch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from robustfeat.errors import EngineError, ExportError, ModelFolderError
from robustfeat.files import new_folder
from robustfeat.hub.card import render_card
from robustfeat.hub.config import ModelConfig
from robustfeat.hub.folder import (
    COMPACT_ONNX,
    GOLDEN_FEATURES,
    ONNX,
    PREPROCESSOR,
    TRAINING,
    WEIGHTS,
    ModelFolder,
    seal_folder,
)
from robustfeat.hub.preprocessing import INTERPOLATIONS, Preprocessing, decode, preprocess
from robustfeat.progress import remark
from robustfeat.serving.engines.options import AUTO, ENGINES, RunOptions
from robustfeat.serving.extractor import FeatureExtractor
from robustfeat.serving.verify import Check, check_golden
from robustfeat.training.export.compact import compact_onnx
from robustfeat.training.export.int8.quantise import Golden, Int8UnfitError, quantize_onnx

__all__ = ["ExportReport", "FolderParts", "assemble_folder", "golden_images"]


@dataclass(frozen=True)
class FolderParts:
    """The parts of a model folder.

    Attributes:
        config: without `files`.
        write: writes the weights (if there are any) and onnx/model.onnx into a folder, and gives the features of the
            golden images, (n, 3, S, S) float32 to (n, D) float32, that the folder must give.
        reference: what computed these features, for messages.
        training: the content of training.json.
        preprocessor: the content of preprocessor_config.json; by default made from the contract.
        engines: those that must agree with the reference where they are installed.
    """

    config: ModelConfig
    write: Callable[[Path, NDArray[np.float32]], NDArray[np.float32]]
    reference: str = "PyTorch"
    training: Mapping[str, Any] = field(default_factory=dict)
    preprocessor: Mapping[str, Any] | None = None
    engines: tuple[str, ...] = (AUTO,)


@dataclass(frozen=True)
class ExportReport:
    """A folder that was accepted.

    Attributes:
        folder: the result.
        cosines: precision to the smallest cosine against the reference's features of the golden images.
        reference: what computed them.
    """

    folder: ModelFolder
    cosines: dict[str, float]
    reference: str = "PyTorch"


def assemble_folder(
    parts: FolderParts,
    out: str | Path,
    *,
    calibration: Sequence[NDArray[np.uint8]] | None,
    compact: bool = False,
    quiet: bool = True,
) -> ExportReport:
    """Writes the folder, checks it and only then gives it its name.

    Args:
        parts: the network.
        out: the folder to make.
        calibration: squares (S, S, 3) for int8, besides the golden images; None leaves int8 out. A network whose
            features int8 changes too much gets no int8 file, which a line on stderr says.
        compact: model.onnx keeps its weights in model.safetensors.
        quiet: say nothing of the steps on stderr.

    Raises:
        ExportError: a file disagrees with the reference; nothing is left behind.
    """
    config, contract = parts.config, parts.config.preprocessing
    with new_folder(out) as path:
        golden = _write_golden(path, contract)
        inputs = preprocess(golden, contract)
        expected = parts.write(path, inputs)
        if expected.shape != (len(golden), config.feature_size) or not np.isfinite(expected).all():
            raise ExportError(
                f"{config.name}: {parts.reference} gives {expected.shape} features or values that are not finite"
            )
        if not expected.any(axis=1).all():
            raise ExportError(
                f"{config.name}: {parts.reference} gives nothing but zeros for a photograph", fix="check the weights"
            )
        np.save(path / GOLDEN_FEATURES, expected)
        single = path / ONNX["fp32"]
        if calibration is not None:
            said = f"writes {ONNX['int8']}, with the ranges of {len(calibration) + len(golden)} images"
            remark(f"{config.name}: {said}", quiet=quiet)
            config = _write_int8(config, path, Golden(inputs, expected), calibration, quiet=quiet)
        if compact:
            compact_onnx(single, path / WEIGHTS, path / COMPACT_ONNX)
            single.unlink()
            if not any(single.parent.iterdir()):
                single.parent.rmdir()

        about = _preprocessor_config(contract) if parts.preprocessor is None else dict(parts.preprocessor)
        (path / PREPROCESSOR).write_text(json.dumps(about, indent=2) + "\n")
        training = json.dumps(dict(parts.training), ensure_ascii=False)
        (path / TRAINING).write_text(training + "\n", "utf-8")
        folder = seal_folder(path, config, render_card(config))
        remark(f"{config.name}: the golden images go through {', '.join(folder.precisions)} ONNX", quiet=quiet)
        cosines = _check(folder, parts)
    return ExportReport(ModelFolder(out), cosines, parts.reference)


def _write_int8(
    config: ModelConfig, path: Path, golden: Golden, calibration: Sequence[NDArray[np.uint8]], *, quiet: bool
) -> ModelConfig:
    """Adds the int8 facts to the config. If there is no int8 file, it prints a remark and changes nothing."""
    try:
        shares = quantize_onnx(
            path / ONNX["fp32"], golden, calibration, config.preprocessing, path / ONNX["int8"], quiet=quiet
        )
    except Int8UnfitError as exc:
        remark(f"{config.name}: the folder gets no int8 file, {exc}")
        return config
    return config.replace(int8=shares.to_dict())


def _check(folder: ModelFolder, parts: FolderParts) -> dict[str, float]:
    """The smallest cosine of each precision over the engines that can run it."""
    cosines: dict[str, float] = {}
    for engine in parts.engines:
        for precision in folder.precisions:
            check = _check_way(folder, RunOptions(precision, engine, "cpu"))
            if check is None or check.cosine is None:
                continue
            cosines[precision] = min(check.cosine, cosines.get(precision, 1.0))
            if check.short:
                raise _disagreement(folder.config.name, check, parts.reference)
    return cosines


def _check_way(folder: ModelFolder, options: RunOptions) -> Check | None:
    """None where a further engine is not installed, or cannot load the network, which is said."""
    try:
        return check_golden(FeatureExtractor.open(folder, options))
    except (EngineError, ModelFolderError) as exc:
        if options.engine in {AUTO, ENGINES[0]}:
            raise
        if isinstance(exc, ModelFolderError):
            remark(f"{folder.config.name}: {options.engine} cannot run its {options.precision} file ({exc.what})")
        return None


def _disagreement(name: str, check: Check, reference: str) -> ExportError:
    fix = "report this network"
    if check.precision == "int8":
        fix = "pass `int8=False` or more images as `calibration`"
    return ExportError(
        f"{name}: {check.precision} ONNX disagrees with {reference} in {check.engine} (cosine {check.cosine:.5f} on a "
        f"golden image, {check.needed} needed); nothing was written",
        fix=fix,
    )


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
