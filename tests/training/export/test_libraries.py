"""Networks of timm and torchvision with weights as people save them."""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn
from torchvision.models import get_model

from robustfeat.errors import ExportError, InputError
from robustfeat.hub.config import ModelConfig
from robustfeat.hub.folder import ModelFolder
from robustfeat.hub.preprocessing import Preprocessing
from robustfeat.training.export import downloads, libraries
from robustfeat.training.export.backbones import import_backbone
from robustfeat.training.export.golden import verify_with_timm, verify_with_torch
from robustfeat.training.export.libraries import MisfitError, open_network, rebuild_features
from robustfeat.training.weights import read_state
from tests.conftest import Run

State = dict[str, Tensor]


def make(name: str = "test_resnet", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = timm.create_model(name, **options).eval()
    return network


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


def other(state: State) -> State:
    return {name: value + 1 for name, value in state.items()}


def opened(tmp_path: Path, saved: Any, source: str = "timm:test_resnet", **options: Any) -> libraries.LibraryNetwork:
    """The network with weights that went through a file of `torch.save`."""
    torch.save(saved, tmp_path / "weights.pth")
    return open_network(source, state=read_state(tmp_path / "weights.pth"), ordered=True, **options)


def assert_same(network: nn.Module, state: State) -> None:
    own = network.state_dict()
    assert own.keys() == state.keys()
    for name, value in own.items():
        torch.testing.assert_close(value, state[name].to(value.dtype), rtol=0, atol=0)


OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
WRAPPED: dict[str, tuple[Callable[[State], Any], str]] = {
    "plain": (lambda state: state, ""),
    "data parallel": (lambda state: {"state_dict": under("module.", state), "epoch": 1}, "module"),
    "references": (lambda state: {"model": state, "optimizer": OPTIMIZER, "args": argparse.Namespace(lr=0.1)}, "model"),
    "averaged": (lambda state: {"model": other(state), "model_ema": under("module.", state)}, "model_ema.module"),
    "timm, averaged": (lambda state: {"state_dict": other(state), "state_dict_ema": state}, "state_dict_ema"),
    "dino": (
        lambda state: {
            "student": under("module.backbone.", other(state)),
            "teacher": under("backbone.", state) | {"head.mlp.0.weight": torch.ones(2, 2)},
            "dino_loss": {"center": torch.ones(1, 3)},
        },
        "teacher.backbone",
    ),
    "moco": (
        lambda state: {
            "state_dict": under("module.encoder_q.", state)
            | under("module.encoder_k.", other(state))
            | {"module.queue": torch.ones(3, 3)}
        },
        "module.encoder_q",
    ),
    "lightning": (
        lambda state: {
            "state_dict": under("model.backbone.", state) | {"model.criterion.weight": torch.ones(4)},
            "pytorch-lightning_version": "2.0",
            "callbacks": {},
        },
        "model.backbone",
    ),
    "compiled": (lambda state: {"model_state_dict": under("_orig_mod.module.", state)}, "_orig_mod.module"),
    "nested": (lambda state: {"checkpoint": {"run": {"network": state}}, "step": 3}, ""),
    "own module": (
        lambda state: under("feature_extractor.body.", state) | {"classify.weight": torch.ones(2, 2)},
        "feature_extractor.body",
    ),
    "named twice": (lambda state: under("net.", state) | under("alias.", state), "net"),
}


@pytest.mark.parametrize("form", WRAPPED)
def test_a_networks_weights_are_found_under_any_names(tmp_path: Path, form: str) -> None:
    wrap, place = WRAPPED[form]
    state = make().state_dict()
    result = opened(tmp_path, wrap(state))
    assert_same(result.network, state)
    assert result.notes == ((f"{place} in it",) if place else ())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precisions_become_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in make().state_dict().items()
    }
    result = opened(tmp_path, state)
    assert next(result.network.parameters()).dtype == torch.float32
    assert_same(result.network, state)


def test_old_weights_without_batch_counters_are_taken(tmp_path: Path) -> None:
    state = {name: value for name, value in make().state_dict().items() if "num_batches" not in name}
    result = opened(tmp_path, state)
    assert all(torch.equal(result.network.state_dict()[name], value) for name, value in state.items())


@pytest.mark.parametrize("classes", [0, 1, 7, 1000, 1001])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "efficientvit_m0"])
def test_a_classifier_for_any_classes_or_none_is_taken(tmp_path: Path, name: str, classes: int) -> None:
    state = make(name, num_classes=classes).state_dict()
    result = opened(tmp_path, {"model": state}, f"timm:{name}")
    assert result.num_classes == classes
    assert_same(result.network, state)


