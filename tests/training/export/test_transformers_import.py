"""Models of transformers become model folders that give the features of transformers, and that it still loads."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from robustfeat import FeatureExtractor
from robustfeat.errors import RobustFeatError
from robustfeat.hub.folder import ModelFolder
from robustfeat.hub.image_processor import read_image_processor
from robustfeat.hub.preprocessing import Preprocessing, decode, preprocess
from robustfeat.serving.verify import cosine
from robustfeat.training.export import network_size
from robustfeat.training.export.onnx_import import import_onnx_layout
from robustfeat.training.export.repository import open_repository
from robustfeat.training.export.transformers_import import import_transformers
from robustfeat.training.export.transformers_models import verify_with_transformers
from tests.conftest import Repositories
from tests.transformers_models import FAMILIES, reference_features


def make(folder: Path, **options: Any) -> Any:
    return import_transformers(open_repository(str(folder)), folder.parent / "model", **{"int8": False, **options})


def copied(folder: Path, target: Path) -> Path:
    """A copy without ONNX files."""
    return Path(shutil.copytree(folder, target, ignore=shutil.ignore_patterns("onnx")))


@pytest.fixture(scope="module")
def dinov2(repositories: Repositories, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of the family's repository."""
    folder = copied(repositories("dinov2"), tmp_path_factory.mktemp("dinov2") / "repository")
    path: Path = make(folder, pooling="pooler").folder.path
    return path


def test_the_folder_gives_the_features_of_transformers(
    repositories: Repositories, dinov2: Path, example_files: list[Path]
) -> None:
    assert_same(dinov2, repositories("dinov2"), "dinov2", example_files)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"dinov2"}))
def test_the_same_holds_for_other_families(
    repositories: Repositories, tmp_path: Path, example_files: list[Path], name: str
) -> None:
    folder = copied(repositories(name), tmp_path / "repository")
    way = {"cls": None, "image_embeds": "embeds"}.get(FAMILIES[name].features, "pooler")
    assert_same(make(folder, pooling=way).folder.path, folder, name, example_files)


def assert_same(model: Path, folder: Path, name: str, files: list[Path]) -> None:
    """The features are those of transformers' own image processor and network, and PyTorch confirms the golden ones."""
    features = FeatureExtractor.from_pretrained(model, threads=1).embed(files)
    assert cosine(features, reference_features(name, folder, files, "pil")).min() >= 0.9999
    check = verify_with_transformers(ModelFolder(model))
    assert check.cosine is not None
    assert check.cosine >= 0.9999


def test_transformers_loads_the_folder_again(
    repositories: Repositories, dinov2: Path, example_files: list[Path]
) -> None:
    network: Any = transformers.AutoModel.from_pretrained(dinov2)
    processor: Any = transformers.AutoImageProcessor
    with Image.open(example_files[0]) as image:
        inputs = processor.from_pretrained(dinov2)(image.convert("RGB"), return_tensors="pt")
        ours = FeatureExtractor.from_pretrained(dinov2, threads=1).embed([image.convert("RGB")])
    with torch.no_grad():
        theirs = network(**inputs).pooler_output.numpy()
    assert cosine(ours, theirs).min() >= 0.9999
    saved = repositories("dinov2") / "model.safetensors"
    assert load_file(dinov2 / "model.safetensors").keys() == load_file(saved).keys()


@pytest.mark.parametrize("build", [import_onnx_layout, import_transformers])
def test_nothing_in_a_folder_tells_of_the_machine_that_made_it(
    repositories: Repositories, dinov2: Path, tmp_path: Path, build: Any
) -> None:
    folder = repositories("dinov2")
    if build is import_onnx_layout:
        made = build(open_repository(str(folder)), tmp_path / "model", int8=False).folder.path
    else:
        made = dinov2
    places = [str(folder.parent), str(made.parent), str(Path(transformers.__file__).parent)]
    for file in made.rglob("*"):
        assert not file.is_file() or not any(place.encode() in file.read_bytes() for place in places), file


