"""/teach: heads for labelled features, in bounded time and memory, with nothing kept."""

from __future__ import annotations

import base64
import http.client
import io
import itertools
import json
import os
import signal
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.svm import LinearSVC

from robustfeat import FeatureExtractor
from robustfeat.serving.heads.head import Head
from tests.conftest import EXAMPLES
from tests.serving.http.conftest import Answer, Server, children, serving, wait_until

ZIP = "application/zip"
PHOTOS = [
    *sorted(EXAMPLES.glob("hat/*.jpg")),
    *sorted(EXAMPLES.glob("shoes/*.jpg")),
    *sorted(EXAMPLES.glob("dress/*.jpg")),
]
CLASSES = ["shoes", "hat", "dress"]
LABELS = [CLASSES.index(photo.parent.name) for photo in PHOTOS]


@pytest.fixture(scope="module")
def plain() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def features() -> NDArray[np.float32]:
    return FeatureExtractor.from_pretrained(threads=1, streams=1).embed(PHOTOS)


def teach(server: Server, values: NDArray[Any], accept: str = "application/json", **other: Any) -> Answer:
    data = base64.b64encode(np.asarray(values, "<f4").tobytes()).decode()
    return server.post("/teach", {"classes": CLASSES, "labels": LABELS, "features": data, **other}, accept=accept)


def floats(text: str) -> NDArray[np.float64]:
    return np.frombuffer(base64.b64decode(text), "<f8")


def test_the_head_is_that_of_scikit_learn(plain: Server, features: NDArray[np.float32]) -> None:
    answer = teach(plain, features)
    assert answer.status == 200, answer.body
    found = answer.json
    assert (found["model"], found["classes"], found["rows"]) == ("robustfeat", ["dress", "hat", "shoes"], len(PHOTOS))
    unit = features.astype(float) / np.linalg.norm(features.astype(float), axis=1, keepdims=True)
    expected = LinearSVC(C=1.0, dual=False, tol=1e-9).fit(unit, [photo.parent.name for photo in PHOTOS])
    np.testing.assert_allclose(floats(found["coefficients"]).reshape(3, -1), expected.coef_, atol=1e-5)
    np.testing.assert_allclose(floats(found["intercepts"]), expected.intercept_, atol=1e-5)
    assert found["accuracy"] >= 0.75
    assert found["rows_scored"] == len(PHOTOS)


def test_the_archive_holds_the_same_head_as_a_folder(
    plain: Server, features: NDArray[np.float32], tmp_path: Path
) -> None:
    answer = teach(plain, features, ZIP, name="clothes")
    assert answer.headers["content-type"] == ZIP
    assert answer.headers["content-disposition"] == 'attachment; filename="clothes.zip"'
    assert teach(plain, features, ZIP, name="clothes").body == answer.body
    with zipfile.ZipFile(io.BytesIO(answer.body)) as archive:
        assert archive.namelist() == ["clothes/head.json", "clothes/head.safetensors"]
        archive.extractall(tmp_path)
    head = Head.load(tmp_path / "clothes")
    assert head.takes(FeatureExtractor.from_pretrained(threads=1, streams=1).identity)
    assert head.tells_typicality
    numbers = teach(plain, features).json
    np.testing.assert_array_equal(floats(numbers["coefficients"]), head.arrays["coefficients"].ravel())
    np.testing.assert_array_equal(numbers["calibration"]["scale"], head.arrays["calibration.scale"])


def test_classes_without_a_row_are_left_out_and_single_rows_have_no_probabilities(
    plain: Server, features: NDArray[np.float32]
) -> None:
    found = teach(plain, features[[0, 5]], labels=[1, 0], classes=["shoes", "hat", "unused"]).json
    assert found["classes"] == ["hat", "shoes"]
    assert (found["calibration"], found["accuracy"], found["rows_scored"]) == (None, None, 0)


