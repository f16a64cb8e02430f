"""Models that give principal components, against scikit-learn and the network's own features."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.decomposition import PCA

from robustfeat import FeatureExtractor
from robustfeat.errors import DataError, InputError, ModelFolderError
from robustfeat.hub.folder import ModelFolder
from robustfeat.hub.preprocessing import prepare_square
from robustfeat.serving.verify import check_golden, cosine
from robustfeat.training.evaluation.subject import open_network
from robustfeat.training.export.calibration import training_images
from robustfeat.training.export.golden import verify_with_timm, verify_with_torch
from robustfeat.training.export.principal import principal_directions, project_features
from robustfeat.training.export.runs import export_run
from robustfeat.training.loop.checkpoint import load_checkpoint
from robustfeat.training.network import build_network, pooled_features
from robustfeat.training.recipe import Recipe
from robustfeat.training.start import load_start, resolve_start
from tests.conftest import Run
from tests.training.small import recipe, run

D = 8


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a small network of timm with 96 features."""
    out = tmp_path_factory.mktemp("principal") / "run"
    run(dataset, out, recipe(dataset, network="timm:test_resnet", epochs=1, lr=0.001))
    return out


@pytest.fixture(scope="module")
def folder(trained: Path) -> ModelFolder:
    return export_run(trained, trained.parent / "model", components=D, compact=True).folder


def test_components_are_scikit_learns() -> None:
    x = np.random.default_rng(0).normal(size=(200, 20)) @ np.random.default_rng(1).normal(size=(20, 20)) + 3
    weight = principal_directions(x, 5)
    expected = PCA(5, svd_solver="full").fit(x)
    signs = np.sign((weight * expected.components_).sum(1, keepdims=True))
    np.testing.assert_allclose(weight, signs * expected.components_, atol=1e-9)
    assert (np.take_along_axis(weight, np.abs(weight).argmax(1)[:, None], 1) > 0).all()


def test_the_model_gives_components_of_the_networks_features(
    trained: Path, folder: ModelFolder, example_files: list[Path]
) -> None:
    whole = export_run(trained, trained.parent / "whole", int8=False).folder
    all_features = FeatureExtractor.from_pretrained(whole.path)
    checkpoint = load_checkpoint(trained)
    contract = whole.config.preprocessing
    seen = training_images(checkpoint.data, Recipe.from_dict(checkpoint.recipe), contract, count=4096)
    reference = PCA(D, svd_solver="full").fit(all_features.embed_prepared(np.stack(seen)))
    expected = all_features.embed(example_files) @ reference.components_.T
    features = FeatureExtractor.from_pretrained(folder.path).embed(example_files)
    signs = np.sign((features * expected).sum(0))
    assert cosine(features, expected * signs).min() > 0.999


def test_other_libraries_give_the_same_features(folder: ModelFolder, example_files: list[Path]) -> None:
    assert not check_golden(FeatureExtractor.open(folder)).short
    assert not verify_with_torch(folder).short
    assert not verify_with_timm(folder).short
    assert "pretrained=True).eval()" in (folder.path / "README.md").read_text("utf-8")
    subject = open_network(str(folder.path), device="cpu")
    squares = np.stack([prepare_square(file.read_bytes(), folder.config.preprocessing) for file in example_files[:4]])
    expected = FeatureExtractor.open(folder).embed(example_files[:4])
    assert cosine(subject.embed_prepared(squares), expected).min() > 0.9999


def test_the_classifier_of_the_components_is_kept(
    trained: Path, folder: ModelFolder, example_files: list[Path]
) -> None:
    """Its logits are the network's of features whose left-out components are replaced by the mean's."""
    whole = export_run(trained, trained.parent / "classified", int8=False).folder
    checkpoint = load_checkpoint(trained)
    contract = whole.config.preprocessing
    seen = training_images(checkpoint.data, Recipe.from_dict(checkpoint.recipe), contract, count=4096)
    all_features = FeatureExtractor.from_pretrained(whole.path)
    known = all_features.embed_prepared(np.stack(seen)).astype(float)
    pca = PCA(D, svd_solver="full").fit(known)
    own = load_file(whole.path / "model.safetensors")
    rebuilt = pca.inverse_transform(pca.transform(all_features.embed(example_files)))
    expected = rebuilt @ own["fc.weight"].numpy().T + own["fc.bias"].numpy()
    kept = load_file(folder.path / "classifier.safetensors")
    features = FeatureExtractor.from_pretrained(folder.path).embed(example_files)
    np.testing.assert_allclose(features @ kept["weight"].numpy().T + kept["bias"].numpy(), expected, atol=2e-2)


def test_the_folder_says_what_its_features_are(folder: ModelFolder) -> None:
    config = json.loads((folder.path / "config.json").read_text("utf-8"))
    assert (config["num_classes"], config["num_features"]) == (D, 96)
    assert (folder.config.feature_size, folder.config.components_of) == (D, 96)
    assert f"first {D} principal components of the network's 96" in (folder.path / "README.md").read_text("utf-8")
    config["num_classes"] = config["pretrained_cfg"]["num_classes"] = 3
    with pytest.raises(ModelFolderError, match=f"num_classes must be feature_size, {D}, where components_of is set"):
        folder.config.from_dict(config, "config.json")


def test_a_start_takes_the_network_without_the_projection(folder: ModelFolder) -> None:
    made, state = resolve_start(Recipe(init=str(folder.path)))
    network = build_network(D, made.network, image_size=32)
    assert load_start(network, state, made.init) == ["fc.weight", "fc.bias"]


@pytest.mark.parametrize("count", [0, 96, 97])
def test_an_impossible_number_of_components_is_refused(trained: Path, tmp_path: Path, count: int) -> None:
    with pytest.raises(InputError, match="must be at least 1 and less than the network's 96 features"):
        export_run(trained, tmp_path / "model", components=count)
    assert not (tmp_path / "model").exists()


def test_too_few_images_are_refused() -> None:
    network = build_network(2, width=8).eval()
    squares = [np.zeros((32, 32, 3), np.uint8)] * 8
    contract = recipe(Path("data")).preprocessing()
    with pytest.raises(DataError, match="8 components need more than 8 training images; found 8"):
        project_features(network, squares, contract, 8)
    with torch.no_grad():
        assert pooled_features(network, torch.zeros(1, 3, 32, 32)).shape == (1, 64)


def test_the_command_exports_components(robustfeat: Run, trained: Path, tmp_path: Path) -> None:
    done = robustfeat("export", trained, "--out", tmp_path / "model", "--components", D, "--no-int8", "--json")
    assert done.returncode == 0, done.stderr
    assert ModelFolder(tmp_path / "model").config.feature_size == D
    refused = robustfeat("export", trained, "--out", tmp_path / "other", "--components", 96)
    assert refused.returncode == 1
    assert refused.stderr.strip().startswith("robustfeat: --components 96: must be at least 1 and less than")