def test_the_cards_lines_give_the_features(
    dinov2: Path, example_files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = (dinov2 / "README.md").read_text()
    (lines,) = re.findall(r"```python\n(import torch\n.*?)```", card, re.S)
    shutil.copy(example_files[0], tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(lines.replace("ORG/NAME", str(dinov2)), names)
    ours = FeatureExtractor.from_pretrained(dinov2, threads=1).embed(["photo.jpg"])
    assert cosine(ours, names["features"].numpy()).min() >= 0.9999


SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.mark.parametrize("build", [import_onnx_layout, pytest.param(import_transformers, marks=pytest.mark.slow)])
def test_the_mean_is_that_of_the_patches(
    repositories: Repositories, tmp_path: Path, example_files: list[Path], build: Any
) -> None:
    """Without the class token."""
    folder, files = repositories("dinov2"), example_files[:6]
    network: Any = transformers.AutoModel.from_pretrained(folder)
    contract = open_contract(folder)
    inputs = torch.from_numpy(preprocess([decode(file.read_bytes()) for file in files], contract))
    with torch.no_grad():
        expected = network(inputs).last_hidden_state[:, 1:].mean(1).numpy()
    report = build(open_repository(str(folder)), tmp_path / "model", pooling="mean", int8=False)
    features = FeatureExtractor.from_pretrained(report.folder.path, threads=1).embed(files)
    np.testing.assert_allclose(features, expected, atol=1e-3)


def open_contract(folder: Path) -> Preprocessing:
    processor, config = (
        json.loads((folder / name).read_text()) for name in ("preprocessor_config.json", "config.json")
    )
    return read_image_processor(processor, config)


@pytest.mark.slow
def test_position_embeddings_are_resized_to_the_size_of_the_images(
    repositories: Repositories, tmp_path: Path, example_files: list[Path]
) -> None:
    """As those of DINOv2, which was trained at 518 px and is used at 224 px."""
    folder = copied(repositories("dinov2"), tmp_path / "repository")
    change(folder, "preprocessor_config.json", crop_size={"height": 42, "width": 42})
    report = make(folder, pooling="pooler")
    features = FeatureExtractor.from_pretrained(report.folder.path, threads=1).embed(example_files)
    assert cosine(features, reference_features("dinov2", folder, example_files, "pil")).min() >= 0.9999


def clip(out: Path) -> Any:
    texts = {**SIZES, "vocab_size": 99, "bos_token_id": 0, "eos_token_id": 1}
    config = transformers.CLIPConfig(
        vision_config={**SIZES, "image_size": 32, "patch_size": 16}, text_config=texts, projection_dim=24
    )
    torch.manual_seed(0)
    network: Any = transformers.CLIPModel(config)
    network.eval()
    network.save_pretrained(out, max_shard_size="50KB")
    processor: Any = transformers.CLIPImageProcessor
    processor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(out)
    (out / "README.md").write_text("---\nlicense: apache-2.0\n---\n# CLIP\n")
    return network


def test_the_image_tower_of_a_model_for_texts_and_images_is_taken_from_shards(
    tmp_path: Path, example_files: list[Path]
) -> None:
    network = clip(tmp_path / "clip")
    assert len(list((tmp_path / "clip").glob("*.safetensors"))) > 1
    report = make(tmp_path / "clip")
    config = report.folder.config
    assert (config.architecture, config.pooling) == ("transformers:CLIPVisionModelWithProjection", "embeds")
    assert (config.provenance["license"], config.name) == ("apache-2.0", "clip")
    assert not any(key.startswith("text") for key in load_file(report.folder.path / "model.safetensors"))
    processor: Any = transformers.CLIPImageProcessor
    images = []
    for file in example_files[:5]:
        with Image.open(file) as image:
            images.append(image.convert("RGB"))
    with torch.no_grad():
        pixels = processor.from_pretrained(tmp_path / "clip")(images, return_tensors="pt")["pixel_values"]
        expected: Any = network.get_image_features(pixel_values=pixels)
    expected = getattr(expected, "pooler_output", expected)
    ours = FeatureExtractor.from_pretrained(report.folder.path, threads=1).embed(images)
    assert cosine(ours, expected.numpy()).min() >= 0.9999


def vit(out: Path, **changes: Any) -> Path:
    """A classifier, whose pooler has no weights."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SIZES, image_size=32, patch_size=16)
    transformers.ViTForImageClassification(config).save_pretrained(out)
    processor: Any = transformers.ViTImageProcessor
    processor(size={"height": 32, "width": 32}).save_pretrained(out)
    change(out, "config.json", **changes)
    return out


def change(folder: Path, name: str, **changes: Any) -> None:
    content = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_a_classifier_is_thrown_away_and_weights_that_do_not_matter_may_be_missing(tmp_path: Path) -> None:
    folder = vit(tmp_path / "vit", auto_map={"AutoModel": "modeling.Model"}, _name_or_path="/home/me")
    report = make(folder, terms="be kind")
    assert not {"auto_map", "_name_or_path"} & json.loads((report.folder.path / "config.json").read_text()).keys()
    names = load_file(report.folder.path / "model.safetensors").keys()
    assert not any(name.startswith(("classifier", "pooler")) for name in names)
    assert report.folder.config.provenance["terms"] == "be kind"


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def text_model(out: Path) -> None:
    shutil.rmtree(out)
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=99)
    transformers.BertModel(config).save_pretrained(out)
    processor: Any = transformers.ViTImageProcessor
    processor().save_pretrained(out)


def only_pickles(out: Path) -> None:
    (out / "model.safetensors").rename(out / "pytorch_model.bin")


def shards(out: Path, place: object) -> None:
    (out / "model.safetensors").rename(out / "model-00001-of-00001.safetensors")
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"vit.embeddings.cls_token": place}}))


KEY = "vit.encoder.layer.0.intermediate.dense.weight"

BAD: dict[str, tuple[Callable[[Path], object], dict[str, Any], str]] = {
    "no config": (lambda out: (out / "config.json").unlink(), {}, "holds no config.json, so it is no model of transf"),
    "damaged config": (lambda out: (out / "config.json").write_text("{"), {}, "config.json is not valid JSON"),
    "a list": (lambda out: (out / "config.json").write_text("[]"), {}, "config.json must hold an object"),
    "no type": (lambda out: change(out, "config.json", model_type=None), {}, "names no model_type"),
    "ours": (lambda out: change(out, "config.json", robustfeat={}), {}, "is a model folder of robustfeat already; use"),
    "timm's": (lambda out: change(out, "config.json", model_type=None, architecture="vit"), {}, "import timm:local"),
    "pickles": (only_pickles, {}, "holds neither model.safetensors nor an ONNX file.*; pytorch_model.bin may run code"),
    "no processor": (lambda out: (out / "preprocessor_config.json").unlink(), {}, "holds no preprocessor_config.json"),
    "video processor": (
        lambda out: change(out, "preprocessor_config.json", image_processor_type="VideoMAEImageProcessor"), {},
        "image_processor_type 'VideoMAEImageProcessor' is not supported",
    ),
    "two sides": (
        lambda out: change(out, "preprocessor_config.json", size={"height": 32, "width": 64}), {}, "must be a square"
    ),
    "other size": (
        lambda out: change(out, "preprocessor_config.json", size={"height": 64, "width": 64}), {},
        "ViTModel fails on images of 64 px",
    ),
    "texts": (text_model, {}, "BertModel takes input_ids, not images"),
    "quantised": (lambda out: change(out, "config.json", quantization_config={}), {}, "its weights are quantised"),
    "code for images": (
        lambda out: change(out, "preprocessor_config.json", auto_map={"AutoImageProcessor": "a.B"}), {},
        "auto_map names code to prepare images, which never runs",
    ),
    "code": (
        lambda out: change(out, "config.json", model_type="mine", auto_map={"AutoModel": "a.B"}), {},
        "has no model type 'mine' and would need code of the repository, which is never run",
    ),
    "files of timm": (
        lambda out: change(out, "config.json", model_type="timm_wrapper", architecture="local-dir:/home/me"), {},
        "architecture in its config.json may name files or repositories, which are not opened",
    ),
    "other repositories": (
        lambda out: change(out, "config.json", vision_config={"backbone": "org/name"}), {},
        "backbone in its config.json",
    ),
    "many layers": (
        lambda out: change(out, "config.json", num_hidden_layers=10**8), {},
        "num_hidden_layers in its config.json must be at most 1000; got 100000000",
    ),
    "many stages": (
        lambda out: change(out, "config.json", depths=[2, 10**8]), {}, "depths in its config.json must be at most 1000",
    ),
    "wide layers": (
        lambda out: change(out, "config.json", intermediate_size=10**9), {}, "a network of more than 2 GB of weights",
    ),
    "odd config": (lambda out: change(out, "config.json", hidden_size="wide"), {}, "transformers cannot load it"),
    "other shape": (
        lambda out: edit_weights(out, lambda state: state.update({KEY: torch.zeros(3, 32)})), {},
        r"has the shape \(3, 32\), ViTModel needs \(64, 32\)",
    ),
    "lacking": (
        lambda out: edit_weights(out, lambda state: state.pop(KEY)), {},
        "its weights lack layers.0.mlp.fc1.weight; pass another `pooling`, or use complete weights",
    ),
    "other names": (
        lambda out: edit_weights(out, lambda state: [state.update({f"x{key}": state.pop(key)}) for key in list(state)]),
        {}, "its weights have other names than those of ViTModel",
    ),
    "damaged": (lambda out: (out / "model.safetensors").write_bytes(bytes(99)), {}, "model.safetensors cannot be read"),
    "shard elsewhere": (lambda out: shards(out, "../w.safetensors"), {}, "lists '../w.safetensors', which is not"),
    "shard missing": (lambda out: shards(out, "b.safetensors"), {}, "lists 'b.safetensors', which is not there"),
    "odd shards": (lambda out: shards(out, 3), {}, "lists '3', which is not there"),
    "pooler": (lambda out: None, {"pooling": "pooler"}, "its weights lack pooler.dense.bias and 1 more; pass another"),
    "embeds": (lambda out: None, {"pooling": "embeds"}, "pooling=embeds: .* has no output image_embeds"),
    "calibration": (lambda out: None, {"int8": True, "calibration": "nosuch"}, "nosuch"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_used_is_named_in_one_line_and_nothing_is_left(tmp_path: Path, case: str) -> None:
    edit, options, message = BAD[case]
    edit(vit(tmp_path / "vit"))
    with pytest.raises(RobustFeatError, match=message) as caught:
        make(tmp_path / "vit", **options)
    assert "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["vit"]


def test_a_network_of_too_many_parts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_size, "_MOST_MODULES", 10)
    with pytest.raises(RobustFeatError, match="describes a network of more than 10 modules"):
        make(vit(tmp_path / "vit"))
    torch.nn.Sequential(*(torch.nn.Identity() for _ in range(20)))  # others may be larger


def test_an_image_processor_that_prepares_other_pixels_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one whose steps change in a later version of transformers."""
    from robustfeat.training.export import transformers_import

    honest = transformers_import._transformers_inputs
    monkeypatch.setattr(transformers_import, "_transformers_inputs", lambda *given: np.roll(honest(*given), 1, axis=3))
    with pytest.raises(RobustFeatError, match=r"its image processor gives other pixels \(by \d+ of 255 levels\)"):
        make(vit(tmp_path / "vit"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["vit"]