def test_a_classifier_with_layers_before_it_is_rebuilt(tmp_path: Path) -> None:
    """timm takes away the BatchNorm before this classifier, too, which is none of its own parameters."""
    result = opened(tmp_path, make("efficientvit_m0", num_classes=3).state_dict(), "timm:efficientvit_m0")
    config = ModelConfig("m", feature_size=192, num_classes=3, preprocessing=Preprocessing(224), **result.names)
    again, images = rebuild_features(config, result.network.state_dict()), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(again(images), result.feature_network()(images))


@pytest.mark.slow  # exporting it takes long
def test_layers_with_shared_weights_are_kept_by_each(tmp_path: Path) -> None:
    state = make("coat_tiny", num_classes=3).state_dict()
    torch.save(state, tmp_path / "weights.pth")
    weights, out = tmp_path / "weights.pth", tmp_path / "model"
    folder = import_backbone("timm:coat_tiny", out, weights=weights, image_size=64, int8=False).folder
    assert load_file(folder.path / "model.safetensors").keys() == state.keys()
    assert not verify_with_torch(folder).short
    assert not verify_with_timm(folder).short


@pytest.mark.slow  # exporting it takes long
def test_attention_whose_strides_the_exporter_mistakes_is_exported(tmp_path: Path) -> None:
    torch.save(make("test_maxvit").state_dict(), tmp_path / "weights.pth")
    weights, out = tmp_path / "weights.pth", tmp_path / "model"
    folder = import_backbone("timm:test_maxvit", out, weights=weights, image_size=64, int8=False).folder
    assert not verify_with_torch(folder).short
    assert not verify_with_timm(folder).short


def test_another_kind_of_classifier_is_left_out(tmp_path: Path) -> None:
    state = make(num_classes=0).state_dict()
    result = opened(tmp_path, state | {"fc.0.weight": torch.ones(9, 9), "fc.2.weight": torch.ones(3, 9)})
    assert result.num_classes == 0
    assert_same(result.network, state)


def test_two_classifiers_are_taken(tmp_path: Path) -> None:
    state = make("deit_tiny_distilled_patch16_224", num_classes=3, img_size=32).state_dict()
    result = opened(tmp_path, state, "timm:deit_tiny_distilled_patch16_224", image_size=32)
    assert result.num_classes == 3
    with torch.no_grad():
        assert result.feature_network()(torch.zeros(1, 3, 32, 32)).shape == (1, 192)


