"""Checks an installed robustfeat from end to end: features of the examples, a head, and one answer over HTTP.

Run it with the Python of an environment that holds nothing but the package and its extra `cpu`:

    PYTHON .ci/smoke.py
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from importlib.metadata import version
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "images"
COMMAND = (sys.executable, "-P", "-m", "robustfeat")


def main() -> None:
    """Runs all steps in an empty folder, so that nothing of the source tree is imported."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            check_installation()
            check_features()
            check_head()
            check_answer()
        finally:
            os.chdir(EXAMPLES)  # Windows removes no folder that a process is in
    print(f"smoke test passed: robustfeat {version('robustfeat')}, Python {sys.version.split()[0]}, {sys.platform}")


def check_installation() -> None:
    """The package comes from this environment, has its version and its types, and brought no PyTorch."""
    found = importlib.util.find_spec("robustfeat")
    if found is None or found.origin is None or not Path(found.origin).is_relative_to(sys.prefix):
        raise SystemExit(f"robustfeat is not installed in {sys.prefix}: {found and found.origin}")
    expect((Path(found.origin).parent / "py.typed").exists(), "py.typed is missing")
    expect(importlib.util.find_spec("torch") is None, "torch came along")
    expect(version("robustfeat") in run("--version").stdout, "--version differs from the package's metadata")


def check_features() -> None:
    """One finite row per example, by the command and by the Python interface."""
    run("embed", EXAMPLES, "--out", "feats.npy")
    import numpy as np

    from robustfeat import FeatureExtractor

    features = np.load("feats.npy")
    expect(features.shape == (40, 512) and features.dtype == "f4", f"{features.dtype} {features.shape}")
    expect(bool(np.isfinite(features).all()), "rows are not finite")
    index = [json.loads(line) for line in Path("feats.index.jsonl").read_text("utf-8").splitlines()]
    again = FeatureExtractor.from_pretrained(threads=1).embed([EXAMPLES / index[0]["path"]])
    expect(bool(np.allclose(again[0], features[0], atol=1e-5)), "FeatureExtractor and embed disagree")


def check_head() -> None:
    """A classifier of the examples' folders."""
    run("svm", "fit", "feats.npy", "--labels", "folder", "--out", "clothes")
    classes = json.loads(Path("clothes", "head.json").read_text("utf-8"))["classes"]
    expect(len(classes) == 10, f"{len(classes)} classes")


def check_answer() -> None:
    """A server on a free port predicts the class of an example, and stops when it is asked to."""
    arguments = [*COMMAND, "serve", "--head", "clothes", "--port", "0"]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, encoding="utf-8") as server:
        try:
            assert server.stderr is not None
            lines = iter(server.stderr.readline, "")
            address = next((found[1] for line in lines if (found := re.search(r"serving at (http://\S+)", line))), None)
            if address is None:
                raise SystemExit(f"serve ended with exit code {server.wait()} before it answered")
            image = (EXAMPLES / "hat" / "hat-1.jpg").read_bytes()
            request = urllib.request.Request(f"{address}/predict/clothes", image, {"Content-Type": "image/jpeg"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                content = json.load(answer)
            expect(content["data"][0]["prediction"] == "hat", f"answered {content}")
        finally:
            server.terminate()
    # Windows has no SIGTERM: a process ends at once.
    expect(os.name == "nt" or server.returncode == 0, f"serve ended with exit code {server.returncode}")


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a command of the package, and ends this program with its messages if it fails."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, encoding="utf-8", check=False
    )
    if done.returncode:
        raise SystemExit(f"robustfeat {arguments[0]}: exit code {done.returncode}\n{done.stderr}")
    return done


def expect(condition: bool, otherwise: str) -> None:
    """Ends this program with a message unless the condition holds."""
    if not condition:
        raise SystemExit(f"smoke test failed: {otherwise}")


if __name__ == "__main__":
    main()
