"""/similar: what `robustfeat similar` finds, over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests import built_in
from tests.conftest import Run, WriteFeatures
from tests.serving.http.conftest import Server, serving


@pytest.fixture(scope="module")
def features(robustfeat: Run, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("features") / "photos.npy"
    assert robustfeat("embed", examples, "--out", out, "--quiet").returncode == 0
    return out


@pytest.fixture(scope="module")
def running(features: Path, model: Path) -> Iterator[Server]:
    options = ("--model", f"small={model}", "--model", "robustfeat=builtin", "--collection", features)
    with serving(*options, "--collection", f"again={features}") as server:
        yield server


def test_the_answer_is_that_of_the_command(running: Server, features: Path, examples: Path, robustfeat: Run) -> None:
    images = [(examples / "hat" / f"hat-{number}.jpg").read_bytes() for number in (1, 2, 3)]
    answer = running.form("/similar/photos?k=4", images)
    assert answer.status == 200, answer.body
    assert {key: answer.json[key] for key in ("model", "precision", "collection")} == {
        "model": "robustfeat",
        "precision": "fp32",
        "collection": "photos",
    }
    said = robustfeat("similar", features, *(examples / "hat" / f"hat-{n}.jpg" for n in (1, 2, 3)), "-k", "4", "--json")
    expected = [json.loads(line) for line in said.stdout.splitlines()]
    found = [match for item in answer.json["data"] for match in item["matches"]]
    assert [item["index"] for item in answer.json["data"]] == [0, 1, 2]
    assert [(one["row"], one["path"]) for one in found] == [(one["row"], one["path"]) for one in expected]
    np.testing.assert_allclose([one["cosine"] for one in found], [one["cosine"] for one in expected], atol=1e-5)


def test_a_lone_image_and_the_defaults(running: Server, examples: Path) -> None:
    image = (examples / "hat" / "hat-1.jpg").read_bytes()
    answer = running.post("/similar/again", image)
    (item,) = answer.json["data"]
    assert len(item["matches"]) == 10
    assert item["matches"][0]["path"] == "hat/hat-1.jpg"
    assert len(running.post("/similar/again?k=1000", image).json["data"][0]["matches"]) == 40


def test_images_that_fail_have_errors_in_their_places(running: Server, examples: Path) -> None:
    image = (examples / "hat" / "hat-1.jpg").read_bytes()
    data = running.form("/similar/photos?k=1", [b"junk", image, b"", image]).json["data"]
    assert [item["index"] for item in data] == [0, 1, 2, 3]
    assert ["error" in item for item in data] == [True, False, True, False]
    answer = running.post("/similar/photos", b"junk")
    assert (answer.status, answer.json["error"]["code"]) == (422, "unreadable_image")


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("/similar/nowhere", 404, "no collection 'nowhere' is served; there is photos, again"),
        ("/similar/photos?k=0", 422, "k must be a number from 1 to 1,000; got '0'"),
        ("/similar/photos?k=1001", 422, "k must be a number from 1 to 1,000"),
        ("/similar/photos?k=%D9%A3", 422, "k must be a number from 1 to 1,000"),
    ],
)
def test_wrong_requests_are_refused(running: Server, examples: Path, path: str, status: int, said: str) -> None:
    answer = running.post(path, (examples / "hat" / "hat-1.jpg").read_bytes())
    assert answer.status == status
    assert said in answer.json["error"]["message"]


def test_requests_at_once_get_their_own_answers(running: Server, example_files: list[Path]) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda file: running.post("/similar/photos?k=1", file.read_bytes()), example_files))
    found = [answer.json["data"][0]["matches"][0]["path"].rpartition("/")[2] for answer in answers]
    assert found == [file.name for file in example_files]


def test_info_and_the_document_name_collections(running: Server) -> None:
    found = running.get("/info").json["collections"]
    assert found == [
        {"name": "photos", "model": "robustfeat", "rows": 40},
        {"name": "again", "model": "robustfeat", "rows": 40},
    ]
    operation = running.get("/openapi.json").json["paths"]["/similar/{collection}"]["post"]
    given = {one["name"]: one["schema"] for one in operation["parameters"]}
    assert given["collection"]["enum"] == ["photos", "again"]
    assert given["k"]["maximum"] == 1000
    assert 'route="/similar"' in running.get("/metrics").body.decode()


def test_keys_are_asked(features: Path, examples: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alice secret-of-alice-1 rate=1\n")
    keys.chmod(0o600)
    image = (examples / "hat" / "hat-1.jpg").read_bytes()
    with serving("--collection", features, "--keys", keys) as server:
        assert server.post("/similar/photos", image).status == 401
        key = {"authorization": "Bearer secret-of-alice-1"}
        assert server.post("/similar/photos", image, **key).status == 200
        assert {server.post("/similar/photos", image, **key).status for _ in range(3)} >= {429}


def test_collections_of_other_models_are_one_line_at_the_start(
    robustfeat: Run, write_features: WriteFeatures, features: Path, tmp_path: Path
) -> None:
    other = write_features(tmp_path / "digits.npy", np.ones((2, 512), np.float32), ["a", "b"])
    result = robustfeat("serve", "--port", "0", "--collection", other)
    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if "collection" in line]
    assert len(lines) == 1
    assert f"the collection digits: needs features of digits-v1, the model served of {built_in.NAME}" in lines[0]
    result = robustfeat("serve", "--port", "0", "--collection", tmp_path / "nowhere.npy")
    assert result.returncode == 1
    assert "nowhere.meta.json: no such file" in result.stderr
