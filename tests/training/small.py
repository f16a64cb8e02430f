"""A recipe of ten steps of a network with a sixtieth of ResNet-18's parameters: for tests of what happens around it."""

from __future__ import annotations

from pathlib import Path

from robustfeat.training.recipe import Recipe

__all__ = ["recipe"]


def recipe(dataset: Path, **changes: object) -> Recipe:
    """Two epochs on the fixture `dataset`, of five steps with six images each."""
    values = {
        "concepts": str(dataset / "concepts.csv"), "epochs": 2, "batch_size": 6, "lr": 0.02, "width": 8,
        "image_sizes": ((0, 32),), "validation_size": 32, **changes,
    }  # fmt: skip
    return Recipe(**values)  # type: ignore[arg-type]
