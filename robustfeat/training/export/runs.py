"""Model folders from training runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from robustfeat.errors import ExportError, InputError
from robustfeat.hub.config import Evaluation, ModelConfig
from robustfeat.progress import remark
from robustfeat.training.export.calibration import folder_images, training_images
from robustfeat.training.export.folder import Backbone, ExportReport, write_model_folder
from robustfeat.training.export.principal import project_features
from robustfeat.training.export.provenance import versions
from robustfeat.training.loop.checkpoint import Checkpoint, features_of, load_checkpoint, network_of
from robustfeat.training.loop.journal import read_metrics
from robustfeat.training.loop.run_folder import BEST_NAME, CHECKPOINT_NAME, checkpoint_file
from robustfeat.training.network import feature_network, feature_size, timm_settings
from robustfeat.training.recipe import Recipe

__all__ = ["export_run"]

_COMPONENT_IMAGES = 4096
"""Images that principal components are measured on, at most."""


def export_run(
    run: str | Path,
    out: str | Path,
    *,
    name: str | None = None,
    image_size: int | None = None,
    crop_pct: float | None = None,
    components: int | None = None,
    calibration: str | Path | None = None,
    int8: bool = True,
    compact: bool = False,
    best: bool = False,
    results: Mapping[str, Any] | None = None,
    evaluations: Sequence[Evaluation] = (),
    terms: str | None = None,
    license_id: str | None = None,
    datasets: Sequence[str] = (),
    quiet: bool = True,
) -> ExportReport:
    """The model folder of a run of `robustfeat train`.

    Args:
        run: the run's folder, or its checkpoint.pt or best.pt.
        out: the folder to make.
        name: the model's name, with its version; by default the run folder's name.
        image_size, crop_pct: settings of the preprocessing contract; by default the recipe's validation size and crop.
        components: the model gives so many principal components of the network's features, measured on the run's own
            training images; by default the features themselves.
        calibration: a folder of images for int8; by default the run's own training images.
        int8: also write onnx/model_int8.onnx.
        compact: weights once, in fp16, shared by model.safetensors and model.onnx.
        best: use best.pt of a folder instead of checkpoint.pt. The run may still be active.
        results: measured results for the card.
        evaluations: measured numbers for the Hub's lists.
        terms: under which terms the weights may be used, for the card.
        license_id: the Hub's name of a license; by default the card says `other` and refers to the terms.
        datasets: the Hub's names of the datasets that it was trained on.
        quiet: say nothing of the steps on stderr.

    Raises:
        CheckpointError, DataError: the run or the calibration images cannot be used.
        ExportError: a file disagrees with PyTorch; nothing is left behind.
    """
    run = Path(run)
    folder = run if run.is_dir() else run.parent
    file = checkpoint_file(run, BEST_NAME if best else CHECKPOINT_NAME)
    checkpoint = load_checkpoint(file)
    recipe = Recipe.from_dict(checkpoint.recipe)
    best = file.name == BEST_NAME
    if not best:
        _require_finished(run, checkpoint, recipe)
    try:
        contract = recipe.preprocessing(image_size, crop_pct)
    except ValueError as exc:
        raise InputError(f"{run}: {exc}") from exc
    network = network_of(checkpoint)
    size, about = feature_size(network), timm_settings(network)
    _require_fewer(components, size)
    _require_own_size(recipe, contract.image_size, fixed=about.get("fixed_input_size", False))
    config = ModelConfig(
        name=name or folder.resolve().name,
        feature_size=size,
        num_classes=len(checkpoint.classes) if recipe.classifies else 0,
        preprocessing=contract,
        **about,
        concepts=tuple(checkpoint.concepts),
        recipe=_published(checkpoint.recipe),
        provenance=_provenance(checkpoint, terms, license_id, datasets, best=best),
        results=dict(results or {}),
        evaluations=tuple(evaluations),
    )
    training = _history(checkpoint, config, folder)
    known = partial(training_images, checkpoint.data, recipe, contract)
    images = (folder_images(calibration, contract) if calibration else known()) if int8 else None
    if components is None:
        backbone = Backbone(feature_network(network), features_of(checkpoint), config, training)
    else:
        remark(f"{config.name}: measures {components} principal components", quiet=quiet)
        backbone = _components(checkpoint, network, config, training, components)
    return write_model_folder(backbone, out, calibration=images, compact=compact, quiet=quiet)


def _require_finished(run: Path, checkpoint: Checkpoint, recipe: Recipe) -> None:
    if checkpoint.epoch < recipe.epochs:
        raise ExportError(
            f"{run}: training stands at epoch {checkpoint.epoch} of {recipe.epochs}",
            fix="finish it with `robustfeat train --resume`",
        )


def _require_fewer(components: int | None, size: int) -> None:
    if components is not None and not 0 < components < size:
        raise InputError(
            f"must be at least 1 and less than the network's {size} features", argument="components", value=components
        )


def _components(
    checkpoint: Checkpoint, network: nn.Module, config: ModelConfig, training: Mapping[str, Any], size: int
) -> Backbone:
    """The network with principal components as features, and the classifier of these."""
    recipe = Recipe.from_dict(checkpoint.recipe)
    measured = training_images(checkpoint.data, recipe, config.preprocessing, count=_COMPONENT_IMAGES)
    classifier = project_features(network, measured, config.preprocessing, size)
    made = config.replace(feature_size=size, num_classes=size, components_of=config.feature_size)
    return Backbone(network, network.state_dict(), made, training, classifier if recipe.classifies else None)


def _require_own_size(recipe: Recipe, image_size: int, *, fixed: bool) -> None:
    if fixed and image_size != recipe.validation_size:
        raise InputError(
            f"its network takes images of {recipe.validation_size} px only", argument="image_size", value=image_size
        )


def _published(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe for a published folder, without paths of this machine."""
    return {
        key: Path(value).name if key in {"concepts", "init", "teacher", "probe"} and isinstance(value, str) else value
        for key, value in recipe.items()
    }


def _history(checkpoint: Checkpoint, config: ModelConfig, run: Path) -> dict[str, Any]:
    """How the model came about, for training.json."""
    return {
        "recipe": config.recipe,
        "classes": checkpoint.classes,
        "concepts": checkpoint.concepts,
        "concept_of_class": checkpoint.concept_of_class,
        "data": config.provenance["data"],
        "versions": versions("torch"),
        "metrics": read_metrics(run),
    }


def _provenance(
    checkpoint: Checkpoint, terms: str | None, license_id: str | None, datasets: Sequence[str], *, best: bool
) -> dict[str, Any]:
    return {
        "source": "robustfeat train",
        **({"epoch": checkpoint.epoch} if best else {}),
        "data": {key: value for key, value in checkpoint.data.items() if key != "root"},
        "terms": terms or "those of the training images",
        **({"license": license_id} if license_id else {}),
        **({"datasets": list(datasets)} if datasets else {}),
        "versions": versions("torch"),
    }
