"""Models in the Hub's cache, whatever else lies there, and the list of public ones."""

from __future__ import annotations

import json
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import scan_cache_dir
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from robustfeat.hub.catalog import Listing, builtin_model, cached_models, public_models
from robustfeat.hub.outputs import read_outputs
from robustfeat.hub.remote import HubAccess, is_hub_name

PUBLIC: list[dict[str, Any]] = json.loads(resources.files("robustfeat.hub").joinpath("public_models.json").read_text())


def snapshot(cache: Path, repo: str, commit: str, *refs: str) -> Path:
    """A commit in the cache as the Hub's client lays it out: its config.json and a link to a blob."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    place, blobs = folder / "snapshots" / commit, folder / "blobs"
    place.mkdir(parents=True)
    blobs.mkdir(exist_ok=True)
    shutil.copy(builtin_model().path / "config.json", blobs / f"config-{commit}")
    (blobs / "weights").write_bytes(bytes(1000))
    (place / "config.json").symlink_to(f"../../blobs/config-{commit}")
    (place / "model.safetensors").symlink_to("../../blobs/weights")
    for ref in refs:
        (folder / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    return place


def test_models_are_those_that_the_hubs_client_finds(tmp_path: Path) -> None:
    for repo, commit, *refs in (("org/b", "1" * 40, "main", "refs/pr/1"), ("org/b", "2" * 40), ("a/a--c", "3" * 40)):
        snapshot(tmp_path, repo, commit, *refs)
    found = {(one.model, one.revision): one for one in cached_models(HubAccess(cache_dir=tmp_path))}
    expected = {
        (repo.repo_id, commit.commit_hash): commit
        for repo in scan_cache_dir(tmp_path).repos
        for commit in repo.revisions
    }
    assert found.keys() == expected.keys()
    for key, there in expected.items():
        assert set(found[key].refs) == there.refs
        assert found[key].size_bytes == there.size_on_disk
        assert (found[key].name, found[key].problem) == (builtin_model().config.name, None)


def test_a_damaged_snapshot_hides_no_other(tmp_path: Path) -> None:
    snapshot(tmp_path, "org/name", "1" * 40, "main")
    (snapshot(tmp_path, "org/name", "2" * 40) / "onnx.link").symlink_to("nowhere")
    (snapshot(tmp_path, "org/name", "3" * 40) / "config.json").unlink()
    (tmp_path / "models--org--name" / "refs" / "gone").write_text("4" * 40)  # a branch whose commit was deleted
    (tmp_path / "models--org--name" / "snapshots" / "junk").touch()
    (tmp_path / "models--empty").mkdir()
    (tmp_path / "datasets--org--name").mkdir()
    (tmp_path / "CACHEDIR.TAG").touch()
    problems = {one.revision: one.problem for one in cached_models(HubAccess(cache_dir=tmp_path))}
    assert problems == {"1" * 40: None, "2" * 40: "onnx.link is a broken link; pull the model again"}


def test_a_cache_that_is_not_there_holds_no_models(tmp_path: Path) -> None:
    assert list(cached_models(HubAccess(cache_dir=tmp_path / "none"))) == []


def test_the_public_models_say_what_a_user_needs() -> None:
    found = list(public_models())
    assert 5 <= len(found) <= 15
    assert len({one.model for one in found}) == len(found)
    for entry, listing in zip(PUBLIC, found, strict=True):
        assert set(entry) - {"model_type"} == {
            *("model", "features", "image_size", "download_bytes", "license", "accuracies"),
        }
        assert listing.size_bytes is not None
        assert 10**7 < listing.size_bytes < 10**9
        assert listing.license
        assert listing.scores
        for accuracy in entry["accuracies"]:
            assert set(accuracy) - {"builtin"} == {"task", "percent", "kind", "source"}
            assert 0 < accuracy.get("builtin", 1) < 100
            assert 0 < accuracy["percent"] < 100
            assert accuracy["kind"] in {"published", "measured"}
            assert accuracy["source"].startswith("https://" if accuracy["kind"] == "published" else "docs/models.md")
    assert sum("measured" in " ".join(one.scores) for one in found) >= 2


@pytest.mark.parametrize(
    "entry", [one for one in public_models() if one.model.startswith("timm:")], ids=lambda one: str(one.model)
)
def test_public_models_of_timm_are_as_timm_describes_them(entry: Listing) -> None:
    name = entry.model.removeprefix("timm:")
    about: Any = timm.get_pretrained_cfg(name, allow_unregistered=False)
    with torch.device("meta"):
        network = timm.create_model(name)
    whole = sum(value.numel() for value in network.state_dict().values()) * 4
    assert about.hf_hub_id == f"timm/{name}"
    assert (about.license, about.input_size[1]) == (entry.license, entry.image_size)
    assert network.num_features == entry.features
    assert entry.size_bytes == pytest.approx(whole, rel=0.01)


@pytest.mark.parametrize("entry", [one for one in PUBLIC if "model_type" in one], ids=lambda one: str(one["model"]))
def test_public_models_of_the_hub_are_of_types_that_transformers_knows(entry: dict[str, Any]) -> None:
    assert is_hub_name(entry["model"])
    config = CONFIG_MAPPING[entry["model_type"]]()
    assert config.model_type == entry["model_type"]
    assert read_outputs(config.to_dict()).prefix is not None  # of ours, too
