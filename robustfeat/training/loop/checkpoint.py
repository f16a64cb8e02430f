"""Checkpoints: everything that an exact resume needs, in one file that appears whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustfeat.errors import CheckpointError, InputError, first_line
from robustfeat.files import new_file
from robustfeat.training.concepts import ConceptMap
from robustfeat.training.data.batches import explain_worker
from robustfeat.training.loop.run_folder import CHECKPOINT_NAME, checkpoint_file
from robustfeat.training.network import build_network, timm_settings
from robustfeat.training.recipe import Recipe
from robustfeat.training.tensors import load_tensors

__all__ = [
    "Checkpoint",
    "Position",
    "changed_key",
    "features_of",
    "fitting",
    "load_checkpoint",
    "network_of",
    "require_same_concepts",
    "require_same_recipe",
    "save_checkpoint",
]

_FORMAT_VERSION = 1


@dataclass(frozen=True)
class Position:
    """The position of a run, between two steps.

    Attributes:
        epoch, step: the next step to make: `step` within `epoch`, both counted from 0.
        global_step: steps made so far.
    """

    epoch: int = 0
    step: int = 0
    global_step: int = 0

    def after_step(self) -> Position:
        """One step later, in the same epoch."""
        return Position(self.epoch, self.step + 1, self.global_step + 1)

    def after_epoch(self) -> Position:
        """At the first step of the next epoch."""
        return Position(self.epoch + 1, 0, self.global_step)


@dataclass(frozen=True)
class Checkpoint:
    """A run at the end of a step.

    Attributes:
        recipe: the recipe, from `Recipe.to_dict`.
        data: the training data, `root`, `fingerprint`, `images` and `validation_images`, and the number of `ranks`.
        classes: the C class names.
        concepts: the K concept names.
        concept_of_class: C numbers.
        epoch, step, global_step: see `Position`.
        model, optimizer, objective, scaler: their state dicts (the scaler's is empty but for fp16).
        average: the state of `MovingAverage`, if the recipe has `ema`.
        heads: the state dict of the objective's own modules; most objectives have none.
        start: the state dict of the network before training, where its features are learned (`stable_anchor`).
        bad_images: for `training`, `validation` and `probe`, those that could not be decoded so far.
        clusters: `centres` and `of_image` of `Clusters`, where they are the concepts.
        best: `epoch` and `score` of best.pt, where there is one.
    """

    recipe: dict[str, Any]
    data: dict[str, Any]
    classes: list[str]
    concepts: list[str]
    concept_of_class: list[int]
    epoch: int
    step: int
    global_step: int
    model: dict[str, Any]
    optimizer: dict[str, Any]
    objective: dict[str, Any]
    scaler: dict[str, Any] = field(default_factory=dict)
    heads: dict[str, Any] = field(default_factory=dict)
    bad_images: dict[str, list[str]] = field(default_factory=dict)
    clusters: dict[str, Any] = field(default_factory=dict)
    start: dict[str, Any] = field(default_factory=dict)
    average: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)

    @property
    def result(self) -> dict[str, Any]:
        """The state dict of the network that the run gives away: the averaged weights, where there are some."""
        return self.average["model"] if self.average else self.model

    @property
    def position(self) -> Position:
        """The position of the run."""
        return Position(self.epoch, self.step, self.global_step)


def save_checkpoint(checkpoint: Checkpoint, run: Path, name: str = CHECKPOINT_NAME) -> None:
    """Replaces the run's checkpoint of this name. The old one stays intact until the new one is complete."""
    file = run / name
    try:
        with new_file(file) as partial:
            try:
                # Not asdict(): it would copy every tensor.
                state = {item.name: getattr(checkpoint, item.name) for item in fields(checkpoint)}
                torch.save({"format_version": _FORMAT_VERSION, **state}, partial)
            except RuntimeError as exc:  # torch's writer reports a full disk so
                explained = explain_worker(exc)
                raise OSError(first_line(exc)) if explained is exc else explained from exc
    except InputError as exc:
        if not file.exists():
            raise
        raise InputError(
            exc.what, fix="free space, then pass `resume=True` to resume from the checkpoint before"
        ) from exc


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint file, or the one in a run's folder. Nothing in the file is executed.

    Raises:
        CheckpointError: it is missing, damaged, or of another version.
    """
    file = checkpoint_file(path)
    try:
        state = load_tensors(file)
    except Exception as exc:  # what the restricted unpickler raises on damaged files has no common base
        raise CheckpointError(
            f"{file}: damaged or not a checkpoint of robustfeat train", fix="train again or use another"
        ) from exc
    if not isinstance(state, dict) or "format_version" not in state:
        raise CheckpointError(f"{file}: not a checkpoint of robustfeat train; expected one written by it")
    version = state.pop("format_version")
    names = {item.name for item in fields(Checkpoint)}
    needed = {item.name for item in fields(Checkpoint) if item.default_factory is MISSING}
    if version != _FORMAT_VERSION or not needed <= set(state) <= names:
        raise CheckpointError(
            f"{file}: format_version {version}; this robustfeat reads {_FORMAT_VERSION}", fix="upgrade robustfeat"
        )
    try:
        _require_fields(state)
    except ValueError as exc:
        raise CheckpointError(f"{file}: damaged ({exc})", fix="train again or use another") from exc
    return Checkpoint(**state)


def features_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The state dict that the run gives away: without a classifier where the features themselves have none."""
    recipe = Recipe.from_dict(checkpoint.recipe)
    if recipe.classifies:
        return checkpoint.result
    with fitting():
        prefix = timm_settings(_build(checkpoint, recipe))["classifier"] + "."
    return {name: value for name, value in checkpoint.result.items() if not name.startswith(prefix)}


def _build(checkpoint: Checkpoint, recipe: Recipe) -> nn.Module:
    return build_network(len(checkpoint.classes), recipe.network, width=recipe.width, image_size=recipe.validation_size)


def network_of(checkpoint: Checkpoint) -> nn.Module:
    """The trained network with its classifier, averaged where the recipe has `ema`, in evaluation mode.

    Raises:
        CheckpointError: the weights do not belong to such a network.
    """
    recipe = Recipe.from_dict(checkpoint.recipe)
    with fitting():
        network = _build(checkpoint, recipe)
        network.load_state_dict(checkpoint.result)
    return network.eval()


@contextmanager
def fitting() -> Iterator[None]:
    """State that PyTorch's objects do not take, in whatever way, is a damaged checkpoint's.

    Raises:
        CheckpointError: the block failed.
    """
    try:
        yield
    except Exception as exc:
        raise CheckpointError(
            f"the checkpoint's state does not fit its network ({first_line(exc)})", fix="train again or use another"
        ) from exc


_KINDS: dict[str, type] = {"dict": dict, "list": list, "int": int}
_DATA_KINDS: dict[str, type] = {"root": str, "fingerprint": str, "images": int}


def _require_fields(state: Mapping[str, Any]) -> None:
    """The fields of a checkpoint are what `Checkpoint` says.

    Raises:
        ValueError: naming one that is not.
    """
    for item in fields(Checkpoint):
        kind: Any = _KINDS[str(item.type).partition("[")[0]]
        value: Any = state.get(item.name, kind())
        if type(value) is not kind and not (kind is dict and isinstance(value, dict)):
            raise ValueError(f"{item.name} must be {item.type}; got {value!r:.60}")
        if kind is int and value < 0:
            raise ValueError(f"{item.name} must be 0 or more; got {value}")
    classes, concepts, numbers = state["classes"], state["concepts"], state["concept_of_class"]
    if not all(isinstance(name, str) for name in (*classes, *concepts, *state["recipe"])):
        raise ValueError("classes, concepts and the recipe's keys must be text")
    if len(numbers) != len(classes) or not all(type(at) is int and 0 <= at < len(concepts) for at in numbers):
        raise ValueError("concept_of_class must give each class the number of a concept")
    if state.get("average") and not isinstance(state["average"].get("model"), dict):
        raise ValueError("average must hold a model")
    if set(state.get("best", ())) not in (set(), {"epoch", "score"}):
        raise ValueError(f"best must hold epoch and score; got {state['best']!r:.60}")
    for name, kind in _DATA_KINDS.items():
        if type(state["data"].get(name)) is not kind:
            raise ValueError(f"data must hold {', '.join(_DATA_KINDS)}; got {name} = {state['data'].get(name)!r:.60}")


def changed_key(saved: Checkpoint, recipe: Recipe) -> tuple[str, Any, Any] | None:
    """The first key in which a run's recipe is another than this one: its name, then and now."""
    # Through a recipe: a key that is newer than the checkpoint has its default there.
    then, now = Recipe.from_dict(saved.recipe).to_dict(), recipe.to_dict()
    may_move = set[str]()
    if not any(str(recipe["concepts"]).startswith("clusters:") for recipe in (then, now)):
        may_move.add("concepts")  # a file whose content is compared apart
    if then["teacher"] and now["teacher"]:
        may_move.add("teacher")  # its hash is another key
    changed = (name for name in now if then[name] != now[name] and name not in may_move)
    return next(((name, then[name], now[name]) for name in changed), None)


def require_same_recipe(saved: Checkpoint, run: Path, recipe: Recipe, data: Mapping[str, Any]) -> None:
    """Refuses to resume a run with another recipe or other images.

    Raises:
        CheckpointError: naming the first difference.
    """
    if recipe.probe and saved.data.get("probe") == data.get("probe"):
        recipe = recipe.replace(probe=saved.recipe["probe"])  # the same images in another place
    if change := changed_key(saved, recipe):
        name, then, now = change
        raise CheckpointError(
            f"{run}: was trained with {name} = {then}, now it is {now}",
            fix="resume with the same options or choose another `out`",
        )
    if saved.data["fingerprint"] != data["fingerprint"]:
        raise _other_data(saved, run)
    if saved.data.get("probe") != data.get("probe"):
        raise CheckpointError(
            f"{run}: was probed with other images", fix="resume with the same or choose another `out`"
        )


def require_same_concepts(saved: Checkpoint, run: Path, concepts: ConceptMap) -> None:
    """Refuses to resume a run with other concepts.

    Raises:
        CheckpointError: they are others.
    """
    if saved.concept_of_class != concepts.of_class.tolist() or saved.concepts != list(concepts.names):
        raise _other_data(saved, run)


def _other_data(saved: Checkpoint, run: Path) -> CheckpointError:
    return CheckpointError(
        f"{run}: was trained on other data ({saved.data['images']:,} images of {saved.data['root']}) or concepts",
        fix="resume with the same or choose another `out`",
    )
