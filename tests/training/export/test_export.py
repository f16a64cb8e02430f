"""Exported and imported folders: they agree with PyTorch and timm, and a disagreement leaves nothing behind."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torch import nn
from torchvision.models import get_model

import robustfeat.training.export.folder as export_module
from robustfeat import FeatureExtractor
from robustfeat.errors import DataError, ExportError, InputError
from robustfeat.hub.catalog import resolve_model
from robustfeat.hub.folder import ModelFolder
from robustfeat.hub.preprocessing import Preprocessing, decode, preprocess
from robustfeat.serving.verify import MIN_COSINE, cosine
from robustfeat.training.export.backbones import import_backbone
from robustfeat.training.export.compact import expand_folder
from robustfeat.training.export.folder import ExportReport
from robustfeat.training.export.golden import verify_with_timm, verify_with_torch
from robustfeat.training.export.runs import export_run
from robustfeat.training.loop.checkpoint import load_checkpoint
from robustfeat.training.network import build_network
from tests.conftest import Run
from tests.training import small


def timm_features(folder: Path, files: list[Path]) -> np.ndarray:
    """timm alone: its own loading and its own preprocessing."""
    outputs = ModelFolder(folder).config.feature_outputs
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=outputs).eval()
    transform = create_transform(**resolve_model_data_config(model))
    from PIL import Image

    with torch.no_grad():
        features: torch.Tensor = model(torch.stack([transform(Image.open(file).convert("RGB")) for file in files]))
    return features.numpy()


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return import_torchvision("resnet18", tmp_path_factory.mktemp("resnet18"))


@pytest.fixture(scope="module")
def resnet50(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return import_torchvision("resnet50", tmp_path_factory.mktemp("resnet50"))


def import_torchvision(name: str, root: Path) -> Path:
    """torchvision's network with seeded weights from a file."""
    torch.manual_seed(0)
    torch.save(get_model(name).state_dict(), root / "weights.pt")
    import_backbone(f"torchvision:{name}", root / "model", weights=root / "weights.pt", image_size=64, int8=False)
    return root / "model"


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """timm's smallest ViT with seeded weights from a safetensors file."""
    root = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), root / "weights.safetensors")
    import_backbone("timm:test_vit", root / "model", weights=root / "weights.safetensors", int8=False)
    return root / "model"


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("builtin", 512),
        ("model", 512),
        ("resnet18", 512),
        pytest.param("resnet50", 2048, marks=pytest.mark.slow),  # 25 million weights, and 160 layers to export
        ("vit", 64),
    ],
)
def test_timm_gives_the_features_of_embed(
    request: pytest.FixtureRequest, example_files: list[Path], name: str, size: int
) -> None:
    folder = resolve_model("builtin").path if name == "builtin" else request.getfixturevalue(name)
    ours = FeatureExtractor.from_pretrained(folder).embed(example_files[::2])
    assert ours.shape == (20, size)
    assert cosine(ours, timm_features(folder, example_files[::2])).min() >= 0.9999


