"""The model folder: what is written is read back, and what was changed is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from robustfeat.errors import ModelFolderError
from robustfeat.hub.catalog import resolve_model
from robustfeat.hub.config import ModelConfig
from robustfeat.hub.folder import ModelFolder, seal_folder
from robustfeat.hub.preprocessing import Preprocessing


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def edit_config(folder: Path, change: Callable[[dict], None]) -> None:
    data = json.loads((folder / "config.json").read_text())
    change(data)
    (folder / "config.json").write_text(json.dumps(data))


def test_config_is_read_as_it_was_written(tmp_path: Path) -> None:
    config = ModelConfig(
        name="a-v1",
        architecture="resnet18",
        feature_size=512,
        num_classes=10,
        preprocessing=Preprocessing(96, 0.9),
        concepts=("Bird", "Dog"),
        recipe={"method": "hrrl"},
        provenance={"terms": "none"},
        results={"CIFAR-10": "60 %"},
    )
    folder = seal_folder(tmp_path, config, "# card\n")
    assert folder.config == config
    assert ModelFolder(tmp_path).config == config


def test_every_file_but_card_and_config_is_hashed(model: Path) -> None:
    listed = set(ModelFolder(model).config.files)
    present = {file.relative_to(model).as_posix() for file in model.rglob("*") if file.is_file()}
    assert listed == present - {"README.md", "config.json"}
    assert {"model.safetensors", "onnx/model.onnx", "golden/features.npy", "training.json"} <= listed


def test_an_edited_card_is_fine(copy: Path) -> None:
    (copy / "README.md").write_text("my own words")
    ModelFolder(copy).verify()


@pytest.mark.parametrize(
    "name", ["model.safetensors", "onnx/model.onnx", "golden/dress.jpg", "preprocessor_config.json"]
)
def test_an_altered_file_is_named(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(ModelFolderError, match=rf"{name}: altered or truncated"):
        ModelFolder(copy).verify()


def test_an_altered_model_is_refused_when_it_is_used(copy: Path) -> None:
    with open(copy / "onnx" / "model.onnx", "ab") as handle:
        handle.write(b"\0")
    with pytest.raises(ModelFolderError, match="altered or truncated"):
        ModelFolder(copy).onnx("fp32")


def test_a_missing_file_is_named(copy: Path) -> None:
    (copy / "onnx" / "model.onnx").unlink()
    with pytest.raises(ModelFolderError, match=r"onnx/model\.onnx is missing"):
        ModelFolder(copy)


def test_a_path_that_leaves_the_folder_is_refused(copy: Path) -> None:
    edit_config(copy, lambda data: data["robustfeat"]["files"].update({"../copy/model.safetensors": "0"}))
    with pytest.raises(ModelFolderError):
        ModelFolder(copy)


def test_a_newer_format_is_refused(copy: Path) -> None:
    edit_config(copy, lambda data: data["robustfeat"].update(format_version=2))
    with pytest.raises(ModelFolderError, match="format_version must be 1; got 2: upgrade robustfeat"):
        ModelFolder(copy)


def test_an_edited_preprocessing_is_refused(copy: Path) -> None:
    edit_config(copy, lambda data: data["robustfeat"]["preprocessing"].update(crop_pct=0.5))
    with pytest.raises(ModelFolderError, match="preprocessing_hash must be"):
        ModelFolder(copy)


@pytest.mark.parametrize(
    "change", [{"feature_size": float("inf")}, {"files": [1]}, {"preprocessing": [1]}, {"concepts": None}]
)
def test_a_config_with_values_of_other_kinds_is_refused(copy: Path, change: dict) -> None:
    edit_config(copy, lambda data: data["robustfeat"].update(change))
    with pytest.raises(ModelFolderError, match="export the model again"):
        ModelFolder(copy)


def test_a_config_that_contradicts_itself_is_refused(copy: Path) -> None:
    edit_config(copy, lambda data: data["pretrained_cfg"].update(crop_pct=0.5))
    with pytest.raises(ModelFolderError, match=r"pretrained_cfg and robustfeat\.preprocessing disagree"):
        ModelFolder(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"robustfeat": {"format_version": 1}}'])
def test_a_config_of_another_kind_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelFolderError):
        ModelFolder(tmp_path)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="not a model folder"):
        resolve_model(tmp_path)


def test_the_builtin_model_is_complete_and_small() -> None:
    folder = resolve_model("builtin")
    folder.verify()
    assert folder.precisions == ["fp32", "int8"]
    assert sum(file.stat().st_size for file in folder.path.rglob("*")) <= 35_000_000
    images, features = folder.golden()
    assert len(images) == 8
    assert features.shape == (8, 512)
    assert np.isfinite(features).all()
    assert "Tiny ImageNet" in folder.config.provenance["terms"]
