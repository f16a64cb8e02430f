"""Training from given weights: runs, model folders and files."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from robustfeat import FeatureExtractor
from robustfeat.errors import InputError
from robustfeat.serving.verify import check_golden
from robustfeat.training.export.backbones import import_backbone
from robustfeat.training.export.runs import export_run
from robustfeat.training.loop.checkpoint import load_checkpoint
from robustfeat.training.network import build_network
from robustfeat.training.recipe import Recipe
from robustfeat.training.start import load_start, resolve_start
from tests.training.small import run, run_one_epoch


def recipe(dataset: Path, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "method": "hrrl", "concepts": str(dataset / "concepts.csv"), "epochs": 1, "batch_size": 10, "lr": 1e-12,
        "image_sizes": ((0, 32),), "validation_size": 32, **changes,
    }  # fmt: skip
    return Recipe(**values)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those of a small ConvNeXt with three classes."""
    torch.manual_seed(1)
    file = tmp_path_factory.mktemp("weights") / "convnext.safetensors"
    save_file(timm.create_model("test_convnext", num_classes=3).state_dict(), file)
    return file


def test_an_imported_network_is_trained_resumed_exported_and_embeds(
    dataset: Path, tmp_path: Path, example_files: list[Path]
) -> None:
    folder, file = tmp_path / "imported", tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_convnext").state_dict(), file)
    import_backbone("timm:test_convnext", folder, weights=file, image_size=32, int8=False)
    made = recipe(dataset, init=str(folder), epochs=2, lr=0.001)
    whole = run(dataset, tmp_path / "whole", made)
    resumed = run_one_epoch(dataset, tmp_path / "parts", tmp_path / "whole", made)
    parts = run(dataset, tmp_path / "parts", resumed, resume=True)
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
    saved = Recipe.from_dict(load_checkpoint(tmp_path / "whole").recipe)
    assert (saved.network, saved.interpolation) == ("timm:test_convnext", "bicubic")
    assert saved.init_sha256
    report = export_run(tmp_path / "whole", tmp_path / "model", int8=False)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["architecture"] == "test_convnext"
    training = json.loads((tmp_path / "model" / "training.json").read_text())
    assert training["recipe"]["init"] == "imported"  # and not where it lay
    extractor = FeatureExtractor.from_pretrained(report.folder.path)
    assert check_golden(extractor).cosine > 0.9999  # type: ignore[operator]
    assert extractor.embed(example_files[:2]).shape == (2, 64)


