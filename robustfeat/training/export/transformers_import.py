"""Model folders from models of transformers, through PyTorch."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from numpy.typing import NDArray
from PIL import Image

from robustfeat.errors import ExportError, first_line
from robustfeat.hub.config import CODE_ENTRIES, ModelConfig
from robustfeat.hub.folder import CONFIG, ONNX, PREPROCESSOR, WEIGHTS
from robustfeat.hub.image_processor import read_image_processor
from robustfeat.hub.preprocessing import Preprocessing, decode
from robustfeat.progress import remark
from robustfeat.training.export.assembly import ExportReport, FolderParts, assemble_folder, golden_images
from robustfeat.training.export.calibration import import_images
from robustfeat.training.export.onnx_files import export_onnx, require_onnx_size
from robustfeat.training.export.provenance import imported
from robustfeat.training.export.repository import Repository
from robustfeat.training.export.transformers_models import (
    build_model,
    choose_features,
    read_weights,
    silent_transformers,
    torch_features,
)

__all__ = ["import_transformers"]

_MEAN_LEVELS, _MOST_LEVELS = 0.5, 4.0
"""Allowed of 255: our crop is resized without the rest of the image, and some classes resize with torchvision."""


def import_transformers(
    repository: Repository,
    out: str | Path,
    *,
    pooling: str | None = None,
    name: str | None = None,
    calibration: str | Path | None = None,
    int8: bool = True,
    terms: str | None = None,
    license_id: str | None = None,
    quiet: bool = True,
) -> ExportReport:
    """Makes a model folder of a vision model of transformers. The golden features are PyTorch's.

    The folder also loads in transformers: config.json keeps its entries, model.safetensors its names.

    Args:
        repository: the repository of the model.
        out: the folder to make.
        pooling: a way of `hub.outputs.POOLED`; by default the usual one for the model type.
        name: the model's name; by default the repository's.
        calibration: a folder of images for int8; besides the golden images.
        int8: also write onnx/model_int8.onnx.
        terms: under which terms the weights may be used, for the card.
        license_id: the Hub's name of a license; by default from the model's card.
        quiet: say nothing of the steps on stderr.

    Raises:
        InputError, EngineError: the model or its weights cannot be used.
        ModelFolderError: its image processor cannot be a preprocessing contract.
        ExportError: a file disagrees with PyTorch, or our preprocessing with its image processor; nothing is left.
    """
    source = repository.source
    processor = {key: value for key, value in (repository.processor or {}).items() if key not in CODE_ENTRIES}
    contract = read_image_processor(repository.processor or {}, repository.config, f"{source}: {PREPROCESSOR}")
    model = build_model(repository.config, read_weights(repository.weight_files(), source), source)
    network = choose_features(model, contract.image_size, pooling, source)
    require_onnx_size(network, source)
    side = contract.image_size
    (vector,) = torch_features(network, np.zeros((1, 3, side, side), np.float32))
    license_id = license_id or (None if terms else repository.license())
    config = ModelConfig(
        name=name or repository.label,
        architecture=f"transformers:{model.class_name}",
        feature_size=len(vector),
        num_classes=0,
        preprocessing=contract,
        first_conv="",
        classifier="",
        transformers=model.config,
        pooling=network.pooling.name or "",
        provenance=imported(
            f"{repository.origin}, {model.class_name}, pooling {network.pooling.name}",
            {"revision": repository.commit},
            terms=terms,
            license_id=license_id,
            libraries=("transformers", "torch"),
        ),
    )

    def write(path: Path, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        remark(f"{config.name}: writing {WEIGHTS}; PyTorch embeds the golden images", quiet=quiet)
        model.save(path / WEIGHTS)
        expected = torch_features(network, inputs)
        _check_processor(repository, processor, contract, inputs)
        remark(f"{config.name}: writes {ONNX['fp32']}", quiet=quiet)
        export_onnx(network, contract, path / ONNX["fp32"])
        return expected

    images = import_images(calibration, contract, int8=int8)
    parts = FolderParts(config, write, preprocessor=processor)
    return assemble_folder(parts, out, calibration=images, quiet=quiet)


def _check_processor(
    repository: Repository, processor: Mapping[str, Any], contract: Preprocessing, inputs: NDArray[np.float32]
) -> None:
    """Compares golden images prepared by our contract, (n, 3, S, S), with the image processor's result.

    Pixels are compared, since what a difference of one level does depends on the network.

    Raises:
        ExportError: they differ by more than rounding.
    """
    images = [decode(data, version=contract.version) for _, data in golden_images()]
    try:
        theirs = _transformers_inputs(processor, repository.config, images)
    except Exception as exc:  # the library's errors share no base class
        raise ExportError(
            f"{repository.source}: its image processor fails in transformers ({first_line(exc)[:300]})"
        ) from exc
    if theirs.shape != inputs.shape:
        found = f"images of shape {theirs.shape[1:]}, not {inputs.shape[1:]}"
    else:
        levels = np.abs(theirs - inputs) * np.asarray(contract.std, np.float32)[:, None, None] * 255
        if levels.mean((1, 2, 3)).max() <= _MEAN_LEVELS and levels.max() <= _MOST_LEVELS:
            return
        found = f"other pixels (by {levels.max():.0f} of 255 levels)"
    raise ExportError(
        f"{repository.source}: its image processor gives {found} in transformers; nothing was written",
        fix="report this model",
    )


def _transformers_inputs(
    processor: Mapping[str, Any], config: Mapping[str, Any], images: list[Image.Image]
) -> NDArray[np.float32]:
    """Prepares RGB images by the image processor with Pillow, (n, 3, S, S)."""
    with tempfile.TemporaryDirectory() as scratch:  # nothing else of the repository
        kept = {key: value for key, value in config.items() if key != "auto_map"}
        Path(scratch, CONFIG).write_text(json.dumps(kept), "utf-8")
        Path(scratch, PREPROCESSOR).write_text(json.dumps(dict(processor)), "utf-8")
        library: Any = transformers.AutoImageProcessor
        with silent_transformers():
            loaded = library.from_pretrained(scratch, backend="pil", trust_remote_code=False, local_files_only=True)
    values: NDArray[np.float32] = loaded(images, return_tensors="np")["pixel_values"]
    return np.asarray(values, np.float32)
