"""Networks: what they compute, and which of timm's can be trained."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import timm
import torch
import torchvision

from robustfeat.errors import InputError
from robustfeat.training.loop.ranks import Ranks
from robustfeat.training.loop.step import TrainingStep
from robustfeat.training.network import Outputs, build_network, feature_network, feature_size, timm_settings
from tests.training.test_objective import CONCEPTS, CPU, SMALL

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_resnet18_is_torchvisions_bit_for_bit() -> None:
    torch.manual_seed(0)
    ours = build_network(10).eval()
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=10).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert torch.equal(ours(IMAGES), theirs(IMAGES))


@pytest.mark.parametrize("width", [4, 96])
def test_a_width_scales_all_channels_and_keeps_the_names(width: int) -> None:
    wide, original = build_network(3, width=width).state_dict(), build_network(3).state_dict()
    assert list(wide) == list(original)
    for name, value in original.items():
        # Each dimension of channels is width / 64 of the original's; kernels, colours and classes stay.
        kept = {3, 1, 7} if name != "fc.bias" else {3}
        expected = [side if side in kept else side * width // 64 for side in value.shape]
        assert list(wide[name].shape) == expected, name
    assert feature_size(build_network(3, width=width)) == 8 * width


@pytest.mark.parametrize("name", ["convnext_atto", "vit_tiny_patch16_224", "efficientnet_lite0", "test_resnet"])
def test_networks_of_timm_give_the_features_that_their_classifier_sees(name: str) -> None:
    network = build_network(5, f"timm:{name}", image_size=32).eval()
    with torch.no_grad():
        output = Outputs(network, torch.nn.ModuleDict({"same": torch.nn.Identity()}))(IMAGES)
        torch.testing.assert_close(output.logits, network(IMAGES))
        assert output.features.shape == (2, feature_size(network))
        assert torch.equal(output.heads["same"], output.features)
        torch.testing.assert_close(feature_network(network)(IMAGES), output.features)
    assert timm_settings(network)["architecture"] == name
    assert timm.is_model(name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("timm:nosuch", "timm cannot make it .*Unknown model"),
        ("timm:deit_tiny_distilled_patch16_224", "cannot be trained"),
    ],
)
def test_networks_that_cannot_be_trained_are_refused(name: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        build_network(5, name, image_size=32)
    assert "\n" not in str(caught.value)


def test_recalibration_needs_batch_norm() -> None:
    made = dataclasses.replace(SMALL, network="timm:test_vit", recalibrate=1)
    with pytest.raises(InputError, match="recalibrate=1: timm:test_vit has no BatchNorm"):
        TrainingStep(made, CONCEPTS, CPU, Ranks())


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("test_convnext", {"inner": "half"}, "fails on images of 16 px .* with `inner=half` it sees half of each side"),
        ("vit_tiny_patch16_224", {"image_sizes": ((0, 32), (1, 48))}, "fails on images of 48 px"),
        # These passes see no halves.
        ("test_convnext", {"inner": "half", "method": "cl"}, ""),
        ("test_convnext", {"inner": "half", "method": "random"}, ""),
        ("test_convnext", {"inner": "half", "tau": 0}, ""),
        ("test_resnet", {"inner": "half"}, ""),
    ],
)
def test_sides_that_a_network_does_not_take_are_said_before_training(
    name: str, changes: dict[str, Any], reason: str
) -> None:
    sides: dict[str, Any] = {"image_sizes": ((0, 32),), "validation_size": 32}
    made = dataclasses.replace(SMALL, network=f"timm:{name}", **sides | changes)
    if not reason:
        assert TrainingStep(made, CONCEPTS, CPU, Ranks()).network.training
        return
    with pytest.raises(InputError, match=f"network=timm:{name}: {reason}"):
        TrainingStep(made, CONCEPTS, CPU, Ranks())
