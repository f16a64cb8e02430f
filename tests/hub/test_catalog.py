"""Robustfeat's models in the Hub's cache, whatever else lies there."""

from __future__ import annotations

import shutil
from pathlib import Path

from huggingface_hub import scan_cache_dir

from robustfeat.hub.catalog import builtin_model, cached_models
from robustfeat.hub.remote import HubAccess


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
    assert problems == {"1" * 40: None, "2" * 40: "onnx.link is a link to nothing; pull the model again"}


def test_a_cache_that_is_not_there_holds_no_models(tmp_path: Path) -> None:
    assert list(cached_models(HubAccess(cache_dir=tmp_path / "none"))) == []