HARMLESS: dict[str, Any] = {
    "arguments": argparse.Namespace(lr=0.1, root=PurePosixPath("/data")),
    "a number": np.float64(0.1),
    "a count": np.int64(3),
    "a flag": np.bool_(True),
    "a dtype": np.dtype("float32"),
    "a type": np.float32,
    "a path": PurePosixPath("/data"),
    "a posix path": Path("/data"),
    "an ordered dict": collections.OrderedDict(a=1),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", HARMLESS)
def test_harmless_records_beside_weights_are_passed_over(tmp_path: Path, kind: str, zipped: bool) -> None:
    saved = {"model": {"a": torch.ones(2)}, "about": [HARMLESS[kind], {"nested": HARMLESS[kind]}]}
    torch.save(saved, tmp_path / "weights.pth", _use_new_zipfile_serialization=zipped)
    assert torch.equal(read_state(tmp_path / "weights.pth")["a"], torch.ones(2))


UNREACHABLE = """
import sys, time
from robustfeat.errors import InputError
from robustfeat.training.export.backbones import import_backbone
began = time.monotonic()
try:
    import_backbone(sys.argv[1], sys.argv[2], quiet=False)
except InputError as exc:
    print(time.monotonic() - began < 10, exc)
"""


def test_weights_that_cannot_be_downloaded_are_named_soon(python: Run, tmp_path: Path) -> None:
    """The Hub's client alone would try for most of a minute, and say nothing."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # nobody listens there
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        env |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}
        said = python(UNREACHABLE, "timm:test_resnet", tmp_path / "model", env=env)
    assert said.returncode == 0, said.stderr
    assert re.match(r"True timm:test_resnet: its weights cannot be downloaded \(.*; pass `weights=FILE`", said.stdout)
    assert "timm:test_resnet: takes the library's weights, and downloads them if its cache lacks them" in said.stderr
    assert not (tmp_path / "model").exists()


def test_a_server_that_falls_silent_ends_a_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "_SILENCE_S", 0.2)
    with socket.socket() as server, pytest.raises(OSError, match="timed out"), downloads.limited_silence():
        server.bind(("127.0.0.1", 0))
        server.listen()
        urllib.request.urlopen(f"http://127.0.0.1:{server.getsockname()[1]}")
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize(
    ("saved", "reason"),
    [
        (nn.Linear(2, 2), "holds torch.nn.modules.linear.Linear, which runs code"),
        ({"a": torch.ones(2), "b": np.ones(2)}, "holds numpy._core.multiarray._reconstruct, numpy.ndarray, which"),
        ({"a": torch.ones(2), "b": collections.defaultdict(list)}, "collections.defaultdict"),
        ({"a": torch.ones(2), "b": print}, "holds builtins.print, which runs code when it is loaded: save tensors"),
        ([torch.ones(2)], "holds a list, not tensors by name"),
        (argparse.Namespace(a=1), "holds a Record, not tensors by name"),
        ({"epoch": 3, "config": {"lr": 0.1}}, r"no tensors by name; found: epoch \(int\), config \(dict\)"),
        ({}, "no tensors by name; found: nothing"),
    ],
)
def test_a_file_without_plain_tensors_is_refused_by_what_it_holds(tmp_path: Path, saved: Any, reason: str) -> None:
    torch.save(saved, tmp_path / "weights.pth")
    with pytest.raises(InputError, match=reason) as caught:
        import_backbone("timm:test_resnet", tmp_path / "model", weights=tmp_path / "weights.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_program_is_named_as_such(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="TorchScript program"):
        read_state(tmp_path / "weights.pt")


@pytest.mark.parametrize("shape", ["self", "ring", "deep", "wide"])
def test_dictionaries_in_dictionaries_end(tmp_path: Path, shape: str) -> None:
    held: dict[str, Any] = {"a": torch.ones(2)}
    if shape == "self":
        held["again"] = held
    elif shape == "ring":
        held["b"] = {"c": {"d": held, "e": torch.ones(1)}}
    elif shape == "deep":
        inner = held
        for _ in range(100):
            inner["b"] = {"a": torch.ones(1)}
            inner = inner["b"]
    else:  # 2 ** 60 ways to the innermost
        inner = {"t": torch.ones(1)}
        for _ in range(60):
            inner = {"x": inner, "y": inner}
        held["b"] = inner
    torch.save(held, tmp_path / "weights.pth")
    state = read_state(tmp_path / "weights.pth")
    assert torch.equal(state["a"], torch.ones(2))
    assert len(state) < 20


def drop(name: str) -> Callable[[State], State]:
    return lambda state: {key: value for key, value in state.items() if key != name}


MISFITS: dict[str, tuple[str, Callable[[State], Any], str]] = {
    "one missing": ("test_resnet", drop("conv1.0.weight"), r"it has no conv1\.0\.weight \(16, 3, 3, 3\); there are"),
    "another width": (
        "test_resnet",
        lambda state: state | {"conv1.0.weight": torch.ones(24, 3, 3, 3)},
        r"conv1\.0\.weight: expected \(16, 3, 3, 3\), got \(24, 3, 3, 3\)",
    ),
    "a deeper network": (
        "test_resnet",
        lambda state: {"state_dict": under("module.", state) | {"module.layer4.1.conv1.weight": torch.ones(1)}},
        r"the network has no layer4\.1\.conv1\.weight; there are under module \d+ tensors: conv1",
    ),
    "other patches": (
        "test_vit",
        lambda state: state | {"patch_embed.proj.weight": torch.ones(64, 3, 8, 8)},
        r"patch_embed\.proj\.weight: expected \(64, 3, 16, 16\), got \(64, 3, 8, 8\)",
    ),
    "twice": (
        "test_resnet",
        lambda state: {"generator": state, "judge": other(state)},
        "holds these weights more than once, under 'judge.' and under 'generator.': save one",
    ),
    "another network": (
        "test_resnet",
        lambda state: {"model": {"a": torch.ones(2), "b": torch.ones(3, 4)}},
        r"it has no conv1\.0\.weight .*; there are 2 tensors: a \(2,\), b \(3, 4\)\)",
    ),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_weights_of_another_network_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    name, change, reason = MISFITS[kind]
    torch.save(change(make(name).state_dict()), tmp_path / "weights.pth")
    with pytest.raises(InputError, match=rf"does not fit timm:{name} \({reason}") as caught:
        import_backbone(f"timm:{name}", tmp_path / "model", weights=tmp_path / "weights.pth")
    assert "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["weights.pth"]


@pytest.mark.parametrize(
    ("name", "size", "fixed"),
    [
        ("test_vit", 96, True),
        ("test_vit", 224, True),
        ("test_vit2", 64, True),
        ("test_coatnet", 64, True),
        ("test_maxvit", 128, True),
        ("test_vit_relpos", 64, True),
        ("test_resnet", 64, False),
        ("deit_tiny_patch16_224", 64, True),
    ],
)
def test_a_network_is_made_for_the_size_of_its_images(tmp_path: Path, name: str, size: int, fixed: bool) -> None:
    state = make(name).state_dict()
    result = opened(tmp_path, state, f"timm:{name}", image_size=size)
    assert result.names["fixed_input_size"] is fixed
    assert result.settings["image_size"] == size
    resized = [key for key, value in result.network.state_dict().items() if value.shape != state[key].shape]
    assert all("pos" in key for key in resized)
    config = ModelConfig("m", feature_size=1, num_classes=1000, preprocessing=Preprocessing(size), **result.names)
    saved = result.network.state_dict()
    again, images = rebuild_features(config, saved), torch.randn(1, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(again(images), result.feature_network()(images))


def test_position_embeddings_are_interpolated_as_timm_does(tmp_path: Path) -> None:
    save_file(make("test_vit").state_dict(), tmp_path / "model.safetensors")
    overlay = {"file": str(tmp_path / "model.safetensors")}
    theirs = timm.create_model("test_vit", pretrained=True, pretrained_cfg_overlay=overlay, img_size=96)
    result = open_network("timm:test_vit", image_size=96, state=load_file(tmp_path / "model.safetensors"))
    assert_same(result.network, theirs.state_dict())
    assert result.notes == ("converted by timm",)


def test_names_of_a_networks_authors_are_converted_by_timm(tmp_path: Path) -> None:
    """Facebook's ConvNeXt, under a prefix, for ten classes."""
    state = make("test_convnext", num_classes=10).state_dict()
    names = {"stem.0": "downsample_layers.0.0", "stem.1": "downsample_layers.0.1", "head.fc": "head"}
    theirs = {}
    for name, value in state.items():
        for mine, their in names.items():
            name = name.replace(mine, their)  # noqa: PLW2901
        for stage in range(4):
            name = name.replace(f"stages.{stage}.downsample", f"downsample_layers.{stage}")  # noqa: PLW2901
        name = name.replace(".blocks.", ".").replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")  # noqa: PLW2901
        theirs[name.replace("head.norm", "norm")] = value
    result = opened(tmp_path, {"model": under("module.", theirs)}, "timm:test_convnext")
    assert_same(result.network, state)
    assert result.notes == ("module in it", "converted by timm")


@pytest.mark.parametrize("crop_mode", ["squash", "border"])
def test_timm_crops_as_we_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crop_mode: str) -> None:
    """With the settings of timm's networks that squash or pad, all of which are large, on a small one."""
    changes = {"crop_mode": crop_mode, "crop_pct": 1.0, "input_size": (3, 64, 64)}
    settings = resolve_model_data_config(make()) | changes
    monkeypatch.setattr(libraries, "resolve_model_data_config", lambda _: settings)
    torch.save(make().state_dict(), tmp_path / "weights.pth")
    folder = import_backbone(
        "timm:test_resnet", tmp_path / "model", weights=tmp_path / "weights.pth", int8=False
    ).folder
    assert folder.config.preprocessing.crop_mode == crop_mode
    assert not verify_with_torch(folder).short
    assert not verify_with_timm(folder).short


