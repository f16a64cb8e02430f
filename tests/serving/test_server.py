"""The real server, in a process of its own."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robustfeat import FeatureExtractor
from robustfeat.serving import Head
from tests.conftest import ROOT, Run


@pytest.fixture(scope="module")
def head(example_files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from robustfeat.serving.heads.features import embed_features
    from robustfeat.serving.heads.fitting import fit_head
    from robustfeat.serving.heads.labels import match_labels, read_labels
    from robustfeat.serving.inputs import list_inputs

    out = tmp_path_factory.mktemp("heads") / "clothes"
    with list_inputs([example_files[0].parents[1]]) as inputs:
        features = embed_features(FeatureExtractor.from_pretrained(threads=1, streams=1), inputs, quiet=True)
    fit_head(features, match_labels(features, read_labels(["folder"])), cs=(0.1,), scalings=("none",))[0].save(out)
    return out


@pytest.fixture(scope="module")
def address(head: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "robustfeat", "serve", "--port", "0", "--head", f"clothes={head}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said += line
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                break
        else:
            pytest.fail(said)
        yield found[0]
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read()
        process.wait(30)
        assert "Traceback" not in said, said


def post(url: str, body: bytes) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, method="POST"), timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as exc:
        return exc.code, json.load(exc)


def test_embed_gives_the_vectors_of_the_extractor(address: str, example_files: list[Path]) -> None:
    status, answer = post(f"{address}/embed", example_files[3].read_bytes())
    assert (status, answer["model"], answer["precision"]) == (200, "robustfeat", "fp32")
    expected = FeatureExtractor.from_pretrained().embed(example_files[3:4])
    np.testing.assert_allclose(answer["data"][0]["embedding"], expected[0], rtol=1e-4, atol=1e-5)


def test_predict_gives_the_answers_of_the_head(address: str, head: Path, example_files: list[Path]) -> None:
    loaded = Head.load(head)
    for file in example_files[::7]:
        status, answer = post(f"{address}/predict/clothes", file.read_bytes())
        assert (status, answer["head"]) == (200, "clothes")
        margins = loaded.margins(FeatureExtractor.from_pretrained().embed([file]))
        found = answer["data"][0]
        assert found["prediction"] == loaded.decide(margins)[0]
        assert found["margins"] == pytest.approx(dict(zip(loaded.classes, margins[0], strict=True)), abs=1e-4)
        assert sum(found["probabilities"].values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("place", "body", "status", "reason"),
    [
        ("predict/clothes", b"no image", 422, "no image that can be read"),
        ("predict/clothes", b"", 422, "the body is empty"),
        ("predict/shoes", b"x", 404, "no head 'shoes' is served; there is clothes"),
        ("embed", b"x" * (33 * 2**20), 413, "at most 33,554,432 bytes"),
        ("nothing", b"x", 404, "Not Found"),
    ],
)
def test_bad_requests_get_one_error(address: str, place: str, body: bytes, status: int, reason: str) -> None:
    try:
        found, answer = post(f"{address}/{place}", body)
    except urllib.error.URLError as exc:
        if status == 413 and isinstance(exc.reason, (BrokenPipeError, ConnectionResetError)):
            return  # it hung up while the body was still on its way
        raise
    assert found == status
    assert reason in answer["error"]["message"]
    assert answer["error"]["code"] == status


def test_it_lives_and_describes_itself(address: str) -> None:
    with urllib.request.urlopen(f"{address}/health/live", timeout=30) as answer:
        assert json.load(answer) == {"status": "live"}
    with urllib.request.urlopen(f"{address}/openapi.json", timeout=30) as answer:
        assert {"/embed", "/predict/{head}", "/health/live"} <= set(json.load(answer)["paths"])


def test_a_head_of_another_model_is_refused_at_the_start(robustfeat: Run, head: Path, model: Path) -> None:
    result = robustfeat("serve", "--head", head, "--model", model)
    assert result.returncode == 1
    assert "--head clothes: needs features of robustfeat-resnet18" in result.stderr.splitlines()[-1]
    assert len(result.stderr.splitlines()) == 1


def test_a_port_that_is_taken_is_one_line(robustfeat: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = robustfeat("serve", "--port", port)
    assert result.returncode == 1
    assert f"--port {port}: Address already in use" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_client_that_leaves_is_no_error_of_the_server(address: str) -> None:
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
    with urllib.request.urlopen(f"{address}/health/live", timeout=30) as answer:
        assert answer.status == 200  # the fixture asks for tracebacks when it ends
