"""Accuracy on moved images and by concept, and fine-tuning: each against a loop of its own."""

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from robustfeat.errors import InputError, TrainingError
from robustfeat.hub.preprocessing import Preprocessing, preprocess
from robustfeat.training.data.image_set import ImageSet
from robustfeat.training.data.opening import open_training_data
from robustfeat.training.evaluation.finetuning import finetune
from robustfeat.training.evaluation.robustness import accuracy_by_step, class_hits
from robustfeat.training.evaluation.subject import open_network
from robustfeat.training.evaluation.tasks import Task
from robustfeat.training.network import build_network

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(dataset: Path) -> ImageSet:
    return open_training_data(dataset)[0]


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return build_network(10, width=8).eval()


@pytest.fixture(scope="module")
def contract() -> Preprocessing:
    return Preprocessing(32)


def logits(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        scores: torch.Tensor = network(x)
    return scores


def test_accuracy_by_step_is_that_of_a_plain_loop(
    images: ImageSet, network: nn.Module, contract: Preprocessing
) -> None:
    """Image by image, with the gradient of autograd; 32 px, so a step of 7 at 224 px has length 1.

    The labels are what the network takes the images for, so that it is right until they are moved.
    """
    x = torch.from_numpy(preprocess([images.image(row) for row in range(len(images))], contract))
    images = dataclasses.replace(images, labels=logits(network, x).argmax(1).numpy())
    right = np.zeros(2)
    for row in range(len(images)):
        label = torch.tensor([int(images.labels[row])])
        x = torch.from_numpy(preprocess([images.image(row)], contract)).requires_grad_()
        functional.cross_entropy(network(x), label).backward()
        assert x.grad is not None
        moved = x + x.grad / x.grad.norm()
        right += [int(logits(network, seen).argmax()) == int(label) for seen in (x, moved)]
    network.zero_grad()
    shares = accuracy_by_step(network, contract, images, [0.0, 7.0], CPU)
    np.testing.assert_allclose(shares, right / len(images), atol=1.5 / len(images))  # a tie may turn
    assert shares[1] < shares[0] == 1


def test_hits_by_class_are_those_of_a_plain_loop(images: ImageSet, network: nn.Module, contract: Preprocessing) -> None:
    x = torch.from_numpy(preprocess([images.image(row) for row in range(len(images))], contract))
    taken_for = logits(network, x).argmax(1).numpy()
    images = dataclasses.replace(images, labels=np.where(np.arange(len(images)) % 3, taken_for, images.labels))
    right, count = class_hits(network, contract, images, CPU)
    expected = [int((taken_for[images.labels == one] == one).sum()) for one in range(10)]
    assert np.abs(right - expected).sum() <= 1  # a tie may turn
    assert count.tolist() == [int((images.labels == one).sum()) for one in range(10)]


def test_fine_tuning_learns_repeats_and_leaves_the_network_alone(images: ImageSet) -> None:
    task = Task("clothes", images, images)  # what it was trained on: whether it learns, not how it generalises
    features, contract = open_network("builtin").network, Preprocessing(64)
    before = {name: value.clone() for name, value in features.state_dict().items()}
    run = functools.partial(finetune, epochs=4, milestone=3, batch_size=10, lr=0.03, min_crop_area=1.0)
    errors = run(features, 512, contract, task)
    assert len(errors) == 4
    assert errors[-1] < 0.6  # 0.9 by chance
    assert errors == run(features, 512, contract, task)
    for name, value in features.state_dict().items():
        assert torch.equal(value, before[name])


def pooled() -> nn.Module:
    """As quick a network as there can be, (n, 192) features."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten())


def test_fine_tuning_is_scored_by_test_images(images: ImageSet, contract: Preprocessing) -> None:
    """They are the training images with other classes' labels: what was learned is wrong there."""
    task = Task("clothes", images, dataclasses.replace(images, labels=(images.labels + 1) % 10))
    errors = finetune(pooled(), 192, contract, task, epochs=20, batch_size=10, lr=0.05, min_crop_area=1.0)
    assert errors[-1] > 0.9


def test_fine_tuning_lowers_its_rate_to_a_tenth(images: ImageSet, contract: Preprocessing) -> None:
    task = Task("clothes", images, images)
    run = functools.partial(finetune, epochs=6, batch_size=10, min_crop_area=1.0)
    at_once, never, later = (run(pooled(), 192, contract, task, lr=0.05, milestone=epoch) for epoch in (0, 6, 4))
    assert at_once == run(pooled(), 192, contract, task, lr=0.005, milestone=6)
    assert at_once != never
    assert later[:4] == never[:4]


def test_fine_tuning_says_what_it_cannot_do(images: ImageSet, contract: Preprocessing) -> None:
    task = Task("clothes", images, images)
    features = open_network("builtin").network
    with pytest.raises(InputError, match="30 training images, fewer than one batch of 128"):
        finetune(features, 512, contract, task, epochs=1)
    with pytest.raises(TrainingError, match=r"diverged in epoch \d+; try a smaller `lr`"):
        finetune(features, 512, contract, task, epochs=6, batch_size=10, lr=1e30)
