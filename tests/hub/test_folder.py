"""The model folder: what is written is read back, and what was changed is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from robustfeat.errors import EngineError, ModelFolderError
from robustfeat.hub.catalog import resolve_model
from robustfeat.hub.config import Evaluation, ModelConfig
from robustfeat.hub.float16 import convert_to_float16
from robustfeat.hub.folder import ONNX, WEIGHTS, ModelFolder, seal_folder
from robustfeat.hub.preprocessing import Preprocessing
from robustfeat.serving.extractor import FeatureExtractor
from robustfeat.serving.identity import ModelIdentity
from robustfeat.serving.verify import check_golden


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
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
        evaluations=(Evaluation("CIFAR-10", "uoft-cs/cifar10", "accuracy", 60.0),),
    )
    folder = seal_folder(tmp_path, config, "# card\n")
    assert folder.config == config.replace(card_sha256=hashlib.sha256(b"# card\n").hexdigest())
    assert ModelFolder(tmp_path).config == folder.config


def test_a_field_of_a_later_version_is_ignored_where_it_cannot_name_code(copy: Path) -> None:
    before = ModelFolder(copy).config
    edit_config(copy, lambda data: data["robustfeat"].update(later="x"))
    assert ModelFolder(copy).config == before
    edit_config(copy, lambda data: data.update(later="x"))
    with pytest.raises(ModelFolderError, match="the entry 'later' is unknown"):
        _ = ModelFolder(copy).config


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


@pytest.mark.parametrize(
    "name", ["../copy/model.safetensors", "/etc/hostname", "./README.md", "golden//a", "model.safetensors/", "", "a\\b"]
)
def test_a_path_that_leaves_the_folder_or_has_another_name_is_refused(copy: Path, name: str) -> None:
    edit_config(copy, lambda data: data["robustfeat"]["files"].update({name: "0"}))
    with pytest.raises(ModelFolderError, match="is outside the folder"):
        ModelFolder(copy)


@pytest.mark.parametrize(
    "name", ["weights.pkl", ".hidden.pkl", "pytorch_model.bin", "golden/a.PT", "modeling.py", "model.pkl.gz"]
)
def test_a_pickle_or_code_is_refused_by_name(copy: Path, name: str) -> None:
    (copy / name).write_bytes(b"x")
    with pytest.raises(ModelFolderError, match=rf"contains {name}, which may run code"):
        ModelFolder(copy)


@pytest.mark.parametrize("name", ["LICENSE", "figure.png", "notes.txt", ".git/hooks/pre-commit.py"])
def test_what_belongs_to_the_card_or_to_git_is_fine(copy: Path, name: str) -> None:
    (copy / name).parent.mkdir(parents=True, exist_ok=True)
    (copy / name).write_bytes(b"x")
    ModelFolder(copy).verify()


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_an_entry_that_names_code_is_refused(copy: Path, file: str) -> None:
    data = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps(data | {"auto_map": {"AutoModel": "modeling.Model"}}))
    with pytest.raises(ModelFolderError, match=rf"{file}: the entry 'auto_map' names code to run"):
        ModelFolder(copy)


def test_the_config_hash_pins_the_folder(copy: Path) -> None:
    digest = hashlib.sha256((copy / "config.json").read_bytes()).hexdigest()
    assert resolve_model(copy, config_hash=digest).config_hash == digest
    resolve_model(copy, config_hash=f"sha256:{digest.upper()}")
    edit_config(copy, lambda data: data["robustfeat"].update(name="other"))
    with pytest.raises(ModelFolderError, match="not the requested model"):
        resolve_model(copy, config_hash=digest)


def test_a_config_hash_that_is_none_is_told_from_a_wrong_one(copy: Path) -> None:
    with pytest.raises(ModelFolderError, match="a config hash has 64 hex digits; got 'abc'"):
        resolve_model(copy, config_hash="abc")


def test_a_folder_in_the_way_of_the_hub_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    with pytest.raises(ModelFolderError, match="org/name: a folder of this name hides the model"):
        resolve_model("org/name")


def test_a_folder_comes_before_the_hub(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path.parent)
    assert resolve_model(f"{tmp_path.name}/copy").revision is None


@pytest.mark.parametrize("name", ["none", "./a/b", "/a/b", "a/b/c", "a/..", "../a", "a/b.git"])
def test_what_is_no_name_on_the_hub_is_a_folder_that_is_missing(name: str) -> None:
    with pytest.raises(ModelFolderError, match="not a model folder"):
        resolve_model(name)


def test_a_newer_format_is_refused(copy: Path) -> None:
    edit_config(copy, lambda data: data["robustfeat"].update(format_version=2))
    with pytest.raises(ModelFolderError, match="format_version must be 1; got 2; upgrade robustfeat"):
        ModelFolder(copy)


def test_an_edited_preprocessing_is_refused(copy: Path) -> None:
    edit_config(copy, lambda data: data["robustfeat"]["preprocessing"].update(crop_pct=0.5))
    with pytest.raises(ModelFolderError, match="preprocessing_hash must be"):
        ModelFolder(copy)


@pytest.mark.parametrize(
    "change",
    [
        {"feature_size": float("inf")},
        {"files": [1]},
        {"preprocessing": [1]},
        {"concepts": None},
        {"evaluations": [{}]},
        {"results": {"a": [1]}},
    ],
)
def test_a_config_with_values_of_other_kinds_is_refused(copy: Path, change: dict[str, Any]) -> None:
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


def test_a_folder_without_weights_for_pytorch_is_known_by_its_onnx(small_fp32: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small_fp32, tmp_path / "model"))
    with_weights = FeatureExtractor.from_pretrained(folder).identity
    (folder / WEIGHTS).unlink()
    sealed = seal_folder(folder, ModelFolder(small_fp32).config, "")
    digest = sealed.config.files["onnx/model.onnx"]
    extractor = FeatureExtractor.from_pretrained(folder)
    identity = extractor.identity
    assert (identity.weights_sha256, sealed.version) == (digest, digest[:12])
    assert not identity.same_features(with_weights)
    assert ModelIdentity.of_meta(identity.to_meta(8)) == identity
    assert not check_golden(extractor).short
    with pytest.raises(ModelFolderError, match=r"no weights for PyTorch \(model.safetensors\), only the ONNX network"):
        sealed.read(WEIGHTS)


def test_fp16_is_made_from_fp32_or_read_from_its_file(small_fp32: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small_fp32, tmp_path / "copy"))
    folder = ModelFolder(copy)
    made = folder.read_onnx("fp16")
    assert made == convert_to_float16(folder.read_onnx("fp32"))
    assert folder.precisions == ["fp32"]
    with pytest.raises(ModelFolderError, match="has no fp16 model"):
        folder.onnx("fp16")
    (copy / ONNX["fp16"]).write_bytes(made + b"\x32\x01x")  # a doc_string tells it from a conversion
    sealed = seal_folder(copy, folder.config, "card")
    assert sealed.precisions == ["fp32", "fp16"]
    assert sealed.read_onnx("fp16") == made + b"\x32\x01x"
    assert sealed.onnx("fp16") == copy / ONNX["fp16"]


def test_what_has_no_fp16_is_refused_by_name(small_fp32: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small_fp32, tmp_path / "copy"))
    file = copy / ONNX["fp32"]
    model = onnx.load(file)
    weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * 1e8, weight.name))
    onnx.save(model, file)
    sealed = seal_folder(copy, ModelFolder(copy).config, "card")
    with pytest.raises(EngineError, match=f"cannot run in fp16 .{weight.name} has the value .*; pass `precision=fp32`"):
        sealed.read_onnx("fp16")