def test_timm_is_told_the_size_of_a_fixed_network(tmp_path: Path) -> None:
    torch.save(make("test_vit").state_dict(), tmp_path / "weights.pth")
    import_backbone("timm:test_vit", tmp_path / "model", weights=tmp_path / "weights.pth", image_size=96, int8=False)
    folder = ModelFolder(tmp_path / "model")
    assert not verify_with_timm(folder).short
    data = json.loads(folder.config_bytes)
    assert data["pretrained_cfg"]["fixed_input_size"] is True
    from transformers import AutoModel

    theirs = AutoModel.from_pretrained(folder.path).eval()
    ours = rebuild_features(folder.config, load_file(folder.path / "model.safetensors"))
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images).pooler_output, ours(images))


@pytest.mark.parametrize("classes", [0, 5])
@pytest.mark.parametrize(
    "name", ["shufflenet_v2_x0_5", "mobilenet_v3_small", "mnasnet0_5", "efficientnet_b0", "googlenet", "regnet_y_400mf"]
)
def test_a_network_of_torchvision_alone_is_taken(tmp_path: Path, name: str, classes: int) -> None:
    torch.manual_seed(0)
    network = get_model(
        name, num_classes=classes or 2, **({"init_weights": False} if name == "googlenet" else {})
    ).eval()
    state = network.state_dict()
    classifier = [key for key, layer in network.named_modules() if isinstance(layer, nn.Linear)][-1]
    if not classes:
        state = {key: value for key, value in state.items() if not key.startswith(f"{classifier}.")}
    result = opened(tmp_path, {"model": under("module.", state)}, f"torchvision:{name}", image_size=64)
    assert (result.names["architecture"], result.num_classes) == (f"torchvision:{name}", classes)
    assert result.names["classifier"] == classifier
    config = ModelConfig("m", feature_size=1, num_classes=classes, preprocessing=Preprocessing(64), **result.names)
    again, images = rebuild_features(config, result.network.state_dict()), torch.randn(1, 3, 64, 64)
    network.set_submodule(classifier, nn.Identity())
    with torch.no_grad():
        expected = network(images)
        torch.testing.assert_close(result.feature_network()(images), expected)
        torch.testing.assert_close(again(images), expected)


