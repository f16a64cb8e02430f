"""docker/serve.Dockerfile, built and run without a container engine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, files_of
from tests.deployment.plain_root import Image, build, chroot, debian_root, run_command
from tests.hub_server import serve_hub
from tests.serving.http.conftest import children

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(shutil.which("debootstrap") is None, reason="needs debootstrap"),
]

KEPT = Path.home() / ".cache" / "robustfeat-tests"
PIP_CACHE = Path.home() / ".cache" / "pip"


class Container:
    """The image's own command at work, until it is stopped."""

    def __init__(self, image: Image) -> None:
        self.image = image
        command = run_command(image, writable=("/tmp", "/cache"))
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr
        self.said = self.process.stderr.readline()
        assert "serving at" in self.said, self.said + self.process.stderr.read()
        (self.server,) = children(self.process.pid)

    def within(self, *command: str) -> subprocess.CompletedProcess[bytes]:
        """Runs a program of this machine in the container's network."""
        return subprocess.run(["nsenter", "-t", str(self.server), "-n", *command], capture_output=True, check=False)

    def healthy(self) -> bool:
        enter = ["nsenter", "-t", str(self.server), "-m", "-n", "-p"]
        return subprocess.run([*enter, *chroot(self.image, self.image.health)], check=False).returncode == 0

    def stop(self) -> int:
        os.kill(self.server, signal.SIGTERM)
        return self.process.wait(30)


@pytest.fixture(scope="module")
def images(one_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Image]:
    """All stages; `baked` has a model of a small Hub on this machine."""
    PIP_CACHE.mkdir(parents=True, exist_ok=True)
    with serve_hub(tmp_path_factory.mktemp("hub")) as hub:
        hub.add("org/name", files_of(one_file))
        return build(
            ROOT / "docker" / "serve.Dockerfile",
            ROOT,
            debian_root(KEPT / "trixie"),
            tmp_path_factory.mktemp("stages"),
            arguments={"MODEL": "org/name"},
            cache=PIP_CACHE,
            environment={"HF_ENDPOINT": hub.url},
        )


@pytest.fixture
def container(images: dict[str, Image]) -> Iterator[Container]:
    started = Container(images["serve"])
    yield started
    if started.process.poll() is None:
        started.process.kill()


def test_the_server_answers_as_nobody_with_a_read_only_root(container: Container) -> None:
    status = Path(f"/proc/{container.server}/status").read_text()
    assert "\nUid:\t65534\t65534\t65534\t65534\n" in status
    touched = chroot(container.image, ["touch", "/opt/robustfeat/new"])
    enter = ["nsenter", "-t", str(container.server), "-m", *touched]
    assert b"Read-only file system" in subprocess.run(enter, capture_output=True, check=False).stderr
    compared = container.within(sys.executable, str(ROOT / "docker" / "compare.py"), "http://127.0.0.1:8000")
    assert compared.returncode == 0, compared.stderr
    assert b"8 golden images, least cosine 0.9999" in compared.stdout
    assert container.healthy()
    assert container.stop() == 0


def test_the_health_check_fails_while_nobody_answers(container: Container) -> None:
    worker = children(container.server)
    for pid in (container.server, *worker):
        os.kill(pid, signal.SIGSTOP)
    assert not container.healthy()


def test_the_image_holds_what_the_lock_names_and_no_torch(images: dict[str, Image]) -> None:
    command = chroot(images["serve"], ["python3", "-m", "pip", "list", "--format=json"])
    listed = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    packages = {entry["name"].lower().replace("_", "-"): entry["version"] for entry in listed}
    lock = (ROOT / "docker" / "locks" / "cpu.txt").read_text("utf-8")
    locked = dict(line.split(" ")[0].split("==") for line in lock.splitlines() if "==" in line)
    assert packages == locked | {name: packages[name] for name in ("pip", "robustfeat")}
    assert not {"torch", "timm", "onnx"} & set(packages)


def test_a_model_of_the_hub_is_baked_in(images: dict[str, Image]) -> None:
    container = Container(images["baked"])
    info = json.loads(container.within("curl", "-sS", "http://127.0.0.1:8000/info").stdout)
    assert container.stop() == 0
    (model,) = info["models"]
    assert model["name"] == "robustfeat"
