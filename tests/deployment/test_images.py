"""docker/: Dockerfiles, locks and compose.yaml."""

from __future__ import annotations

import itertools
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from tests.command_server import CommandServer
from tests.conftest import ROOT
from tests.deployment.plain_root import instructions
from tests.serving.http.conftest import Server, wait_until
from tests.serving.http.test_proxies import ask, free_port, nginx

DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
LOCKED = {"cpu": ("cpu", "otel"), "gpu": ("gpu", "otel"), "train": ("train", "cpu"), "build": ()}
"""The extras in each lock; none is what builds the package."""


def tool(name: str) -> str:
    """A program that a package of the extra `dev` carries."""
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda file: file.name)
def test_hadolint_finds_nothing(dockerfile: Path) -> None:
    done = subprocess.run([tool("hadolint"), "--no-color", dockerfile], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def locked(name: str) -> dict[str, str]:
    """Versions by the packages' names."""
    text = (DOCKER / "locks" / f"{name}.txt").read_text("utf-8")
    entries = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text, flags=re.M)).splitlines()
    found = {}
    for entry in entries:
        # A package, its version and hashes: no URL, no index, no option.
        match = re.fullmatch(r"([a-z0-9.-]+)==(\S+)((?:\s+--hash=sha256:[0-9a-f]{64})+)", entry)
        assert match, entry
        found[match[1]] = match[2]
    return found


def requirements(extra: str, project: dict[str, Any]) -> list[Requirement]:
    """Of an extra and those that it names."""
    lines = [Requirement(line) for line in project["optional-dependencies"][extra]]
    inner = [
        one
        for line in lines
        if line.name == "robustfeat"
        for name in line.extras
        for one in requirements(name, project)
    ]
    return [line for line in lines if line.name != "robustfeat"] + inner


@pytest.mark.parametrize("name", LOCKED)
def test_a_lock_holds_what_the_project_asks_for(name: str) -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    project = data["project"]
    wanted = [Requirement(line) for line in data["build-system"]["requires"]]
    if LOCKED[name]:
        wanted = [Requirement(line) for line in project["dependencies"]]
        wanted += [one for extra in LOCKED[name] for one in requirements(extra, project)]
    versions = locked(name)
    for one in wanted:
        if one.marker is None or one.marker.evaluate({"sys_platform": "linux", "python_version": "3.13"}):
            found = versions.get(re.sub(r"[-_.]+", "-", one.name.lower()))
            assert found, f"{one.name}: run docker/lock"
            assert one.specifier.contains(found), f"{one}, got {found}: run docker/lock"


def test_a_server_needs_no_torch() -> None:
    assert not {"torch", "timm", "onnx"} & (set(locked("cpu")) | set(locked("gpu")))


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda file: file.name)
def test_what_is_copied_is_there_and_not_ignored(dockerfile: Path) -> None:
    """.dockerignore leaves out everything that it does not name with `!`."""
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert "*" in lines
    kept = [line[1:] for line in lines if line.startswith("!")]
    for name, text in instructions(dockerfile):
        if name == "COPY" and not text.startswith("--from"):
            for source in text.split()[:-1]:
                assert (ROOT / source).exists()
                assert any(f"{source.rstrip('/')}/".startswith(f"{place}/") for place in kept), source


