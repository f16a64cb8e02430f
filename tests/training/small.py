"""Runs of ten steps of a network with a sixtieth of ResNet-18's parameters: for tests of what happens around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from robustfeat.training.loop.checkpoint import load_checkpoint, save_checkpoint
from robustfeat.training.loop.trainer import train
from robustfeat.training.recipe import Recipe

__all__ = ["recipe", "run", "run_one_epoch"]


def recipe(dataset: Path, **changes: object) -> Recipe:
    """Two epochs on the fixture `dataset`, of five steps with six images each."""
    values = {
        "concepts": str(dataset / "concepts.csv"), "epochs": 2, "batch_size": 6, "lr": 0.02, "width": 8,
        "image_sizes": ((0, 32),), "validation_size": 32, **changes,
    }  # fmt: skip
    return Recipe(**values)  # type: ignore[arg-type]


def run(data: Path, out: Path, made: Recipe, **options: Any) -> dict[str, Tensor]:
    """Trains on one thread of this process; the parameters, and those of heads as `head NAME`."""
    train(data, made, out, workers=0, threads=1, quiet=True, device="cpu", **options)
    saved = load_checkpoint(out)
    return {**saved.model, **{f"head {name}": value for name, value in saved.heads.items()}}


def run_one_epoch(data: Path, out: Path, whole: Path, made: Recipe) -> Recipe:
    """Leaves in `out` what a signal after the first epoch of the run `whole` leaves; the recipe to resume with."""
    run(data, out, made.replace(epochs=1))
    half = load_checkpoint(out)
    object.__setattr__(half, "recipe", load_checkpoint(whole).recipe)
    save_checkpoint(half, out)
    return Recipe.from_dict(half.recipe)
