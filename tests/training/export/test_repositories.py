"""Models of transformers and transformers.js, in folders and on the Hub, become model folders by one command."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from robustfeat import FeatureExtractor
from robustfeat.errors import HubError, RobustFeatError
from robustfeat.hub.folder import ModelFolder
from robustfeat.hub.remote import HubAccess
from robustfeat.serving.verify import cosine
from robustfeat.training.export.onnx_import import import_onnx_layout
from robustfeat.training.export.repository import open_repository
from tests.conftest import Repositories, Run, files_of, hub_environment
from tests.hub_server import FakeHub, Fault
from tests.training.export.bare_command import run_without_torch
from tests.training.export.onnx_networks import convolutional
from tests.transformers_models import reference_features

CARD = b"---\nlicense: mit\n---\n# A model\n"


def onnx_only(folder: Path, target: Path) -> Path:
    """A copy as transformers.js has it."""
    return Path(shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors")))


def published(folder: Path) -> dict[str, bytes]:
    """The files of a repository as people publish it: a card, a pickle and a program beside the rest."""
    return files_of(folder) | {"README.md": CARD, "pytorch_model.bin": b"pickle", "modeling.py": b"raise SystemExit"}


def assert_features(model: Path, folder: Path, files: list[Path], family: str = "dinov2") -> None:
    """They are those of transformers."""
    features = FeatureExtractor.from_pretrained(model, threads=1).embed(files)
    assert cosine(features, reference_features(family, folder, files, "pil")).min() >= 0.9999


@pytest.mark.slow
@pytest.mark.parametrize("family", ["dinov2", "clip"])
def test_a_folder_of_transformers_js_becomes_one_of_ours_without_torch(
    repositories: Repositories, tmp_path: Path, example_files: list[Path], family: str
) -> None:
    folder = onnx_only(repositories(family), tmp_path / "repository")
    way = ["--pooling", "pooler"] if family == "dinov2" else []
    done = run_without_torch("import", folder, "--out", tmp_path / "model", "--no-int8", "--name", "net-v1", *way)
    assert done.returncode == 0, done.stderr
    assert "net-v1; against ONNX Runtime: fp32 cosine 1.0" in done.stderr
    assert_features(tmp_path / "model", repositories(family), example_files[::4], family)
    made = ModelFolder(tmp_path / "model")
    assert len(made.golden()[0]) == 8
    assert "model.safetensors" not in made.config.files


IMPORT = ["import", "hf:org/dinov2", "--pooling", "pooler", "--no-int8", "--out"]


def assert_imported(hub: FakeHub, folder: Path, model: Path, files: list[Path], *, weights: bool) -> None:
    """From the private repository org/dinov2, without its code."""
    asked = " ".join(hub.requests)
    assert "modeling.py" not in asked
    assert "pytorch_model.bin" not in asked
    config = ModelFolder(model).config
    assert ("/model.safetensors" in asked) == ("model.safetensors" in config.files) == weights
    (commit,) = hub.model("org/dinov2").commits
    assert (config.name, config.provenance["license"], config.provenance["revision"]) == ("org-dinov2", "mit", commit)
    assert_features(model, folder, files)


def test_a_repository_is_imported_by_its_onnx_file_without_torch(
    repositories: Repositories, hub: FakeHub, tmp_path: Path, example_files: list[Path]
) -> None:
    hub.add("org/dinov2", published(repositories("dinov2")), private=True)
    environment = hub_environment(hub, tmp_path / "cache")
    done = run_without_torch(*IMPORT, tmp_path / "model", env=environment)
    assert done.returncode == 0, done.stderr
    assert_imported(hub, repositories("dinov2"), tmp_path / "model", example_files[::8], weights=False)
    hub.requests.clear()
    done = run_without_torch(*IMPORT, tmp_path / "again", env=environment | {"HF_HUB_OFFLINE": "1"})
    assert (done.returncode, hub.requests) == (0, []), done.stderr
    assert files_of(tmp_path / "again") == files_of(tmp_path / "model")


@pytest.mark.slow
def test_a_repository_is_imported_by_its_weights_with_torch(
    repositories: Repositories, hub: FakeHub, tmp_path: Path, example_files: list[Path], robustfeat: Run
) -> None:
    hub.add("org/dinov2", published(repositories("dinov2")), private=True)
    environment = hub_environment(hub, tmp_path / "cache")
    done = robustfeat(*IMPORT, tmp_path / "model", env=environment)
    assert done.returncode == 0, done.stderr
    assert_imported(hub, repositories("dinov2"), tmp_path / "model", example_files[::8], weights=True)
    done = robustfeat("verify", tmp_path / "model", "--quiet")
    assert (done.returncode, "pytorch     fp32  cosine 1.0" in done.stdout) == (0, True), done.stdout
    hub.requests.clear()
    done = robustfeat(*IMPORT, tmp_path / "again", env=environment | {"HF_HUB_OFFLINE": "1"})
    assert (done.returncode, hub.requests) == (0, []), done.stderr
    assert files_of(tmp_path / "again") == files_of(tmp_path / "model")


def private(hub: FakeHub) -> dict[str, Any]:
    hub.model("org/net").private = True
    return {"token": False}


def gated(hub: FakeHub) -> dict[str, Any]:
    hub.model("org/net").gated = True
    return {"token": "hf_bob"}


def fails(hub: FakeHub) -> dict[str, Any]:
    hub.faults.append(Fault("/api/models/org/net", 503, times=99))
    return {}


def gone(hub: FakeHub) -> dict[str, Any]:
    return {"endpoint": "http://127.0.0.1:9"}


def without(name: str) -> Callable[[FakeHub], dict[str, Any]]:
    def change(hub: FakeHub) -> dict[str, Any]:
        hub.commit(hub.model("org/net"), "main", {name: None})
        return {}

    return change


def damaged(hub: FakeHub) -> dict[str, Any]:
    hub.commit(hub.model("org/net"), "main", {"config.json": b"{"})
    return {}


def nothing(hub: FakeHub) -> dict[str, Any]:
    return {}


REFUSED: dict[str, tuple[str, str | None, Callable[[FakeHub], dict[str, Any]], str]] = {
    "unknown": ("hf:org/other", None, nothing, "org/other: no such model at http"),
    "revision": ("hf:org/net", "v9", nothing, "org/net: has no revision 'v9'; it has main"),
    "odd revision": (
        "hf:org/net",
        "a b",
        nothing,
        "org/net: the revision must be a branch, a tag or a commit; got 'a b'",
    ),
    "private": ("hf:org/net", None, private, "org/net: no such model .*, log in"),
    "gated": ("hf:org/net", None, gated, "org/net: access is gated; ask for it"),
    "fails": ("hf:org/net", None, fails, "org/net: .* fails or limits requests"),
    "gone": ("hf:org/net", None, gone, "org/net: http://127.0.0.1:9 cannot be reached"),
    "offline": (
        "hf:org/net",
        None,
        lambda hub: {"local_files_only": True},
        "org/net: is not in the cache, and HF_HUB_OFF",
    ),
    "no config": ("hf:org/net", None, without("config.json"), "hf:org/net: holds no config.json, so it is no model of"),
    "damaged": ("hf:org/net", None, damaged, "hf:org/net: config.json is not valid JSON"),
    "no network": (
        "hf:org/net",
        None,
        without("onnx/model.onnx"),
        "hf:org/net: holds neither model.safetensors nor an O",
    ),
    "no processor": (
        "hf:org/net",
        None,
        without("preprocessor_config.json"),
        "hf:org/net: holds no preprocessor_config",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_repository_that_cannot_be_imported_is_one_line(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    source, revision, change, message = REFUSED[case]
    hub.add("org/net", files_of(layout(tmp_path / "net")))
    access: dict[str, Any] = {"endpoint": hub.url, "token": "hf_alice", "cache_dir": tmp_path / "cache"}
    access |= change(hub)
    with pytest.raises(RobustFeatError, match=message) as caught:
        open_repository(source, revision, HubAccess(**access))
    assert "\n" not in str(caught.value)
    assert "hf_alice" not in str(caught.value)


def test_weights_that_were_altered_on_their_way_are_refused_and_not_kept(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    weights = bytes(range(256)) * 64
    hub.add("org/net", files_of(layout(tmp_path / "net")) | {"model.safetensors": weights})
    stored = hub.blob(hashlib.sha256(weights).hexdigest())
    access = HubAccess(endpoint=hub.url, token="hf_alice", cache_dir=tmp_path / "cache")
    repository = open_repository("hf:org/net", None, access)
    stored.write_bytes(weights[:-1] + b"\0")
    with pytest.raises(HubError, match=r"model\.safetensors was altered on its way; run the same command again"):
        repository.weight_files()
    stored.write_bytes(weights)
    (file,) = repository.weight_files()
    assert file.read_bytes() == weights


def test_weights_without_torch_say_what_to_install(tmp_path: Path) -> None:
    folder = layout(tmp_path / "net")
    (folder / "onnx" / "model.onnx").unlink()
    (folder / "model.safetensors").touch()
    done = run_without_torch("import", folder, "--out", tmp_path / "model")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "torch and transformers are not installed; pip install 'robustfeat[transformers]'" in done.stderr
    assert not (tmp_path / "model").exists()


def layout(out: Path, **options: Any) -> Path:
    """A small network in the layout of transformers.js."""
    out.mkdir()
    convolutional(out / "onnx" / "model.onnx", outputs=("pooler_output",), last="pooler_output", **options)
    (out / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    settings = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 32}, "crop_pct": 0.875}
    (out / "preprocessor_config.json").write_text(json.dumps(settings))
    return out


def rename(out: Path, name: str) -> None:
    (out / "onnx" / "model.onnx").rename(out / "onnx" / name)


def move_weights(out: Path) -> None:
    file = out / "onnx" / "model.onnx"
    onnx.save(onnx.load(file), file, save_as_external_data=True, location="model.onnx_data", size_threshold=0)


def lose_weights(out: Path) -> None:
    move_weights(out)
    (out / "onnx" / "model.onnx_data").unlink()


def edit(name: str, **changes: Any) -> Callable[[Path], object]:
    return lambda out: (out / name).write_text(json.dumps(json.loads((out / name).read_text()) | changes))


BAD: dict[str, tuple[Callable[[Path], object], dict[str, Any], str]] = {
    "quantised only": (
        lambda out: rename(out, "model_quantized.onnx"),
        {},
        "holds neither model.safetensors nor an ONNX",
    ),
    "damaged": (lambda out: (out / "onnx" / "model.onnx").write_bytes(b"junk"), {}, "not an ONNX file"),
    "no weights": (lose_weights, {}, "model.onnx_data"),
    "other side": (
        edit("preprocessor_config.json", size={"shortest_edge": 64}),
        {},
        "takes image .*32, 32.* no other size",
    ),
    "no cls": (lambda out: None, {"pooling": "cls"}, "pooling=cls: .* has no output last_hidden_state"),
    "no embeds": (lambda out: None, {"pooling": "embeds"}, "pooling=embeds: .* has no output image_embeds"),
    "processor": (edit("preprocessor_config.json", resample=9), {}, "resample 9 .* cannot be a preprocessing contract"),
    "calibration": (lambda out: None, {"calibration": "nosuch", "int8": True}, "nosuch"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_folder_that_cannot_be_imported_is_one_line(tmp_path: Path, case: str) -> None:
    change, options, message = BAD[case]
    folder = layout(tmp_path / "net")
    change(folder)
    with pytest.raises(RobustFeatError, match=message) as caught:
        import_onnx_layout(open_repository(str(folder)), tmp_path / "model", **({"int8": False} | options))
    assert "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["net"]


def test_weights_in_other_files_of_the_layout_are_taken(tmp_path: Path, example_files: list[Path]) -> None:
    features = []
    for name in ("inside", "beside"):
        folder = layout(tmp_path / name)
        if name == "beside":
            move_weights(folder)
        report = import_onnx_layout(open_repository(str(folder)), tmp_path / f"{name}-model", int8=False)
        features.append(FeatureExtractor.from_pretrained(report.folder.path, threads=1).embed(example_files[:4]))
    assert features[0].tobytes() == features[1].tobytes()
