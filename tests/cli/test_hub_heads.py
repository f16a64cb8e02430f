"""Heads on the Hub: pushed, pulled, pinned, used by name; the real client in new processes, and a Hub on loopback."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from robustfeat import FeatureExtractor, Head
from tests import built_in
from tests.cli.test_hub import changing, one_line
from tests.conftest import Run, files_of, hub_environment
from tests.hub_server import FakeHub, Fault, card_problems
from tests.serving.http.conftest import Server

Call = Callable[..., "subprocess.CompletedProcess[str]"]

LOAD = """
import sys
from robustfeat import Head
head = Head.from_pretrained({arguments})
print(head.revision, head.sha256, len(head.classes))
"""


@pytest.fixture
def call(robustfeat: Run, hub: FakeHub, tmp_path: Path) -> Call:
    """The command line as alice, with an empty cache."""

    def run(*arguments: object, token: str | None = "hf_alice", **environment: str) -> subprocess.CompletedProcess[str]:
        return robustfeat(*arguments, env=hub_environment(hub, tmp_path / "home", token, **environment))

    return run


@pytest.fixture
def published(hub: FakeHub, clothes: Path) -> FakeHub:
    """A Hub with the head as org/clothes."""
    hub.add("org/clothes", files_of(clothes))
    return hub


@pytest.fixture
def copy(clothes: Path, tmp_path: Path) -> Path:
    """The head in a folder of its own, as `svm fit` leaves it: with reports that show the training images."""
    folder = Path(shutil.copytree(clothes, tmp_path / "clothes"))
    for name in ("report.html", "report.md", "suspects.csv", "confusion.png"):
        (folder / name).write_bytes(b"made by svm fit")
    return folder


def sha256(folder: Path) -> str:
    return str(Head.load(folder).sha256)


def test_a_head_travels_and_answers_as_it_did(
    hub: FakeHub, call: Call, copy: Path, example_files: list[Path], tmp_path: Path
) -> None:
    (copy / "LICENSE").write_text("as you like")
    pushed = call("push", copy, "org/clothes", "--tag", "v1", "--license", "cc0-1.0")
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.splitlines() == [
        f"{hub.url}/org/clothes/tree/v1",
        'Head.from_pretrained("org/clothes", revision="v1")',
    ]
    assert "report.html, report.md, suspects.csv" in pushed.stderr
    assert sha256(copy) in pushed.stderr
    sent = {"LICENSE", "README.md", "confusion.png", "head.json", "head.safetensors"}
    assert set(hub.files("org/clothes")) == {*sent, ".gitattributes"}
    for name in ("head.json", "head.safetensors"):
        assert hub.read("org/clothes", name) == (copy / name).read_bytes()
    shutil.rmtree(copy)
    photos = example_files[::9]
    predict = ["svm", "predict", "org/clothes@v1", *photos, "--probabilities", "--json", "--quiet"]
    here = call(*predict)
    assert here.returncode == 0, here.stderr
    features = FeatureExtractor.from_pretrained().embed(photos)
    head = Head.load(next((tmp_path / "home").glob("hub/models--org--clothes/snapshots/*")))
    for line, expected in zip(here.stdout.splitlines(), head.probabilities(features), strict=True):
        np.testing.assert_allclose(list(json.loads(line)["probabilities"].values()), expected, rtol=1e-3, atol=1e-5)
    # Once more, without a network.
    offline = call(
        "svm", "predict", "org/clothes@v1", *photos, "--probabilities", "--json", "--quiet", HF_HUB_OFFLINE="1"
    )
    assert offline.stdout == here.stdout


def test_the_card_says_what_the_head_is_and_its_lines_work(
    hub: FakeHub, call: Call, python: Run, copy: Path, examples: Path, tmp_path: Path
) -> None:
    assert call("push", copy, "org/clothes", "--license", "cc0-1.0").returncode == 0
    card = hub.read("org/clothes", "README.md").decode()
    assert card_problems(card) == []
    assert "license: cc0-1.0" in card
    assert "ORG/NAME" not in card
    about = json.loads((copy / "head.json").read_text())
    for text in (*about["classes"], about["model"]["weights_sha256"], about["model"]["preprocessing_hash"], "accuracy"):
        assert text in card
    assert sha256(copy) in card
    shutil.copy(examples / "hat" / "hat-1.jpg", tmp_path / "photo.jpg")
    (tmp_path / "photos").symlink_to(examples / "hat")
    environment = hub_environment(hub, tmp_path / "home")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    result = python(code, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "['hat']"
    (block,) = re.findall(r"```bash\n(.*?)```", card, re.DOTALL)
    predict = block.splitlines()[0]
    assert predict == "robustfeat svm predict org/clothes photos/"
    arguments = [*predict.split()[1:4], examples / "hat"]
    assert call(*arguments, "--quiet").stdout.startswith("path,prediction,error,typicality,margin:dress")


def test_a_second_push_sends_nothing_and_keeps_an_edited_card(hub: FakeHub, call: Call, copy: Path) -> None:
    assert call("push", copy, "org/clothes", "--quiet").returncode == 0
    hub.requests.clear()
    again = call("push", copy, "org/clothes")
    assert "nothing was sent" in again.stderr
    assert changing(hub) == []
    assert b"\nlicense" not in hub.read("org/clothes", "README.md")  # none was stated
    edited = hub.read("org/clothes", "README.md") + b"\nEdited.\n"
    hub.commit(hub.model("org/clothes"), "main", {"README.md": edited})
    assert "nothing was sent" in call("push", copy, "org/clothes").stderr
    assert hub.read("org/clothes", "README.md") == edited
    # A license that is stated now replaces the card, and so does a card of the folder.
    assert call("push", copy, "org/clothes", "--license", "mit").returncode == 0
    assert b"license: mit" in hub.read("org/clothes", "README.md")
    (copy / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    assert call("push", copy, "org/clothes").returncode == 0
    assert b"# Mine" in hub.read("org/clothes", "README.md")
    refused = one_line(call("push", copy, "org/clothes", "--license", "mit"))
    assert "the folder has a card, which states the license; leave --license out" in refused


@pytest.mark.parametrize("license_id", ["mit", "our-own-terms"])
def test_a_head_that_is_fitted_again_keeps_its_license(hub: FakeHub, call: Call, copy: Path, license_id: str) -> None:
    assert call("push", copy, "org/clothes", "--license", license_id).returncode == 0
    again = copy.with_name("again")
    replace(Head.load(copy), scores={}).save(again)
    assert call("push", again, "org/clothes").returncode == 0
    card = hub.read("org/clothes", "README.md").decode()
    assert sha256(again) in card
    assert f": {license_id}\n" in card
    assert card_problems(card) == []
    assert call("push", again, "org/clothes", "--license", "cc0-1.0").returncode == 0
    assert "\nlicense: cc0-1.0\n" in hub.read("org/clothes", "README.md").decode()


def test_a_dry_run_and_a_proposal(published: FakeHub, call: Call, copy: Path) -> None:
    dry = call("push", copy, "org/new", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "add     head.json (" in dry.stdout
    assert "report" not in dry.stdout
    assert changing(published) == []
    proposed = call("push", copy, "org/clothes", "--create-pr", "--json")
    assert json.loads(proposed.stdout)["revision"] == "refs/pr/1"
    assert json.loads(proposed.stdout)["config_hash"] == sha256(copy)


def test_what_cannot_be_pushed_is_one_line_and_sends_nothing(
    hub: FakeHub, call: Call, copy: Path, small_fp32: Path
) -> None:
    hub.add("org/model", files_of(small_fp32))
    assert "the name is taken: it has a model (config.json)" in one_line(call("push", copy, "org/model"))
    hub.add("org/other", {"head.json": b"{}"})
    assert "has a head.json that is not robustfeat's" in one_line(call("push", copy, "org/other"))
    (copy / "notes.txt").write_text("token: hf_" + "a" * 34)
    assert "looks like a key or a password" in one_line(call("push", copy, "org/new"))
    (copy / "notes.txt").unlink()
    (copy / "head.safetensors").write_bytes((copy / "head.safetensors").read_bytes()[:-1] + b"\0")
    assert "altered or truncated" in one_line(call("push", copy, "org/new"))
    assert "--license is for heads" in call("push", small_fp32, "org/new", "--license", "mit").stderr
    assert changing(hub) == []


def test_a_model_is_not_pushed_over_a_head(published: FakeHub, call: Call, small_fp32: Path) -> None:
    assert "the name is taken: it has a head (head.json)" in one_line(call("push", small_fp32, "org/clothes"))


def test_pull_takes_heads(published: FakeHub, call: Call, clothes: Path, tmp_path: Path) -> None:
    published.commit(published.model("org/clothes"), "main", {"README.md": b"# A head"})
    pulled = call("pull", "org/clothes")
    assert pulled.returncode == 0, pulled.stderr
    folder = Path(pulled.stdout.strip())
    assert sorted(file.name for file in folder.iterdir()) == ["head.json", "head.safetensors"]
    assert f"10 classes on {built_in.NAME}" in pulled.stderr
    about = json.loads(call("pull", "org/clothes", "--out", tmp_path / "own", "--json").stdout)
    assert about["path"] == str(tmp_path / "own")
    assert about["revision"] == published.model("org/clothes").branches["main"]
    assert about["sha256"] == sha256(clothes)
    assert files_of(tmp_path / "own") == files_of(clothes) | {"README.md": b"# A head"}
    assert "--precision is for models" in call("pull", "org/clothes", "--precision", "int8").stderr
    assert call("pull", "org/clothes", "--config-hash", sha256(clothes)).returncode == 0
    wrong = one_line(call("pull", "org/clothes", "--config-hash", "0" * 64))
    assert "not the requested head" in wrong
    # What the cache holds is used without a network, and `--force` replaces it.
    (folder / "head.safetensors").resolve().write_bytes(b"damaged")
    damaged = one_line(call("svm", "predict", "org/clothes", tmp_path / "own"))
    assert "altered or truncated" in damaged
    assert "robustfeat pull org/clothes --force" in damaged
    assert call("pull", "org/clothes", "--force").returncode == 0
    assert (folder / "head.safetensors").read_bytes() == (clothes / "head.safetensors").read_bytes()


def test_an_altered_download_is_refused(published: FakeHub, call: Call) -> None:
    published.faults.append(Fault("head.json", "alter", times=9))
    assert re.search("altered|not a valid head|Consistency|checksum", one_line(call("pull", "org/clothes")))


def test_a_head_is_pinned_by_revision_and_hash(published: FakeHub, python: Run, clothes: Path, tmp_path: Path) -> None:
    repo = published.model("org/clothes")
    first, wanted = repo.branches["main"], sha256(clothes)
    repo.tags["v1"] = first
    other = Head.load(clothes).to_sklearn()
    Head.from_sklearn(other).save(tmp_path / "other")
    published.commit(repo, "main", files_of(tmp_path / "other"))
    environment = hub_environment(published, tmp_path / "home")

    def load(arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        return python(LOAD.format(arguments=arguments), env=environment | more)

    assert load('"org/clothes", revision="v1"').stdout.split() == [first, wanted, "10"]
    assert load(f'"org/clothes", sha256="{wanted}", revision="{first}"').stdout.split()[1] == wanted
    newest = load('"org/clothes"').stdout.split()
    assert newest[:2] == [repo.branches["main"], sha256(tmp_path / "other")]
    refused = load(f'"org/clothes", sha256="{wanted}"')
    assert "not the requested head" in refused.stderr
    # A commit in the cache is not asked for.
    published.requests.clear()
    assert load(f'"org/clothes", revision="{first}"').stdout.split()[0] == first
    assert published.requests == []
    assert load('"org/clothes", local_files_only=True').stdout.split() == newest
    missing = load('"org/clothes", revision="v9"')
    assert "has no revision 'v9'; it has main, v1" in missing.stderr


def test_mistakes_are_one_line(
    published: FakeHub, call: Call, small_fp32: Path, examples: Path, tmp_path: Path
) -> None:
    published.add("org/model", files_of(small_fp32))
    photo = examples / "hat" / "hat-1.jpg"
    predicted = one_line(call("svm", "predict", "org/model", photo))
    assert "org/model: is a model (config.json); expected a head" in predicted
    embedded = one_line(call("embed", photo, "--out", tmp_path / "f.npy", "--model", "org/clothes"))
    assert "org/clothes: is a head (head.json); expected a model" in embedded
    assert "no such model" in one_line(call("svm", "predict", "org/nothing", photo))
    assert "not a head" in one_line(call("svm", "predict", "nothing", photo))
    offline = one_line(call("svm", "predict", "org/clothes", photo, HF_HUB_OFFLINE="1"))
    assert "head.json is not in the cache" in offline
    published.add("org/empty", {"README.md": b""})
    both = one_line(call("pull", "org/empty"))
    assert "has no config.json or head.json, so it is not a model or head of robustfeat" in both


def test_nothing_of_a_repository_but_the_head_is_downloaded(
    published: FakeHub, call: Call, examples: Path, tmp_path: Path
) -> None:
    code = {"head.py": b"raise SystemExit", "head.pkl": b"a pickle", "report.html": b"<script>"}
    published.commit(published.model("org/clothes"), "main", code)
    predicted = call("svm", "predict", "org/clothes", examples / "hat", "--quiet")
    assert predicted.returncode == 0, predicted.stderr
    held = {file.name for file in (tmp_path / "home").glob("hub/models--org--clothes/snapshots/*/*")}
    assert held == {"head.json", "head.safetensors"}


def test_a_server_takes_a_pinned_head_and_info_shows_it(
    published: FakeHub, clothes: Path, example_files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = published.model("org/clothes").branches["main"]
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for name, value in hub_environment(published, tmp_path / "home").items():
        if name not in os.environ or name.startswith("HF_"):
            monkeypatch.setenv(name, value)
    server = Server("--head", f"wear=org/clothes@{commit}", "--head", "org/clothes@main", "--head", f"own={clothes}")
    try:
        heads = {head.pop("name"): head for head in server.get("/info").json["heads"]}
        assert list(heads) == ["wear", "clothes", "own"]
        expected = {
            "model": "robustfeat",
            "classes": list(Head.load(clothes).classes),
            "kind": "svm",
            "multi_label": False,
            "revision": commit,
            "sha256": sha256(clothes),
            "probabilities": True,
            "typicality": True,
        }
        assert heads == {"wear": expected, "clothes": expected, "own": expected | {"revision": None}}
        photo = example_files[0].read_bytes()
        answers = [server.post(f"/predict/{name}", photo).json["data"] for name in heads]
        assert answers[0] == answers[1] == answers[2]
    finally:
        assert server.stop() == 0


def test_heads_are_no_models_in_the_list(published: FakeHub, call: Call, copy: Path, one_file: Path) -> None:
    assert call("push", copy, "org/wear").returncode == 0
    assert call("push", one_file, "org/tiny", "--quiet").returncode == 0
    listed = call("models", "--remote", "org", "--json").stdout.splitlines()
    assert [json.loads(line)["model"] for line in listed] == ["org/tiny"]


def test_any_number_of_heads_hides_no_model_in_the_list(hub: FakeHub, call: Call) -> None:
    for number in range(31):
        hub.add(f"org/head-{number}", {"README.md": b"---\nlibrary_name: robustfeat\ntags: [robustfeat-head]\n---\n"})
        hub.add(f"org/model-{number}", {"README.md": b"---\nlibrary_name: robustfeat\n---\n"})
    listed = [json.loads(line)["model"] for line in call("models", "--remote", "org", "--json").stdout.splitlines()]
    assert listed == sorted(f"org/model-{number}" for number in range(31))[:30]


def test_a_head_of_a_model_on_the_hub_says_where_it_is(
    hub: FakeHub, call: Call, small_fp32: Path, examples: Path, tmp_path: Path
) -> None:
    hub.add("org/small", files_of(small_fp32))
    commit = hub.model("org/small").branches["main"]
    fit = call(
        "svm", "fit", examples, "--labels", "folder", "--model", "org/small", "--out", tmp_path / "head", "--C", 1
    )
    assert fit.returncode == 0, fit.stderr
    assert call("push", tmp_path / "head", "org/wear").returncode == 0
    card = hub.read("org/wear", "README.md").decode()
    assert "base_model: org/small" in card
    lines = re.findall(r"^robustfeat .*", card, re.MULTILINE)
    assert lines[0] == f"robustfeat svm predict org/wear photos/ --model org/small --revision {commit}"
    assert f'FeatureExtractor.from_pretrained("org/small", revision="{commit}")' in card
    arguments = lines[0].replace("photos/", str(examples / "hat")).split()[1:]
    assert call(*arguments, "--quiet").returncode == 0
    refused = one_line(call("svm", "predict", "org/wear", examples / "hat"))
    assert "needs features of small-fp32-v1" in refused
    assert "pass the model that the head was fitted with as --model org/small, or" in refused


def test_export_takes_a_head_by_its_name(published: FakeHub, call: Call, clothes: Path, tmp_path: Path) -> None:
    done = call("export", "--head", "org/clothes", "--out", tmp_path / "c.onnx", "--quiet")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "c.onnx").stat().st_size > 10**6


def test_map_takes_a_head_by_its_name(published: FakeHub, call: Call, examples: Path, tmp_path: Path) -> None:
    done = call("map", examples, "--head", "org/clothes", "--out", tmp_path / "map.html", "--quiet")
    assert done.returncode == 0, done.stderr
    assert '"prediction"' in (tmp_path / "map.html").read_text("utf-8")
    assert "org/none: no such" in one_line(call("map", examples, "--head", "org/none", "--out", tmp_path / "no.html"))


def test_info_shows_a_head(published: FakeHub, call: Call, clothes: Path) -> None:
    here, there = call("info", clothes), call("info", "org/clothes", "--revision", "main")
    for result in (here, there):
        assert result.returncode == 0, result.stderr
        assert re.search(r"^classes: +10: dress, hat, ", result.stdout, re.MULTILINE)
        assert re.search(rf"^model: +{built_in.NAME} \(builtin\)$", result.stdout, re.MULTILINE)
        assert re.search(rf"^sha256: +{sha256(clothes)}$", result.stdout, re.MULTILINE)
    commit = published.model("org/clothes").branches["main"]
    assert re.search(rf"^revision: +{commit}$", there.stdout, re.MULTILINE)
    about = json.loads(call("info", "org/clothes", "--json", "--config-hash", sha256(clothes)).stdout)
    assert (about["sha256"], about["revision"], about["kind"]) == (sha256(clothes), commit, "svm")
    assert "not the requested head" in one_line(call("info", clothes, "--config-hash", "0" * 64))
