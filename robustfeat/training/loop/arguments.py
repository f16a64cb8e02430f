"""Checks the arguments of `train` before slow work. Loads no PyTorch."""

from __future__ import annotations

from pathlib import Path

from robustfeat.errors import InputError, ModelFolderError
from robustfeat.hub.catalog import resolve_model
from robustfeat.training.concepts import cluster_count, load_concepts
from robustfeat.training.data.hub_dataset import is_hub_dataset
from robustfeat.training.data.opening import are_folders_of_images, require_place
from robustfeat.training.evaluation.arguments import require_task
from robustfeat.training.loop.ranks import Ranks
from robustfeat.training.loop.run_folder import checkpoint_file, require_unused
from robustfeat.training.methods import require_method
from robustfeat.training.recipe import Recipe

__all__ = ["check_arguments"]


def check_arguments(
    data: str | Path,
    recipe: Recipe,
    out: Path,
    ranks: Ranks,
    *,
    resume: bool,
    cache: str,
    stream: bool,
    checkpoint_every_s: float,
) -> None:
    """Refuses arguments of `train` that cannot be used, whatever the data holds.

    Args:
        ranks: this process among those that train together.

    Raises:
        InputError, DataError, CheckpointError: naming the argument.
    """
    _check_numbers(recipe, ranks, checkpoint_every_s)
    if cache != "auto" and not recipe.cache_px:
        raise InputError(
            "caches squares of `cache_px`, which is 0", argument="cache", value=cache, fix="pass both or neither"
        )
    if cache == "device" and recipe.augments:
        raise InputError(
            "keeps images where nothing augments them",
            argument="cache",
            value=cache,
            fix="pass `cache=ram` or a folder",
        )
    require_method(recipe.method)
    if recipe.concepts != "classes" and not cluster_count(recipe.concepts):
        load_concepts(recipe.concepts)
    if recipe.init and not resume and not Path(recipe.init).exists():
        _require_model(recipe.init, "init")
    if recipe.teacher:
        _require_model(recipe.teacher, "teacher")
    if recipe.probe:
        require_task("probe", recipe.probe)
    _check_places(data, out, resume=resume, stream=stream, labels=recipe.labels)


def _require_model(name: str, argument: str) -> None:
    try:
        resolve_model(name)
    except ModelFolderError as exc:
        raise InputError(exc.what, argument=argument, value=name, fix=exc.fix) from exc


def _check_numbers(recipe: Recipe, ranks: Ranks, checkpoint_every_s: float) -> None:
    if not checkpoint_every_s >= 0:
        raise InputError("expected seconds, 0 or more", argument="checkpoint_every_s", value=checkpoint_every_s)
    size, world = recipe.batch_size, ranks.world
    if size % world or size < 2 * world:
        raise InputError(
            f"is shared by {world} processes and must be a multiple of that, at least 2 for each",
            argument="batch_size",
            value=size,
        )


def _check_places(data: str | Path, out: Path, *, resume: bool, stream: bool, labels: bool) -> None:
    if stream and not is_hub_dataset(data):
        raise InputError(f"{data} is not on the Hub; expected hf://datasets/ORG/NAME", argument="stream")
    require_place(data)
    if Path(data).resolve() in out.resolve().parents and are_folders_of_images(data, labels=labels):
        what = "where it would be taken for a class" if labels else "which it would change"
        raise InputError(
            f"lies in the training data, {what}",
            argument="out",
            value=out,
            fix="choose another folder",
        )
    if resume:
        checkpoint_file(out)
    else:
        require_unused(out)
