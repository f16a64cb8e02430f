"""TrivialAugment and random erasing: torchvision's, by seeds that follow from the run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import InterpolationMode, TrivialAugmentWide

from robustfeat.errors import InputError
from robustfeat.training.data.augmentation import Augmentation
from robustfeat.training.data.batches import EpochPlan, TrainingBatches, load_batches
from robustfeat.training.data.opening import open_training_data
from robustfeat.training.loop.arguments import check_arguments
from robustfeat.training.loop.ranks import Ranks
from robustfeat.training.recipe import Recipe
from tests.training import small
from tests.training.test_teacher import assert_resumes

FILL = (0.485, 0.456, 0.406)


def square(seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 100, (20, 20, 3), np.uint8)


def test_a_seed_gives_torchvisions_operation_and_leaves_the_global_numbers() -> None:
    augment = Augmentation(trivial_augment=True, erasing=0.0, fill=FILL)
    changed = 0
    for seed in range(40):
        torch.manual_seed(seed)
        expected = np.asarray(TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR)(Image.fromarray(square())))
        torch.manual_seed(1000)
        before = torch.get_rng_state()
        result = augment(square(), seed)
        assert torch.equal(torch.get_rng_state(), before)
        np.testing.assert_array_equal(result, expected)
        changed += not np.array_equal(result, square())
    assert 20 < changed < 40


def test_erasing_fills_a_rectangle_with_the_mean_colour() -> None:
    augment = Augmentation(trivial_augment=False, erasing=0.5, fill=FILL)
    shares = []
    for seed in range(200):
        result = augment(square(), seed)
        erased = (result != square()).any(2)
        shares.append(erased.mean())
        if erased.any():
            rows, columns = np.nonzero(erased)
            assert erased[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()
            assert np.unique(result[erased], axis=0).tolist() == [[124, 116, 104]]
    found = np.array(shares)
    assert (found > 0).mean() == pytest.approx(0.5, abs=0.1)
    assert (found[found > 0] > 0.015).all()
    assert (found < 0.36).all()


def batches(dataset: Path, epoch: int = 1, **options: Any) -> TrainingBatches:
    data, _ = open_training_data(dataset)
    augmentation = Augmentation(trivial_augment=True, erasing=1.0, fill=FILL)
    return TrainingBatches(data, 24, EpochPlan(data, 6, seed=1, epoch=epoch, **options), augmentation)


def test_batches_do_not_depend_on_workers_start_or_ranks(dataset: Path) -> None:
    alone = list(load_batches(batches(dataset), 0))
    for place, batch in enumerate(load_batches(batches(dataset), 2)):
        assert torch.equal(batch.images, alone[place].images)
    (later,) = load_batches(batches(dataset), 1, range(3, 4))
    assert torch.equal(later.images, alone[3].images)
    parts = [batches(dataset, rank=rank, world=2)[3].images for rank in (0, 1)]
    assert torch.equal(torch.cat(parts), alone[3].images)
    plain = TrainingBatches(batches(dataset)._data, 24, batches(dataset).plan)[3].images
    assert all(not torch.equal(a, b) for a, b in zip(plain, alone[3].images, strict=True)), "each is erased"
    seeds = {int(seed) for epoch in (0, 1) for number in (0, 1) for seed in batches(dataset, epoch).plan.seeds(number)}
    assert len(seeds) == 24


def test_an_augmented_run_from_a_cache_resumes_exactly(dataset: Path, tmp_path: Path) -> None:
    assert_resumes(dataset, tmp_path, small.recipe(dataset, trivial_augment=True, erasing=0.5, cache_px=40))


def test_what_cannot_be_augmented_is_refused(dataset: Path, tmp_path: Path) -> None:
    for changes in ({"trivial_augment": True}, {"erasing": 0.1}):
        made = dataclasses.replace(Recipe(), **changes)
        with pytest.raises(InputError, match="teacher_crops=1: are features of plain crops"):
            made.replace(teacher="any", teacher_crops=1)
        with pytest.raises(
            InputError, match="cache=device: keeps images where nothing augments them; pass `cache=ram`"
        ):
            check_arguments(
                dataset, made.replace(cache_px=32), tmp_path / "run", Ranks(), resume=False, cache="device",
                stream=False, checkpoint_every_s=1.0,
            )  # fmt: skip
    with pytest.raises(InputError, match="erasing=2: must be from 0 to 1"):
        Recipe(erasing=2)