def test_openvino_reads_the_builtin_model_too(example_files: list[Path]) -> None:
    import openvino

    extractor = FeatureExtractor.from_pretrained()
    core = openvino.Core()
    compiled = core.compile_model(str(extractor.folder.onnx("fp32")), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    inputs = preprocess([decode(file.read_bytes()) for file in example_files[:8]], extractor.config.preprocessing)
    assert cosine(compiled(inputs)["features"], extractor.embed(example_files[:8])).min() >= 0.9999


def test_int8_is_close_and_smaller(example_files: list[Path]) -> None:
    folder = resolve_model("builtin")
    exact = FeatureExtractor.from_pretrained().embed(example_files)
    fast = FeatureExtractor.from_pretrained(precision="int8").embed(example_files)
    assert cosine(exact, fast).min() >= 0.98
    assert folder.onnx("int8").stat().st_size < 0.6 * (folder.path / "model.safetensors").stat().st_size


def test_weights_are_the_checkpoints(model: Path, finished_run: Path) -> None:
    weights, checkpoint = load_file(model / "model.safetensors"), load_checkpoint(finished_run).model
    assert weights.keys() == checkpoint.keys()
    assert all(torch.equal(value, checkpoint[key]) for key, value in weights.items())
    build_network(10).load_state_dict(weights)


def test_training_json_tells_how_the_model_was_made(model: Path) -> None:
    training = json.loads((model / "training.json").read_text())
    assert training["recipe"]["method"] == "hrrl"
    assert len(training["classes"]) == 10
    assert [line["event"] for line in training["metrics"]] == ["train", "epoch"] * 2
    assert training["data"]["images"] == 30
    assert "root" not in training["data"]


def test_nothing_in_a_folder_tells_of_the_machine_that_made_it(model: Path, finished_run: Path, dataset: Path) -> None:
    import onnx

    places = [str(dataset), str(finished_run.parent), str(Path(export_module.__file__).parents[3])]
    for file in model.rglob("*"):
        if file.is_file():
            data = file.read_bytes()
            assert not any(place.encode() in data for place in places), file
    graph = onnx.load(model / "onnx" / "model.onnx").graph
    assert not any(node.doc_string or node.metadata_props for node in graph.node)


@pytest.fixture(scope="module")
def compact(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    return export_run(finished_run, tmp_path_factory.mktemp("compact") / "model", int8=False, compact=True)


def test_a_compact_folder_stores_its_weights_once(
    compact: ExportReport, model: Path, example_files: list[Path]
) -> None:
    assert compact.cosines["fp32"] >= 0.9999
    assert compact.folder.size_bytes() < 0.3 * ModelFolder(model).size_bytes()
    features = FeatureExtractor.from_pretrained(compact.folder.path).embed(example_files)
    assert cosine(features, FeatureExtractor.from_pretrained(model).embed(example_files)).min() >= 0.9999
    assert cosine(features, timm_features(compact.folder.path, example_files)).min() >= 0.9999


def test_an_expanded_folder_gives_the_same_features_bit_for_bit(
    compact: ExportReport, tmp_path: Path, example_files: list[Path]
) -> None:
    plain = expand_folder(compact.folder, tmp_path / "plain")
    assert not plain.compact
    assert not (plain.path / "model.onnx").exists()
    features = [
        FeatureExtractor.from_pretrained(folder.path).embed(example_files) for folder in (compact.folder, plain)
    ]
    assert features[0].tobytes() == features[1].tobytes()


@pytest.mark.slow
def test_results_licence_and_datasets_reach_the_card(robustfeat: Run, finished_run: Path, tmp_path: Path) -> None:
    evaluation = {"dataset": "Clothes", "dataset_id": "clothes", "metric": "accuracy", "value": 61.5}
    (tmp_path / "results.json").write_text(json.dumps({"evaluations": [evaluation], "Speed": "fast"}))
    arguments = [
        "export",
        finished_run,
        "--out",
        tmp_path / "model",
        "--no-int8",
        "--results",
        tmp_path / "results.json",
    ]
    result = robustfeat(*arguments, "--license", "mit", "--dataset", "org/clothes", "--terms", "be kind")
    assert result.returncode == 0, result.stderr
    card = (tmp_path / "model" / "README.md").read_text()
    for text in (
        "license: mit",
        "- org/clothes",
        "value: 61.5",
        "| Clothes | test |  | accuracy | 61.5 |",
        "Speed: fast",
        "be kind",
    ):
        assert text in card
    (tmp_path / "results.json").write_text(json.dumps({"evaluations": [evaluation | {"value": "61.5 %"}]}))
    result = robustfeat(*arguments[:3], tmp_path / "other", *arguments[4:])
    assert result.returncode == 1
    assert "an evaluation's value must be a number; got '61.5 %'" in result.stderr
    assert not (tmp_path / "other").exists()


def test_image_size_and_crop_can_be_chosen_and_steps_are_said(
    narrow_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = export_run(narrow_run, tmp_path / "model", name="n", image_size=48, crop_pct=0.75, int8=False, quiet=False)
    contract = report.folder.config.preprocessing
    assert (contract.image_size, contract.resize_size) == (48, 64)
    assert capsys.readouterr().err.splitlines() == [
        "n: writing model.safetensors; PyTorch embeds the golden images",
        "n: writes onnx/model.onnx",
        "n: the golden images go through fp32 ONNX",
    ]
    assert not verify_with_torch(report.folder).short


@pytest.fixture
def exported(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ONNX file of `finished_run` is the one that its export to `model` made."""
    monkeypatch.setattr(export_module, "export_onnx", reuse_onnx(model))


def reuse_onnx(model: Path) -> Callable[[nn.Module, Preprocessing, Path], None]:
    """In the place of `export_onnx`, for the network that `model` was made of. The folder checks that it is."""

    def reuse(network: nn.Module, contract: Preprocessing, file: Path) -> None:
        file.parent.mkdir()
        shutil.copyfile(model / "onnx" / "model.onnx", file)

    return reuse


@pytest.mark.usefixtures("exported")
def test_int8_is_calibrated_on_the_runs_images(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound is lowered: a network after ten steps is no judge of int8's exactness."""
    monkeypatch.setitem(MIN_COSINE, "int8", 0.5)
    report = export_run(finished_run, tmp_path / "model")
    assert report.folder.precisions == ["fp32", "int8"]
    assert 0.5 <= report.cosines["int8"] < 1


@pytest.mark.usefixtures("exported")
def test_an_export_that_disagrees_leaves_nothing(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = export_module._torch_features
    monkeypatch.setattr(export_module, "_torch_features", lambda *given: -honest(*given))
    with pytest.raises(ExportError, match="fp32 ONNX disagrees with PyTorch"):
        export_run(finished_run, tmp_path / "model", int8=False)
    assert not list(tmp_path.iterdir())


def test_calibration_without_usable_images_is_explained(finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"junk")
    with pytest.raises(DataError, match="none of its images can be decoded"):
        export_run(finished_run, tmp_path / "model", calibration=tmp_path)


def test_an_unfinished_run_is_not_exported(dataset: Path, finished_run: Path, tmp_path: Path) -> None:
    import dataclasses

    from robustfeat.training.loop.checkpoint import save_checkpoint

    save_checkpoint(dataclasses.replace(load_checkpoint(finished_run), epoch=1), tmp_path)
    with pytest.raises(ExportError, match="training stands at epoch 1 of 2"):
        export_run(tmp_path, tmp_path / "model", int8=False)


def test_weights_that_do_not_fit_are_explained(tmp_path: Path) -> None:
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"w\.pt: does not fit timm:resnet18"):
        import_backbone("timm:resnet18", tmp_path / "model", weights=tmp_path / "w.pt")
    assert [entry.name for entry in tmp_path.iterdir()] == ["w.pt"]


def foreign_state(network: nn.Module) -> dict[str, torch.Tensor]:
    """The network's tensors as another implementation might name them, in the same order."""
    state = network.state_dict()
    return {f"_part{place}.{name.rpartition('.')[2]}": value for place, (name, value) in enumerate(state.items())}


def test_weights_of_another_implementation_are_named_by_order_and_shape(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights as `small_model`'s, whose ONNX file is reused."""
    monkeypatch.setattr(export_module, "export_onnx", reuse_onnx(small_model))
    torch.manual_seed(0)
    network = timm.create_model("test_resnet")
    torch.save(foreign_state(network), tmp_path / "weights.pth")
    import_backbone("timm:test_resnet", tmp_path / "model", weights=tmp_path / "weights.pth", image_size=32, int8=False)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    for name, value in network.state_dict().items():
        torch.testing.assert_close(stored[name], value, rtol=0, atol=0)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert "weights weights.pth, named by order and shape" in json.dumps(config)


@pytest.mark.parametrize("change", ["order", "kind", "count", "names", "format"])
def test_weights_in_doubt_are_not_named_by_order(tmp_path: Path, change: str) -> None:
    network = timm.create_model("test_resnet")
    state = foreign_state(network)
    if change == "order":
        state = dict(reversed(state.items()))
    elif change == "kind":
        state = {name.replace(".running_mean", ".running_var"): value for name, value in state.items()}
    elif change == "count":
        state.popitem()
    elif change == "names":
        state = {"conv1.0.weight" if place == 0 else name: v for place, (name, v) in enumerate(state.items())}
        assert "conv1.0.weight" in network.state_dict()
    file = tmp_path / ("w.safetensors" if change == "format" else "w.pth")
    save_file(state, file) if change == "format" else torch.save(state, file)
    with pytest.raises(InputError, match="does not fit timm:test_resnet"):
        import_backbone("timm:test_resnet", tmp_path / "model", weights=file, int8=False)


@pytest.mark.parametrize("classes", [0, 7])
def test_weights_for_other_classes_or_none_are_imported(classes: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=classes).eval()
    saved = {"model": network.state_dict(), "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    torch.save(saved, tmp_path / "weights.pth")
    folder = import_backbone(
        "timm:test_resnet", tmp_path / "model", weights=tmp_path / "weights.pth", image_size=32, int8=False
    ).folder
    assert folder.config.num_classes == classes
    assert not verify_with_torch(folder).short
    network.reset_classifier(0)  # type: ignore[operator]
    images = [decode(data) for data in folder.golden()[0]]
    with torch.no_grad():
        expected = network(torch.from_numpy(preprocess(images, folder.config.preprocessing))).numpy()
    np.testing.assert_allclose(FeatureExtractor.from_pretrained(folder.path).embed(images), expected, atol=1e-4)


def test_a_trained_network_of_a_fixed_size_loads_in_timm(dataset: Path, tmp_path: Path) -> None:
    small.run(dataset, tmp_path / "run", small.recipe(dataset, network="timm:test_vit", epochs=1))
    with pytest.raises(InputError, match=r"image_size=48: its network takes images of 32 px only"):
        export_run(tmp_path / "run", tmp_path / "model", image_size=48, int8=False)
    folder = export_run(tmp_path / "run", tmp_path / "model", int8=False).folder
    assert folder.config.fixed_input_size
    assert not verify_with_torch(folder).short
    assert not verify_with_timm(folder).short