def test_the_first_weights_are_those_of_the_start(dataset: Path, weights: Path, tmp_path: Path) -> None:
    state = run(dataset, tmp_path / "run", recipe(dataset, init=str(weights), network="timm:test_convnext"))
    given = load_file(weights)
    for name, value in state.items():
        if name.startswith("head.fc."):
            assert value.shape[0] == 10  # of this data's classes
        else:
            torch.testing.assert_close(value, given[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}, "epoch": 1},
        lambda state: {"model": {}, "model_ema": {name: value.half() for name, value in state.items()}},
        lambda state: {"teacher": {f"backbone.{name}": value for name, value in state.items()}, "student": {}},
        lambda state: {"model": state, "args": argparse.Namespace(lr=0.1)},
        lambda state: {f"_orig_mod.{name}": v for name, v in state.items() if not name.startswith("head.fc.")},
    ],
)
def test_a_start_is_found_under_any_names(weights: Path, tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    given = load_file(weights)
    torch.save(wrap(given), tmp_path / "start.pth")
    init = str(tmp_path / "start.pth")
    _, state = resolve_start(Recipe(init=init, network="timm:test_convnext"))
    network = build_network(10, "timm:test_convnext", image_size=32)
    assert load_start(network, state, init) == ["head.fc.weight", "head.fc.bias"]
    for name, value in network.state_dict().items():
        if not name.startswith("head.fc."):
            torch.testing.assert_close(value, given[name], rtol=0, atol=1e-3)


def test_a_start_from_torchvision_is_refused(small_model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small_model, tmp_path / "copy"))
    data = json.loads((copy / "config.json").read_text()) | {"architecture": "torchvision:vit_b_16"}
    (copy / "config.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="is torchvision:vit_b_16, which is not trained here; start from a network"):
        resolve_start(Recipe(init=str(copy)))


def test_a_run_is_a_start_with_its_classifier(dataset: Path, tmp_path: Path) -> None:
    run(dataset, tmp_path / "first", recipe(dataset, width=8, method="erm", lr=0.01))
    before = load_checkpoint(tmp_path / "first")
    made = recipe(dataset, init=str(tmp_path / "first"), method="erm", weight_decay=0)
    state = run(dataset, tmp_path / "next", made)
    for name, value in state.items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(value, before.model[name], rtol=0, atol=1e-6)
    assert load_checkpoint(tmp_path / "next").recipe["width"] == before.recipe["width"]


def norms(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if "running" in name}


@pytest.mark.parametrize("method", ["erm", "hrrl"])
def test_batch_norm_keeps_the_statistics_of_the_start(dataset: Path, tmp_path: Path, method: str) -> None:
    run(dataset, tmp_path / "first", recipe(dataset, width=8, method="erm", lr=0.01))
    before = load_checkpoint(tmp_path / "first").model
    made = recipe(dataset, init=str(tmp_path / "first"), method=method, lr=0.01, epochs=2, ema=0.5, freeze_norms=True)
    whole = run(dataset, tmp_path / "whole", made)
    assert norms(before)
    for name, value in norms(before).items():
        assert torch.equal(whole[name], value)
        assert torch.equal(load_checkpoint(tmp_path / "whole").result[name], value)
    assert not torch.equal(whole["layer1.0.conv1.weight"], before["layer1.0.conv1.weight"])
    loose = run(dataset, tmp_path / "loose", made.replace(freeze_norms=False))
    assert not any(torch.equal(loose[name], value) for name, value in norms(before).items())
    resumed = run_one_epoch(dataset, tmp_path / "parts", tmp_path / "whole", made)
    parts = run(dataset, tmp_path / "parts", resumed, resume=True)
    assert all(torch.equal(parts[name], value) for name, value in whole.items())


@pytest.mark.parametrize("method", ["erm", "hrrl"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_classifier_learns_first(dataset: Path, tmp_path: Path, method: str, optimizer: str) -> None:
    run(dataset, tmp_path / "first", recipe(dataset, width=8, method="erm", lr=0.01))
    before = load_checkpoint(tmp_path / "first").model
    made = recipe(
        dataset, init=str(tmp_path / "first"), method=method, optimizer=optimizer, lr=0.01, ema=0.5, classifier_epochs=1
    )
    state = run(dataset, tmp_path / "classifier", made)
    average = load_checkpoint(tmp_path / "classifier").result
    for name, value in before.items():
        learned = name.startswith("fc.")
        assert torch.equal(state[name], value) != learned
        assert torch.equal(average[name], value) != learned
    whole = run(dataset, tmp_path / "whole", made.replace(epochs=2))
    assert not any(torch.equal(whole[name], value) for name, value in before.items() if "num_batches" not in name)
    resumed = run_one_epoch(dataset, tmp_path / "parts", tmp_path / "whole", made.replace(epochs=2))
    parts = run(dataset, tmp_path / "parts", resumed, resume=True)
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
    with pytest.raises(InputError, match="classifier_epochs=1: keeps the features of a start; pass `init`"):
        recipe(dataset, classifier_epochs=1)
    with pytest.raises(InputError, match=r"recalibrate=5: would replace .* `classifier_epochs=1`"):
        made.replace(recalibrate=5)
    made.replace(recalibrate=5, epochs=2)
    with pytest.raises(InputError, match="classifier_epochs=1: leaves nothing that learns"):
        made.replace(method="stable", labels=False, stable_anchor="start")


def test_kept_statistics_need_a_start_and_batch_norm(dataset: Path, weights: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="freeze_norms=True: keeps the statistics of a start; pass `init`"):
        recipe(dataset, freeze_norms=True)
    with pytest.raises(InputError, match=r"recalibrate=5: would replace the start's statistics, .* `freeze_norms`"):
        recipe(dataset, freeze_norms=True, init=str(weights), recalibrate=5)
    made = recipe(dataset, freeze_norms=True, init=str(weights), network="timm:test_convnext")
    with pytest.raises(InputError, match="test_convnext has no BatchNorm, whose statistics are kept"):
        run(dataset, tmp_path / "run", made)


def test_the_builtin_model_is_a_start(tmp_path: Path) -> None:
    made, state = resolve_start(Recipe(init="builtin"))
    assert "conv_stem.weight" in state
    assert (made.network, made.interpolation) == ("timm:tf_efficientnet_lite0", "bicubic")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"init": "{weights}"}, "does not say which network it belongs to; pass `network=timm:NAME`"),
        ({"init": "{weights}", "network": "timm:convnext_atto"}, "tensors do not fit, such as"),
        ({"init": "{weights}", "network": "resnet18"}, "tensors do not fit, such as conv1.weight"),
        ({"init": "builtin", "network": "timm:test_convnext"}, "is timm:tf_efficientnet_lite0, not timm:test_convnext"),
        ({"init": "builtin", "init_sha256": "0" * 64}, "the recipe says 000000000000"),
        ({"init": "nowhere/at/all"}, "init=nowhere/at/all: "),
        ({"init": "{dataset}"}, "init=.*: "),
        ({"init": "{junk}"}, "cannot be read .damaged, or not a file of tensors"),
        ({"init": "{numbers}"}, "cannot be read .holds no tensors by name"),
    ],
)
def test_a_start_that_does_not_fit_is_one_line(
    dataset: Path, weights: Path, tmp_path: Path, changes: dict[str, str], reason: str
) -> None:
    (tmp_path / "junk.pth").write_bytes(b"junk")
    torch.save({"epoch": 3}, tmp_path / "numbers.pth")
    places = {
        "weights": weights,
        "dataset": dataset,
        "junk": tmp_path / "junk.pth",
        "numbers": tmp_path / "numbers.pth",
    }
    made = recipe(dataset, **{key: value.format(**places) for key, value in changes.items()})
    with pytest.raises(InputError, match=reason) as caught:
        run(dataset, tmp_path / "run", made)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_network_without_a_start_is_trained(dataset: Path, tmp_path: Path) -> None:
    made = recipe(dataset, network="timm:test_resnet", lr=0.01)
    state = run(dataset, tmp_path / "run", made)
    assert set(state) == set(build_network(10, "timm:test_resnet", image_size=32).state_dict())