def refused(features: NDArray[np.float32]) -> Iterator[tuple[dict[str, Any], str]]:
    """Requests, and how the message of each begins."""
    nan, infinite = features.copy(), features.copy()
    nan[3, 4], infinite[7, 0] = np.nan, np.inf
    yield {"values": nan}, "features: must be finite; row 3 is not"
    yield {"values": infinite}, "features: must be finite; row 7 is not"
    yield {"values": features[:, :10]}, "features: must be 12 rows of 512 float32, 24,576 bytes; got 480"
    yield {"values": features, "features": "§"}, "features: must be base64 of float32"
    yield {"values": features, "features": "A" * 20_000_000}, "features: must be 12 rows of 512 float32, 24,576 bytes"
    yield {"values": features, "labels": [1] * 12}, "labels: must be of two classes or more; all are of 'hat'"
    yield {"values": features, "labels": [3] * 12}, "labels: must be from 0 to 2; got 3"
    yield {"values": features, "labels": [-1, *LABELS[1:]]}, "labels: must be from 0 to 2; got -1"
    yield {"values": features, "labels": [0, 1] * 200_000}, "labels: List should have at most 1000 items"
    yield {"values": features, "labels": []}, "labels: List should have at least 2 items"
    yield {"values": features, "classes": ["hat"]}, "classes: List should have at least 2 items"
    yield {"values": features, "classes": ["hat", "hat", "dress"]}, "classes: must be different from each other"
    yield {"values": features, "classes": ["hat", "", "dress"]}, "classes.1: must have 1 to 200 characters"
    yield {"values": features, "classes": ["hat", "x" * 10**6, "dress"]}, "classes.1: must have 1 to 200 characters"
    yield {"values": features, "classes": ["hat", "a\0b", "dress"]}, "classes.1: must have 1 to 200 characters"
    yield {"values": features, "classes": [str(n) for n in range(51)]}, "classes: List should have at most 50 items"
    yield {"values": features, "name": "../x"}, "name: String should match pattern"
    yield {"values": features, "model": "none"}, "no model 'none' is served"
    yield {"values": features, "other": 1}, "other: Extra inputs are not permitted"


def test_what_cannot_be_fitted_is_one_line(plain: Server, features: NDArray[np.float32]) -> None:
    for given, message in refused(features):
        answer = teach(plain, **given)
        assert answer.status in {404, 422}, message
        found = answer.json["error"]["message"]
        assert found.startswith(message)
        assert "\n" not in found
        assert len(found) < 250


def test_absurd_numbers_end_soon(plain: Server, features: NDArray[np.float32]) -> None:
    for values in (np.zeros_like(features), np.full_like(features, 3e38), np.full_like(features, 1e-38)):
        assert teach(plain, values).status in {200, 422}