def test_the_images_run_as_nobody_and_the_last_stage_serves() -> None:
    for dockerfile in DOCKERFILES:
        found = list(instructions(dockerfile))
        assert [text for name, text in found if name == "USER"][-1] == "65534:65534"
    (last, _) = [text for name, text in instructions(DOCKER / "serve.Dockerfile") if name == "FROM"][-1].split(" AS ")
    assert last == "runtime"  # with the built-in model, where nobody names a target


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    command: list[str | Path] = [tool("docker-compose"), "-f", DOCKER / "compose.yaml", "config"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = yaml.safe_load(done.stdout)
    return found


def test_compose_mounts_files_that_exist_and_opens_ports_to_this_machine_only(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        for volume in service.get("volumes", []):
            assert volume["type"] == "volume" or Path(volume["source"]).is_file(), volume
        for port in service.get("ports", []):
            assert port["host_ip"] == "127.0.0.1"
    server = compose["services"]["robustfeat"]
    assert server["read_only"] is True
    assert server["deploy"]["replicas"] == 2
    assert "ports" not in server
    assert Path(server["build"]["context"], server["build"]["dockerfile"]).is_file()


def test_the_nginx_of_compose_asks_another_replica_and_hides_the_metrics(
    commands: CommandServer, photos: list[bytes], tmp_path: Path
) -> None:
    port, host = free_port(), {"Host": "localhost"}
    replicas = [Server(*options, forked_from=commands) for options in ((), ("--max-queue", 1, "--max-items", 1))]
    places = "".join(f"server 127.0.0.1:{replica.port} max_fails=0;" for replica in replicas)
    text = (DOCKER / "nginx" / "robustfeat.conf").read_text("utf-8")
    text = text.replace("server robustfeat:8000 max_fails=0;", places).replace("listen 80", f"listen {port}")
    with nginx(tmp_path, text, port):
        with ThreadPoolExecutor(16) as clients:  # more than the second replica has room for
            answers = list(clients.map(lambda _: ask(port, "POST", "/embed", photos[0], host).status, range(32)))
        assert answers == [200] * 32
        wait_until(lambda: 'status="503"' in replicas[1].get("/metrics").body.decode())
        too_large = ask(port, "POST", "/embed", bytes(2**25 + 1), host)
        assert too_large.status == 413
        assert "33,554,432" in too_large.body.decode()  # ours, not nginx's page
        assert ask(port, "GET", "/metrics", headers=host).status == 404
        assert replicas[0].stop() == 0
        for _ in range(4):
            assert ask(port, "POST", "/embed", photos[0], host).status == 200
    assert replicas[1].stop() == 0


@pytest.mark.parametrize(
    ("schema", "file"),
    [
        ("github-workflows", "workflows/ci.yml"),
        ("github-workflows", "workflows/images.yml"),
        ("dependabot", "dependabot.yml"),
    ],
)
def test_github_takes_the_files(schema: str, file: str) -> None:
    command = [tool("check-jsonschema"), "--builtin-schema", f"vendor.{schema}", str(ROOT / ".github" / file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_documented_builds_name_what_there_is() -> None:
    """Files, stages and arguments of each `docker build` in docs/deploy.md."""
    text = (ROOT / "docs" / "deploy.md").read_text("utf-8")
    commands = re.findall(r"docker build [^`\n]*", text)
    assert len(commands) == 4
    for command in commands:
        pairs = list(itertools.pairwise(shlex.split(command)))
        found = list(instructions(ROOT / dict(pairs)["-f"]))
        stages = {text.split(" AS ")[-1] for name, text in found if name == "FROM"}
        declared = {text.partition("=")[0] for name, text in found if name == "ARG"}
        assert {value for option, value in pairs if option == "--target"} <= stages
        assert {value.partition("=")[0] for option, value in pairs if option == "--build-arg"} <= declared
    for path in re.findall(r"\b(?:docker|deploy)/[\w./-]+", text):
        assert (ROOT / path.rstrip(".")).exists(), path


def test_the_documented_container_serves_what_it_mounts(
    commands: CommandServer, clothes: Path, tmp_path: Path, photos: list[bytes]
) -> None:
    """The options of the `docker run` with a head and keys in docs/deploy.md, with /served as a folder here."""
    text = (ROOT / "docs" / "deploy.md").read_text("utf-8").replace("\\\n", "")
    (command,) = re.findall(r"docker run .*--keys.*", text)
    words = shlex.split(command)
    mounts = [word for option, word in itertools.pairwise(words) if option == "-v"]
    assert mounts == ["$PWD/served:/served:ro"]
    options = words[words.index("serve") + 1 :]
    assert options[:4] == ["--host", "0.0.0.0", "--port", "8000"]
    shutil.copytree(clothes, tmp_path / "clothes")
    (tmp_path / "keys.txt").write_text("web 5tUgR0secretsecret\n")
    server = Server(*(one.replace("/served", str(tmp_path)) for one in options[4:]), forked_from=commands)
    assert server.post("/predict/clothes", photos[0]).status == 401
    server.headers["authorization"] = "Bearer 5tUgR0secretsecret"
    assert server.post("/predict/clothes", photos[0]).status == 200
    assert server.stop() == 0


def test_the_workflow_builds_every_dockerfile_and_lock() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "images.yml").read_text("utf-8"))
    built = workflow["jobs"]["publish"]["strategy"]["matrix"]["include"]
    assert {f"{one['file']}.Dockerfile" for one in built} == {file.name for file in DOCKERFILES}
    assert {one["extra"] for one in built if one["file"] == "serve"} == {"cpu", "gpu"}
