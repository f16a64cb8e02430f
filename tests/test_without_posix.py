"""What works on Windows, as far as Linux can imitate it: embed, heads, Python, and serve in one process."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import EXAMPLES, ROOT, Run

PROGRAM = (sys.executable, "-P", str(ROOT / "tests" / "without_posix.py"))
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*PROGRAM, *map(str, arguments)], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert done.returncode in {0, 3}, done.stderr
    return done


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve photographs in class folders, and a file that is none."""
    folder = tmp_path_factory.mktemp("images")
    for name in ("dress", "hat", "shoes"):
        (folder / name).mkdir()
        for number in range(1, 5):
            file = f"{name}/{name}-{number}.jpg"
            (folder / file).write_bytes((EXAMPLES / file).read_bytes())
    (folder / "hat" / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    return folder


@pytest.fixture(scope="module")
def embedded(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("embedded") / "feats.npy"
    done = run("embed", images, "--out", out)
    assert done.returncode == 3  # one failed
    assert "1 failed" in done.stderr
    return out


@pytest.fixture(scope="module")
def head(embedded: Path) -> Path:
    run("svm", "fit", embedded, "--labels", "folder", "--out", embedded.parent / "clothes")
    return embedded.parent / "clothes"


def test_an_extractor_embeds_and_the_package_names_no_missing_module(images: Path, embedded: Path) -> None:
    code = """if True:
        import sys
        from tests import without_posix
        without_posix.forget()
        import numpy, robustfeat
        for name in robustfeat.__all__:
            getattr(robustfeat, name)
        features = robustfeat.FeatureExtractor.from_pretrained(threads=1).embed([sys.argv[1]])
        numpy.testing.assert_allclose(features[0], numpy.load(sys.argv[2])[0], atol=1e-5)
    """
    command = [sys.executable, "-c", code, str(images / "dress" / "dress-1.jpg"), str(embedded)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_embed_writes_the_same_bytes(images: Path, embedded: Path, robustfeat: Run, tmp_path: Path) -> None:
    expected = tmp_path / "feats.npy"
    assert robustfeat("embed", images, "--out", expected).returncode == 3
    for name in ("feats.npy", "feats.index.jsonl"):
        assert (embedded.parent / name).read_bytes() == (tmp_path / name).read_bytes()
    assert np.isnan(np.load(embedded)).any(axis=1).sum() == 1


def test_a_head_predicts_photographs(images: Path, head: Path) -> None:
    done = run("svm", "predict", head, images / "hat", "--json")
    predictions = [json.loads(line)["prediction"] for line in done.stdout.splitlines()]
    assert predictions.count("hat") >= 3


@pytest.fixture(scope="module")
def address(head: Path) -> Iterator[str]:
    """A server in one process, which SIGTERM ends with exit code 0."""
    command = [*PROGRAM, "serve", "--head", str(head), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as server:
        assert server.stderr is not None
        lines: list[str] = []
        for line in server.stderr:
            lines.append(line)
            if found := re.search(r"serving at (http://\S+)", line):
                break
        else:
            pytest.fail("".join(lines))
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text()
        assert not children.split()
        yield found[1]
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0, server.stderr.read()


def post(url: str, body: bytes, kind: str) -> dict[str, object]:
    with urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": kind}), timeout=30) as answer:
        content: dict[str, object] = json.load(answer)
    return content


def test_serve_answers(address: str, images: Path) -> None:
    image = (images / "hat" / "hat-1.jpg").read_bytes()
    answer = post(f"{address}/predict/clothes", image, "image/jpeg")
    assert isinstance(answer["data"], list)
    assert answer["data"][0]["prediction"] == "hat"


def test_the_page_is_taught(address: str, embedded: Path) -> None:
    values = np.load(embedded)
    rows = np.isfinite(values).all(axis=1)
    features = base64.b64encode(values[rows].astype("<f4").tobytes()).decode()
    classes = ["dress", "hat", "shoes"]
    labels = [number for number in range(3) for _ in range(4)]
    body = json.dumps({"classes": classes, "labels": labels, "features": features}).encode()
    assert post(f"{address}/teach", body, "application/json")["rows"] == 12


def test_more_workers_than_one_are_refused() -> None:
    done = subprocess.run(
        [*PROGRAM, "serve", "--workers", "2"], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["robustfeat: --workers 2: this system cannot fork; expected 1"]
