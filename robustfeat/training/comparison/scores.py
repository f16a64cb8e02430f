"""Accuracies of runs, read from a run's folder, from results of `evaluate`, or from cells of `paper`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.errors import CheckpointError, InputError
from robustfeat.training.evaluation.answers import unpack
from robustfeat.training.loop.run_folder import CHECKPOINT_NAME
from robustfeat.training.recipe import Recipe

__all__ = ["RunScore", "read_scores"]


@dataclass(frozen=True, eq=False)
class RunScore:
    """The accuracy of one training run on one task.

    Attributes:
        source: the file, and the model in it.
        name: what the user calls its method; None for the method of the recipe.
        settings: the recipe without its seed, and `data`, the fingerprint of the training images. For models without
            a recipe only `method`, their name.
        seed: of the run, where known.
        task: on what it was scored.
        images: which test images these were, where known.
        accuracy: share of the test images.
        right: (m,) bool, which test images were told, where that was kept.
        training_accuracy, validation_accuracy: see `final_accuracies`, where known.
    """

    source: str
    name: str | None
    settings: Mapping[str, Any]
    seed: int | None
    task: str
    images: str | None
    accuracy: float
    right: NDArray[np.bool_] | None = None
    training_accuracy: float | None = None
    validation_accuracy: float | None = None


def read_scores(places: Sequence[str]) -> list[RunScore]:
    """The scores in all places, each PATH or NAME=PATH with a name for their method.

    Args:
        places: of runs of `robustfeat train`, of files that `evaluate` wrote, or of `svm` cells of `paper`.

    Raises:
        InputError, CheckpointError: one is missing, unfinished, or holds something else.
    """
    return [score for place in places for score in _read(place)]


def _read(place: str) -> list[RunScore]:
    name, equals, path = place.partition("=")
    if not equals or Path(place).exists():
        name, path = "", place
    file = Path(path)
    if equals and name == "" and not Path(place).exists():
        raise InputError(f"{place}: expected NAME=RUN, such as mine=runs/a")
    label = name.strip() or None
    if (file / CHECKPOINT_NAME).is_file() or file.suffix == ".pt":
        return [_of_run(file, label)]
    if not file.is_file():
        what = f"{path}: expected a run of robustfeat train, or a JSON file of evaluate's results"
        raise InputError(f"{what}; got {'a folder without checkpoint' if file.is_dir() else 'nothing'}")
    try:
        content = json.loads(file.read_text("utf-8"))
        if isinstance(content, dict):
            return [_of_cell(file, content, label)]
        return [_of_result(file, result, label) for result in content]
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        reason = f"{type(exc).__name__}: {exc}"
        raise InputError(
            f"{path}: expected results of evaluate, or an svm cell of paper; got something else ({reason})",
            fix="write them with `robustfeat evaluate RUN --task NAME=DATA --out FILE`",
        ) from exc


def _of_run(path: Path, name: str | None) -> RunScore:
    """The validation accuracy of a run itself; which images it told is not kept."""
    from robustfeat.training.loop.checkpoint import load_checkpoint  # imports torch
    from robustfeat.training.loop.journal import final_accuracies

    checkpoint = load_checkpoint(path)
    _require_finished(str(path), checkpoint.epoch, checkpoint.recipe)
    accuracies = final_accuracies(path if path.is_dir() else path.parent)
    if "validation_accuracy" not in accuracies:
        raise CheckpointError(
            f"{path}: its metrics have no validation accuracy", fix="score the run with `robustfeat evaluate`"
        )
    data = checkpoint.data
    return RunScore(
        str(path),
        name,
        *_split(checkpoint.recipe, data["fingerprint"]),
        task=f"validation of {Path(data['root']).name or data['root']}",
        images=f"{data['validation_images']} validation images",
        accuracy=accuracies["validation_accuracy"],
        training_accuracy=accuracies.get("training_accuracy"),
        validation_accuracy=accuracies["validation_accuracy"],
    )


def _of_result(file: Path, result: Mapping[str, Any], name: str | None) -> RunScore:
    """One result of `evaluate_task`."""
    source, training = f"{file}: {result['model']}", result.get("training") or {}
    recipe, answers = training.get("recipe"), result.get("answers") or {}
    settings: Mapping[str, Any] = {"method": result["model"]}
    seed = None
    if recipe:
        _require_finished(source, training.get("epoch"), recipe)
        settings, seed = _split(recipe, training.get("data"))
    return RunScore(
        source,
        name,
        settings,
        seed,
        task=result["task"],
        images=answers.get("images"),
        accuracy=float(result["svm"]["accuracy"]),
        right=unpack(answers["svm"]) if answers else None,
        training_accuracy=training.get("training_accuracy"),
        validation_accuracy=training.get("validation_accuracy"),
    )


def _of_cell(file: Path, cell: Mapping[str, Any], name: str | None) -> RunScore:
    """A cell of `paper`, whose file is called svm-TASK-RUN.json."""
    values, inputs = cell["values"], cell["inputs"]
    data = hashlib.sha256(json.dumps(inputs["data"], sort_keys=True).encode()).hexdigest()
    task = file.stem.removeprefix("svm-").removesuffix(f"-{values['run']}")
    return RunScore(
        str(file),
        name,
        *_split(inputs["recipe"], data),
        task=task,
        images=json.dumps(inputs["task"][2:]),
        accuracy=float(values["accuracy"]),
        right=unpack(values["right"]),
        training_accuracy=values.get("training_accuracy"),
        validation_accuracy=values.get("validation_accuracy"),
    )


def _split(recipe: Mapping[str, Any], data: str | None) -> tuple[dict[str, Any], int]:
    """What runs of other seeds share, and the seed. Keys that are newer than the run have their defaults."""
    try:
        known = Recipe.from_dict(recipe).to_dict()
    except InputError:  # of a newer version
        known = dict(recipe)
    seed = int(known.pop("seed"))
    return {**known, "data": data}, seed


def _require_finished(source: str, epoch: int | None, recipe: Mapping[str, Any]) -> None:
    if epoch is not None and epoch < recipe["epochs"]:
        raise InputError(
            f"{source}: is at epoch {epoch} of {recipe['epochs']}; runs must be finished",
            fix="resume the training, or leave the run out",
        )