@pytest.mark.slow  # 88 million weights
def test_a_vit_of_torchvision_is_made_for_the_size_of_its_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = get_model("vit_b_32", image_size=96, num_classes=3).state_dict()
    result = opened(tmp_path, state, "torchvision:vit_b_32", image_size=64)
    assert result.network.state_dict()["encoder.pos_embedding"].shape == (1, 5, 768)
    with torch.no_grad():
        assert result.feature_network()(torch.zeros(1, 3, 64, 64)).shape == (1, 768)


def test_a_folder_of_torchvision_says_that_timm_cannot_load_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(get_model("shufflenet_v2_x0_5", num_classes=3).state_dict(), tmp_path / "weights.pth")
    source, weights = "torchvision:shufflenet_v2_x0_5", tmp_path / "weights.pth"
    folder = import_backbone(source, tmp_path / "model", weights=weights, image_size=32, int8=False).folder
    assert folder.config.architecture == source
    assert not verify_with_torch(folder).short
    card = (folder.path / "README.md").read_text()
    assert "timm has no such network and cannot load this folder" in card
    assert 'torchvision.models.get_model("shufflenet_v2_x0_5", num_classes=3)' in card
    assert "timm.create_model" not in card


def test_a_network_without_a_linear_classifier_is_refused() -> None:
    with pytest.raises(InputError, match="torchvision:squeezenet1_0: has no linear classifier"):
        open_network("torchvision:squeezenet1_0", state={"a": torch.ones(1)})


@pytest.mark.parametrize(
    "source", ["timm:vit_huge_patch14_224", "timm:vit_giant_patch14_dinov2", "torchvision:vit_h_14"]
)
def test_a_network_over_2_gb_is_refused_before_it_is_made(source: str) -> None:
    with pytest.raises(ExportError, match=rf"{source}: has [\d,]+ million weights, \d\.\d GB in fp32"):
        open_network(source)


@pytest.mark.parametrize(
    ("source", "size", "reason"),
    [
        ("timm:nothing", None, "timm:nothing: unknown; see timm.list_models"),
        ("timm:nothing", 64, "timm:nothing: unknown; see timm.list_models"),
        ("torchvision:nothing", None, "unknown; see torchvision.models.list_models"),
        ("torchvision:fcn_resnet50", None, "unknown; see torchvision.models.list_models"),
        ("torchvision:vit_b_32", 100, "divisible by patch size.*; pass another `image_size`"),
        ("timm:xcit_nano_12_p16_224", 100, "; pass another `image_size`"),
    ],
)
def test_a_network_that_cannot_be_made_is_one_line(source: str, size: int | None, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        open_network(source, image_size=size, state={"a": torch.ones(1)})
    assert "\n" not in str(caught.value)


def test_positions_that_timm_does_not_interpolate_are_named() -> None:
    state = make("efficientformerv2_s0").state_dict()
    with pytest.raises(MisfitError, match=r"attention_biases: .*, which timm does not convert for this image size; "):
        open_network("timm:efficientformerv2_s0", image_size=64, state=state)


def test_weights_that_no_part_fits_name_a_few(tmp_path: Path) -> None:
    with pytest.raises(MisfitError, match=r"there are 4 tensors: a \(1,\), b \(1,\), c \(1,\), \.\.\.$"):
        open_network("timm:test_resnet", state={name: torch.ones(1) for name in "abcd"})