def fitter_of(server: Server) -> int:
    """The process that fits: the last one that the worker has started."""
    (worker,) = server.workers()
    found = [pid for pid in children(worker) if b"fitter_program" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(found) == 1
    return found[0]


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_fit_delays_no_other_request(plain: Server) -> None:
    rng = np.random.default_rng(0)
    labels = [row % 20 for row in range(1000)]
    values = rng.normal(size=(1000, 512))
    classes = [f"class {number}" for number in range(20)]
    (worker,) = plain.workers()
    thread = threading.Thread(target=lambda: teach(plain, values, labels=labels, classes=classes))
    thread.start()
    spent = []
    while thread.is_alive():
        # Processor time of the worker, so that a loaded machine changes nothing: what it does between two answers.
        before = cpu_seconds(worker)
        assert plain.get("/health/live").status == 200
        spent.append(cpu_seconds(worker) - before)
    assert len(spent) > 10
    assert max(spent) <= 0.05


def test_a_fit_without_end_is_ended(features: NDArray[np.float32]) -> None:
    constants = {"robustfeat.serving.http.process.fitter.DEADLINE_S": 4.0}
    with serving(constants=constants) as server:
        assert teach(server, features).status == 200
        os.kill(fitter_of(server), signal.SIGSTOP)
        answer = teach(server, features)
        assert (answer.status, answer.json["error"]["code"]) == (422, "fit_timeout")
        wait_until(lambda: teach(server, features).status == 200)


def test_the_process_that_fits_is_replaced_and_ends_when_idle(features: NDArray[np.float32]) -> None:
    with serving(constants={"robustfeat.serving.http.process.fitter.IDLE_S": 8.0}) as server:
        teach(server, features)
        first = fitter_of(server)
        os.kill(first, signal.SIGKILL)
        assert teach(server, features).status == 200
        second = fitter_of(server)
        assert second != first
        wait_until(lambda: not Path(f"/proc/{second}").exists())


def test_keys_and_queues_hold_for_fits(features: NDArray[np.float32], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one first-key rate=1000\ntwo second-key\n")
    with serving("--keys", keys) as server:
        assert teach(server, features).status == 401
        server.headers = {"authorization": "Bearer first-key"}
        assert teach(server, features).status == 200
        os.kill(fitter_of(server), signal.SIGSTOP)
        answers: list[Answer] = []
        threads = [threading.Thread(target=lambda: answers.append(teach(server, features))) for _ in range(4)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(answers) == 2)
        assert {(answer.status, answer.json["error"]["code"]) for answer in answers} == {(429, "share_exceeded")}
        os.kill(fitter_of(server), signal.SIGCONT)
        for thread in threads:
            thread.join()
        assert [answer.status for answer in answers[2:]] == [200, 200]


def test_a_client_that_leaves_while_it_waits_leaves_the_queue(features: NDArray[np.float32], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one first-key rate=1000\n")
    with serving("--keys", keys) as server:
        server.headers = {"authorization": "Bearer first-key"}
        assert teach(server, features).status == 200
        os.kill(fitter_of(server), signal.SIGSTOP)
        answers: list[Answer] = []
        threads = [threading.Thread(target=lambda: answers.append(teach(server, features))) for _ in range(2)]
        threads[0].start()
        time.sleep(0.5)  # its fit has begun
        data = base64.b64encode(np.asarray(features, "<f4").tobytes()).decode()
        body = json.dumps({"classes": CLASSES, "labels": LABELS, "features": data}).encode()
        leaving = http.client.HTTPConnection("127.0.0.1", server.port)
        leaving.request("POST", "/teach", body, {**server.headers, "content-type": "application/json"})
        time.sleep(0.5)
        leaving.close()
        time.sleep(0.5)
        threads[1].start()
        time.sleep(0.5)
        assert not answers  # no 429
        os.kill(fitter_of(server), signal.SIGCONT)
        for thread in threads:
            thread.join()
        assert [answer.status for answer in answers] == [200, 200]


def test_only_a_browser_starts_the_process_ahead() -> None:
    with serving() as server:
        (worker,) = server.workers()

        def fitters() -> list[int]:
            return [pid for pid in children(worker) if b"fitter_program" in Path(f"/proc/{pid}/cmdline").read_bytes()]

        assert server.get("/").status == 200  # as load balancers ask
        time.sleep(0.5)
        assert not fitters()
        assert server.get("/page/app.js").status == 200
        wait_until(lambda: len(fitters()) == 1)


def test_nothing_of_images_or_labels_reaches_a_disk(features: NDArray[np.float32], tmp_path: Path) -> None:
    with serving(TMPDIR=str(tmp_path)) as server:
        server.form("/embed", [photo.read_bytes() for photo in PHOTOS])
        teach(server, features, ZIP, classes=["shoes", "a-very-special-name", "dress"])
        written = [file for file in tmp_path.rglob("*") if file.is_file()]
        for file, word in itertools.product(written, (b"JFIF", b"special")):
            assert word not in file.read_bytes(), file
