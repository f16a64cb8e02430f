"""A folder whose weights are in its ONNX file only does all that needs no PyTorch, and says what does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from robustfeat import FeatureExtractor
from robustfeat.hub.card import render_card
from robustfeat.hub.folder import ModelFolder
from robustfeat.training.export.onnx_import import import_onnx
from tests.conftest import Run, Share, hub_environment, train_arguments
from tests.hub_server import FakeHub, card_problems
from tests.serving.http.conftest import serving
from tests.training.export.onnx_networks import convolutional


@pytest.fixture(scope="session")
def onnx_model(share: Share) -> Path:
    """Of a small network."""

    def build(out: Path) -> None:
        file = convolutional(out.with_suffix(".files") / "net.onnx")
        import_onnx(file, out, mean=[0.5], std=[0.25], output="vector", name="net-v1", license_id="mit")

    return share("onnx-model", build)


def test_info_and_card_say_what_it_is(robustfeat: Run, onnx_model: Path) -> None:
    result = robustfeat("info", onnx_model)
    assert result.returncode == 0, result.stderr
    assert "network:       onnx:net, 16 features" in result.stdout
    assert "source:        net.onnx, output vector" in result.stdout
    card = (onnx_model / "README.md").read_text()
    assert card_problems(card) == []
    assert "library_name: onnx" in card
    assert "Only the ONNX file has the weights, so PyTorch cannot load this model." in card
    assert "timm" not in card
    assert card == render_card(ModelFolder(onnx_model).config)


def test_verify_runs_engines_and_no_pytorch(robustfeat: Run, onnx_model: Path) -> None:
    result = robustfeat("verify", onnx_model, "--json")
    assert result.returncode == 0, result.stderr
    checks = [json.loads(line) for line in result.stdout.splitlines()]
    assert {(check["engine"], check["precision"]) for check in checks} >= {
        ("onnxruntime", "fp32"), ("onnxruntime", "int8"), ("openvino", "fp32"), ("openvino", "int8")
    }  # fmt: skip
    assert not any(check["engine"] == "pytorch" for check in checks)


def test_embed_fits_a_head_that_predicts_and_is_served(
    robustfeat: Run, onnx_model: Path, examples: Path, tmp_path: Path
) -> None:
    result = robustfeat("embed", examples, "--out", tmp_path / "feats.npy", "--model", onnx_model, "--quiet")
    assert result.returncode == 0, result.stderr
    meta = json.loads((tmp_path / "feats.meta.json").read_text())
    assert set(meta["files"]) >= {"onnx/model.onnx"}
    result = robustfeat("svm", "fit", tmp_path / "feats.npy", "--labels", "folder", "--out", tmp_path / "head")
    assert result.returncode == 0, result.stderr
    result = robustfeat("svm", "score", tmp_path / "head", examples, "--model", onnx_model, "--labels", "folder")
    assert result.returncode == 0, result.stderr
    photo = (examples / "hat" / "hat-1.jpg").read_bytes()
    with serving("--model", onnx_model, "--head", tmp_path / "head", new=True) as server:
        answer = server.post("/embed", photo).json
        assert server.post("/predict/head", photo).status == 200
    expected = FeatureExtractor.from_pretrained(onnx_model, threads=1).embed([photo])
    np.testing.assert_allclose(np.asarray([answer["data"][0]["embedding"]]), expected, atol=1e-4)


def test_push_and_pull_give_the_same_model(robustfeat: Run, onnx_model: Path, hub: FakeHub, tmp_path: Path) -> None:
    environment = hub_environment(hub, tmp_path / "home")
    result = robustfeat("push", onnx_model, "org/net", env=environment)
    assert result.returncode == 0, result.stderr
    result = robustfeat("pull", "org/net", "--out", tmp_path / "copy", env=environment)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "copy" / "config.json").read_bytes() == (onnx_model / "config.json").read_bytes()
    result = robustfeat("verify", "org/net", "--quiet", env=environment)
    assert result.returncode == 0, result.stderr


def test_two_of_one_name_are_told_apart(onnx_model: Path, tmp_path: Path) -> None:
    file = convolutional(tmp_path / "net.onnx")
    other = import_onnx(file, tmp_path / "other", mean=[0.5], std=[0.25], output="map", pooling="mean", name="net-v1")
    one = FeatureExtractor.from_pretrained(onnx_model).identity
    two = FeatureExtractor.from_pretrained(other.folder.path).identity
    assert (one.name, one.preprocessing_hash) == (two.name, two.preprocessing_hash)
    assert one.weights_sha256
    assert not one.same_features(two)


def test_it_teaches_but_training_cannot_start_from_it(
    robustfeat: Run, onnx_model: Path, dataset: Path, tmp_path: Path
) -> None:
    result = robustfeat(*train_arguments(dataset, tmp_path / "run", init=onnx_model, epochs=1))
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1, result.stderr
    assert f"--init {onnx_model}: " in result.stderr
    assert "has no weights for PyTorch (model.safetensors), only the ONNX network" in result.stderr
    assert not (tmp_path / "run").exists()
    result = robustfeat(*train_arguments(dataset, tmp_path / "run", teacher=onnx_model, epochs=1))
    assert result.returncode == 0, result.stderr
