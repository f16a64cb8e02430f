"""Publishing, finding, downloading and trusting models: the real client in new processes, and a Hub on loopback."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robustfeat import FeatureExtractor
from robustfeat.hub.catalog import builtin_model
from tests.conftest import Run, Start, build_once, files_of, hub_environment
from tests.hub_server import FakeHub, Fault, card_problems

Call = Callable[..., "subprocess.CompletedProcess[str]"]
Load = Callable[..., np.ndarray]

LOAD = """
import sys
import numpy as np
from robustfeat import FeatureExtractor
from robustfeat.hub.catalog import builtin_model
extractor = FeatureExtractor.from_pretrained({arguments})
np.save(sys.argv[1], extractor.embed(sys.argv[2:]))
"""


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 1, result.stderr
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.fixture(scope="session", params=["2.x", "1.x"])
def client(request: pytest.FixtureRequest) -> dict[str, str]:
    """The environment for the newest huggingface_hub of each major version."""
    import huggingface_hub

    if huggingface_hub.__version__[0] == request.param[0]:
        return {}
    # The folder is kept from run to run.
    wanted = f"huggingface_hub>={request.param[0]},<{int(request.param[0]) + 1}"

    def install(target: Path) -> None:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(target), wanted]
        subprocess.run(command, check=True)

    root = Path.home() / ".cache" / "robustfeat-tests"
    return {"PYTHONPATH": str(build_once(root, f"huggingface_hub-{request.param}", install))}


@pytest.fixture
def published(hub: FakeHub, small_model: Path) -> FakeHub:
    """A Hub with a small model as org/name."""
    hub.add("org/name", files_of(small_model))
    return hub


@pytest.fixture
def published_builtin(hub: FakeHub, one_file: Path) -> FakeHub:
    """A Hub with the built-in model as org/name."""
    hub.add("org/name", files_of(one_file))
    return hub


@pytest.fixture
def call(robustfeat: Run, hub: FakeHub, tmp_path: Path) -> Call:
    """The command line as alice, with an empty cache."""

    def run(*arguments: object, token: str | None = "hf_alice", **environment: str) -> subprocess.CompletedProcess[str]:
        return robustfeat(*arguments, env=hub_environment(hub, tmp_path / "home", token, **environment))

    return run


@pytest.fixture
def load(python: Run, hub: FakeHub) -> Load:
    """Gives features by `from_pretrained` in a new process."""

    def load(home: Path, files: list[Path], arguments: str = '"org/name"', **environment: str) -> np.ndarray:
        out = home.parent / "loaded.npy"
        out.unlink(missing_ok=True)
        code = LOAD.format(arguments=arguments)
        result = python(code, out, *files, env=hub_environment(hub, home, **environment))
        assert result.returncode == 0, result.stderr
        features: np.ndarray = np.load(out)
        return features

    return load


def edit_config(hub: FakeHub, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads(hub.read("org/name", "config.json"))
    change(data)
    hub.commit(hub.model("org/name"), "main", {"config.json": json.dumps(data).encode()})


# Publishing


def test_a_trained_model_travels_bit_for_bit(
    hub: FakeHub,
    load: Load,
    python: Run,
    model: Path,
    call: Call,
    client: dict[str, str],
    example_files: list[Path],
    tmp_path: Path,
) -> None:
    version = "import huggingface_hub; print(huggingface_hub.__version__)"
    found = python(version, env=hub_environment(hub, tmp_path, **client))
    assert (found.stdout[0] == "1") == bool(client)
    result = call("push", model, "org/name", **client)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"{hub.url}/org/name", 'FeatureExtractor.from_pretrained("org/name")']
    local = files_of(model)
    assert set(hub.files("org/name")) == {*local, ".gitattributes"}
    for name in local.keys() - {"README.md"}:
        assert hub.read("org/name", name) == local[name]
    expected = FeatureExtractor.from_pretrained(model).embed(example_files)
    hub.requests.clear()
    features = load(tmp_path / "other", example_files, **client)
    assert features.tobytes() == expected.tobytes()
    assert not any("model.safetensors" in request for request in hub.requests), "only ONNX is needed"
    # Once more, without a network.
    hub.url = "http://127.0.0.1:1"
    assert load(tmp_path / "other", example_files, **client).tobytes() == expected.tobytes()


def changing(hub: FakeHub) -> list[str]:
    """The requests that could have changed something."""
    reading = ("GET ", "HEAD ", "POST /api/validate-yaml")
    return [request for request in hub.requests if not request.startswith(reading)]


def test_a_second_push_sends_nothing(hub: FakeHub, call: Call, small_fp32: Path) -> None:
    first = call("push", small_fp32, "org/name")
    assert first.returncode == 0, first.stderr
    assert changing(hub)
    hub.requests.clear()
    second = call("push", small_fp32, "org/name")
    assert second.returncode == 0, second.stderr
    assert "nothing was sent" in second.stderr
    assert changing(hub) == []


def test_the_builtin_model_is_pushed_with_one_onnx_file(
    hub: FakeHub, load: Load, call: Call, example_files: list[Path], tmp_path: Path
) -> None:
    result = call("push", "builtin", "org/tiny", "--quiet")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    files = hub.files("org/tiny")
    assert "onnx/model.onnx" in files
    assert "model.onnx" not in files
    features = load(tmp_path / "home", example_files, '"org/tiny"')
    assert features.tobytes() == FeatureExtractor.from_pretrained().embed(example_files).tobytes()
    card = hub.read("org/tiny", "README.md").decode()
    assert card_problems(card) == []
    assert 'from_pretrained("org/tiny")' in card
    assert "ORG/NAME" not in card


def test_a_dry_run_says_what_would_be_sent(hub: FakeHub, call: Call, small_fp32: Path) -> None:
    result = call("push", small_fp32, "org/name", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "add     onnx/model.onnx (" in result.stdout
    assert len(result.stdout.splitlines()) == len(files_of(small_fp32))
    assert "does not exist" in result.stderr
    assert not hub.repos
    assert changing(hub) == []


def test_branch_tag_and_privacy(published: FakeHub, call: Call, small_fp32: Path) -> None:
    repo = published.model("org/name")
    before = repo.branches["main"]
    result = call("push", small_fp32, "org/name", "--revision", "next", "--tag", "v2")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[1] == 'FeatureExtractor.from_pretrained("org/name", revision="v2")'
    assert repo.branches["main"] == before
    assert repo.tags["v2"] == repo.branches["next"]
    assert "onnx/model_int8.onnx" not in published.files("org/name", "next"), "what the new model lacks is deleted"
    assert "is already the name of a tag or a branch" in one_line(
        call("push", small_fp32, "org/name", "--revision", "v2")
    )
    assert "is already the name of a tag or a branch" in one_line(call("push", small_fp32, "org/name", "--tag", "next"))
    assert "the tag v2 exists" in one_line(call("push", small_fp32, "org/name", "--tag", "v2"))
    assert "is public" in one_line(call("push", small_fp32, "org/name", "--private"))
    assert call("push", small_fp32, "alice/own", "--private", "--revision", "trial").returncode == 0
    assert published.files("alice/own") == [".gitattributes"]
    assert "config.json" in published.files("alice/own", "trial")
    assert published.model("alice/own").private
    assert "no such model" in one_line(call("pull", "alice/own", token="hf_bob"))
    assert "no such model" in one_line(call("pull", "alice/own", token=None))


def test_a_proposal_leaves_the_branch_alone(published: FakeHub, call: Call, small_fp32: Path) -> None:
    repo = published.model("org/name")
    before = repo.branches["main"]
    result = call("push", small_fp32, "org/name", "--create-pr")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[1] == 'FeatureExtractor.from_pretrained("org/name", revision="refs/pr/1")'
    assert repo.branches["main"] == before
    assert call("info", "org/name", "--revision", "refs/pr/1").returncode == 0
    assert "does not exist" in one_line(call("push", small_fp32, "org/none", "--create-pr"))


def test_a_damaged_folder_is_not_pushed(hub: FakeHub, call: Call, small_fp32: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small_fp32, tmp_path / "copy"))
    with open(copy / "model.safetensors", "ab") as handle:
        handle.write(b"\0")
    assert "model.safetensors: altered or truncated" in one_line(call("push", copy, "org/name"))
    assert not hub.requests


def test_a_push_that_is_cut_publishes_nothing(hub: FakeHub, call: Call, small_fp32: Path) -> None:
    hub.faults = [Fault("/commit/", 500, times=99, method="POST")]
    assert "fails" in one_line(call("push", small_fp32, "org/name"))
    assert hub.files("org/name") == [".gitattributes"]
    hub.faults.clear()
    hub.requests.clear()
    assert call("push", small_fp32, "org/name").returncode == 0
    assert not [request for request in hub.requests if request.startswith("PUT")], "the large files were there"


def test_what_somebody_else_pushes_meanwhile_is_not_lost(published: FakeHub, call: Call, small_fp32: Path) -> None:
    repo = published.model("org/name")
    theirs = {"README.md": b"their words"}
    published.after = {"/api/models/org/name/refs": lambda: published.commit(repo, "main", theirs)}
    assert "changed it in the meantime" in one_line(call("push", small_fp32, "org/name"))
    assert published.read("org/name", "README.md") == b"their words"


def test_a_card_that_was_edited_on_the_hub_stays(
    published: FakeHub, call: Call, small_model: Path, tmp_path: Path
) -> None:
    published.commit(published.model("org/name"), "main", {"README.md": b"my own words"})
    result = call("push", small_model, "org/name")
    assert "nothing was sent" in result.stderr
    assert published.read("org/name", "README.md") == b"my own words"
    copy = Path(shutil.copytree(small_model, tmp_path / "copy"))
    (copy / "README.md").write_text("words of the folder, for ORG/NAME")
    assert call("push", copy, "org/name").returncode == 0
    assert published.read("org/name", "README.md") == b"words of the folder, for org/name"


@pytest.mark.parametrize(
    ("card", "message"),
    [
        (b"---\nlicense: nonsense\n---\n", "the Hub refuses the metadata of README.md"),
        ("---\nlicense: mit\n---\ncaf\xe9".encode("latin-1"), "README.md: not UTF-8"),
    ],
)
def test_a_card_that_is_refused_leaves_no_repository(
    hub: FakeHub, call: Call, small_fp32: Path, tmp_path: Path, card: bytes, message: str
) -> None:
    copy = Path(shutil.copytree(small_fp32, tmp_path / "copy"))
    (copy / "README.md").write_bytes(card)
    for more in ([], ["--dry-run"]):
        assert message in one_line(call("push", copy, "org/new", *more))
    assert not hub.repos


def test_a_licence_is_sent_and_hidden_files_are_not(
    published: FakeHub, call: Call, small_fp32: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(small_fp32, tmp_path / "copy"))
    (copy / "LICENSE").write_text("MIT")
    (copy / ".env").write_text("secret")
    (copy / "notes.txt").symlink_to("/etc/hostname")
    assert call("push", copy, "org/name").returncode == 0
    assert set(published.files("org/name")) == {*files_of(small_fp32), "LICENSE"}
    assert call("verify", "org/name", "--quiet").returncode == 0


def test_the_default_of_the_organisation_decides_what_is_private(hub: FakeHub, call: Call, small_fp32: Path) -> None:
    hub.private_by_default = True
    assert call("push", small_fp32, "org/name").returncode == 0
    assert hub.model("org/name").private


def test_a_tag_that_fails_is_told_from_a_push_that_fails(hub: FakeHub, call: Call, small_fp32: Path) -> None:
    hub.faults = [Fault("/tag/", 500, times=99, method="POST")]
    line = one_line(call("push", small_fp32, "org/name", "--tag", "v1"))
    assert "the model itself was published, without the tag v1" in line
    assert "config.json" in hub.files("org/name")


@pytest.mark.parametrize(("option", "name"), [("--tag", "x y"), ("--revision", "refs/pr/1"), ("--tag", "a" * 40)])
def test_odd_names_of_branches_and_tags_are_refused_at_once(
    hub: FakeHub, call: Call, small_fp32: Path, option: str, name: str
) -> None:
    assert "cannot be a" in one_line(call("push", small_fp32, "org/name", option, name))
    assert not hub.requests


# Errors that a publisher meets


@pytest.mark.parametrize(
    ("arguments", "token", "message"),
    [
        (["pull", "org/name"], "hf_wrong", "refuses the token"),
        (["push", "{model}", "org/name"], "hf_wrong", "refuses the token"),
        (["push", "{model}", "org/name"], None, "needs a token; run hf auth login"),
        (["pull", "org/none"], "hf_alice", "no such model at"),
        (["embed", "{examples}", "--model", "org/none", "--out", "{tmp}/f.npy"], None, "no such folder here"),
        (["pull", "org/name", "--revision", "v9"], "hf_alice", "has no revision 'v9'; it has main"),
        (["pull", "org/gated"], None, "access is gated; ask for it at"),
        (["pull", "org/gated"], "hf_bob", "access is gated; ask for it at"),
        (["pull", "org/gated", "--force"], "hf_bob", "access is gated; ask for it at"),
        (["push", "{model}", "org/name"], "hf_bob", "the name belongs to somebody else"),
        (["push", "{model}", "org/new"], "hf_bob", "the name belongs to somebody else, or the token may not"),
        (["push", "{model}", "org/bert"], "hf_alice", "the name is taken: it has a config.json that is not"),
        (["pull", "org/empty"], "hf_alice", "has no config.json or head.json, so it is not a model or head"),
        (["pull", "nonsense"], "hf_alice", "expected ORG/NAME"),
        (["pull", "org/na--me"], "hf_alice", "expected ORG/NAME"),
        (["pull", "org/" + "x" * 97], "hf_alice", "expected ORG/NAME"),
        (["info", "org/name", "--revision", ""], "hf_alice", "must be a branch, a tag or a commit"),
        (["info", "org/name", "--revision", ".."], "hf_alice", "must be a branch, a tag or a commit"),
        (["push", "{model}", "a/b/c"], "hf_alice", "expected ORG/NAME"),
        (["info", "builtin", "--revision", "v1"], "hf_alice", "has no revision v1"),
        (["pull", "org/name", "--config-hash", "0" * 64], "hf_alice", "not the requested model"),
    ],
)
def test_each_error_is_one_line_with_the_next_step(
    published: FakeHub,
    call: Call,
    small_fp32: Path,
    examples: Path,
    tmp_path: Path,
    arguments: list[str],
    token: str | None,
    message: str,
) -> None:
    published.add("org/gated", {"config.json": b"{}"}, gated=True)
    published.add("org/empty", {"README.md": b"hello"})
    published.add("org/bert", {"config.json": b'{"model_type": "bert"}'})
    places = {"model": small_fp32, "examples": examples, "tmp": tmp_path}
    result = call(*(argument.format(**places) for argument in arguments), token=token)
    assert message in one_line(result)
    assert not (tmp_path / "f.npy").exists()


@pytest.mark.parametrize(
    "loud", [pytest.param({}, marks=pytest.mark.slow), {"HF_HUB_VERBOSITY": "debug", "HF_DEBUG": "1"}]
)
def test_no_token_is_ever_printed(
    published: FakeHub, call: Call, small_fp32: Path, tmp_path: Path, loud: dict[str, str]
) -> None:
    planted = "hf_PlantedTokenThatNobodyMaySee"
    published.users[planted] = ("alice", ["org"])
    commands: list[list[object]] = [
        ["push", small_fp32, "org/new"],
        ["pull", "org/name"],
        ["pull", "org/none"],
        ["models", "--remote"],
    ]
    said = ""
    for known in (True, False):
        if not known:
            del published.users[planted]  # the server then repeats it in its answers
        for command in commands:
            result = call(*command, token=planted, **loud)
            said += result.stdout + result.stderr
    published.faults = [Fault("/api/models/org/name", 418, times=99)]
    said += call("pull", "org/name", token=planted, **loud).stderr
    assert "refuses the token" in said
    assert "not for Bearer <token>" in said
    assert planted not in said
    published.faults = [Fault("/api/models/org/other", 418, times=99)]
    for port in ("1", published.url.rpartition(":")[2]):
        line = one_line(call("pull", "org/other", HF_ENDPOINT=f"http://user:{planted}@127.0.0.1:{port}"))
        assert planted not in line


@pytest.mark.parametrize("given", ["hf_planted\\n", " hf_planted ", "hf_plan ted", "hf_planted\\xe9"])
def test_a_token_that_cannot_be_sent_is_not_printed_and_not_the_networks_fault(
    published: FakeHub, load: Load, python: Run, example_files: list[Path], tmp_path: Path, given: str
) -> None:
    load(tmp_path / "home", example_files)  # the cache must not answer instead
    code = LOAD.format(arguments=f'"org/name", token="{given}"')
    environment = hub_environment(published, tmp_path / "home")
    result = python(code, tmp_path / "f.npy", example_files[0], env=environment)
    assert result.returncode == 1
    said = result.stderr.splitlines()[-1]
    assert ("refuses the token" in said) == (given.replace("\\n", "").strip() == "hf_planted")
    assert "cannot be reached" not in said
    assert not [line for line in result.stderr.splitlines() if "hf_plan" in line and "LOAD" not in line]


@pytest.mark.parametrize(
    "environment",
    [
        {"HF_HUB_ETAG_TIMEOUT": "soon"},
        {"HF_ENDPOINT": "http://[::1"},
        {"HF_ENDPOINT": "nonsense"},
        {"HF_ENDPOINT": "http://127.0.0.1:99999"},
    ],
)
def test_an_environment_that_makes_no_sense_is_one_line(call: Call, environment: dict[str, str]) -> None:
    line = one_line(call("info", "org/name", **environment))
    assert "HF_" in line


# Downloading


def test_without_a_network_the_cache_answers_and_the_rest_fails_soon(
    published: FakeHub, load: Load, call: Call, example_files: list[Path], tmp_path: Path
) -> None:
    expected = load(tmp_path / "home", example_files)
    call("--version")  # the first command of a worker also starts the process that forks the others
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for endpoint, limit_s in (("http://127.0.0.1:1", 5), (f"http://127.0.0.1:{silent.getsockname()[1]}", 8)):
            began = time.monotonic()
            line = one_line(call("info", "org/other", HF_ENDPOINT=endpoint))
            assert time.monotonic() - began < limit_s  # the silent one has three of them
            assert "cannot be reached" in line
            assert "is neither in the cache nor a folder" in line
            assert "check the network" in line
            began = time.monotonic()
            assert "cannot be reached" in one_line(call("models", "--remote", HF_ENDPOINT=endpoint))
            assert time.monotonic() - began < limit_s
            assert "the cache is unchanged" in one_line(call("pull", "org/name", "--force", HF_ENDPOINT=endpoint))
            features = load(tmp_path / "home", example_files, HF_ENDPOINT=endpoint)
            assert features.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        ('"org/name"', {"HF_HUB_OFFLINE": "1"}),
        ('"org/name", local_files_only=True', {}),
        ('"org/name", revision="{commit}"', {}),
    ],
)
def test_no_call_where_none_is_needed(
    published: FakeHub,
    load: Load,
    example_files: list[Path],
    tmp_path: Path,
    arguments: str,
    environment: dict[str, str],
) -> None:
    expected = load(tmp_path / "home", example_files)
    arguments = arguments.format(commit=published.model("org/name").branches["main"])
    published.requests.clear()
    assert load(tmp_path / "home", example_files, arguments, **environment).tobytes() == expected.tobytes()
    assert published.requests == []


def test_offline_an_uncached_model_says_what_to_do(published: FakeHub, call: Call) -> None:
    line = one_line(call("info", "org/name", HF_HUB_OFFLINE="1"))
    assert "HF_HUB_OFFLINE" in line
    assert "robustfeat pull org/name" in line
    assert published.requests == []


def test_endpoint_and_cache_can_be_given(
    published: FakeHub, load: Load, example_files: list[Path], tmp_path: Path
) -> None:
    arguments = f'"org/name", endpoint={published.url!r}, cache_dir={str(tmp_path / "cache")!r}, precision="int8"'
    features = load(tmp_path / "home", example_files, arguments, HF_ENDPOINT="http://127.0.0.1:1")
    assert features.shape == (40, 96)
    assert (tmp_path / "cache" / "models--org--name").is_dir()
    assert not (tmp_path / "home" / "hub").exists()


def test_a_download_that_is_cut_goes_on(
    published_builtin: FakeHub, load: Load, example_files: list[Path], tmp_path: Path, client: dict[str, str]
) -> None:
    published_builtin.faults = [Fault("/large/", "cut"), Fault("/large/", "slow")]
    features = load(tmp_path / "home", example_files, **client)
    assert features.tobytes() == FeatureExtractor.from_pretrained().embed(example_files).tobytes()
    assert len([request for request in published_builtin.requests if request.startswith("GET /large/")]) == 2


def test_a_download_that_never_ends_well_leaves_nothing_that_loads_wrongly(
    published: FakeHub,
    load: Load,
    call: Call,
    example_files: list[Path],
    small_model: Path,
    tmp_path: Path,
    client: dict[str, str],
) -> None:
    published.faults = [Fault("/large/", 500, times=99)]
    line = one_line(call("pull", "org/name", **client))
    assert "org/name: " in line
    assert "fails" in line
    published.faults.clear()
    features = load(tmp_path / "home", example_files, **client)
    assert features.tobytes() == FeatureExtractor.from_pretrained(small_model).embed(example_files).tobytes()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_an_altered_download_is_refused_by_name_and_can_be_replaced(
    published: FakeHub, call: Call, examples: Path, tmp_path: Path, precision: str
) -> None:
    published.faults = [Fault("/large/", "alter")]
    command = ["embed", examples, "--model", "org/name", "--precision", precision, "--out", tmp_path / "f.npy"]
    for _ in range(2):
        line = one_line(call(*command))
        assert re.search(r"onnx/model(_int8)?\.onnx: altered or truncated", line)
        assert "robustfeat pull org/name --force" in line
    result = call("pull", "org/name", "--force")
    assert result.returncode == 0, result.stderr
    assert call(*command).returncode == 0


def test_two_processes_may_pull_at_once(published: FakeHub, start: Start, tmp_path: Path) -> None:
    published.faults = [Fault("/large/", "slow", times=4)]
    environment = hub_environment(published, tmp_path / "home")
    both = [start(["pull", "org/name", "--all", "--json"], environment) for _ in range(2)]
    answers = []
    for process in both:
        out, err = process.communicate()
        assert process.returncode == 0, err
        answers.append(json.loads(out))
    assert answers[0] == answers[1]
    assert answers[0]["revision"] == published.model("org/name").branches["main"]


def test_pull_takes_what_is_needed_and_a_folder_of_its_own_takes_everything(
    published: FakeHub, call: Call, small_model: Path, tmp_path: Path
) -> None:
    result = call("pull", "org/name", "--precision", "int8")
    assert result.returncode == 0, result.stderr
    cached = Path(result.stdout.strip())
    names = {file.relative_to(cached).as_posix() for file in cached.rglob("*") if file.is_file()}
    assert "onnx/model_int8.onnx" in names
    assert "golden/features.npy" in names
    assert not names & {"onnx/model.onnx", "model.safetensors", "training.json"}
    assert call("pull", "org/name", "--precision", "fp16").returncode == 0
    assert (cached / "onnx/model.onnx").is_file()  # from which it is made
    result = call("pull", "org/name", "--out", tmp_path / "mine")
    assert result.returncode == 0, result.stderr
    assert files_of(tmp_path / "mine") == files_of(small_model)
    assert not any(file.is_symlink() for file in (tmp_path / "mine").rglob("*"))
    assert "exists already" in one_line(call("pull", "org/name", "--out", tmp_path / "mine"))


def test_embedding_downloads_what_its_precision_needs(
    published: FakeHub, call: Call, examples: Path, tmp_path: Path
) -> None:
    result = call("embed", examples / "hat", "--model", "org/name", "--out", tmp_path / "f.npy")
    assert result.returncode == 0, result.stderr
    commit = published.model("org/name").branches["main"]
    got = {request.split("/")[-1] for request in published.requests if request.startswith("GET /org/name/")}
    large = [request for request in published.requests if request.startswith("GET /large/")]
    assert (got, len(large)) == ({"config.json"}, 1)
    assert json.loads((tmp_path / "f.meta.json").read_text())["revision"] == commit


@pytest.mark.slow
def test_rays_workers_take_the_model_from_the_hub(
    published: FakeHub, call: Call, examples: Path, small_model: Path, tmp_path: Path
) -> None:
    command = ["embed", examples / "hat", "--model", "org/name", "--out", tmp_path / "f.npy", "--ray=local", "--quiet"]
    result = call(*command)
    assert result.returncode == 0, result.stderr
    files = sorted((examples / "hat").iterdir())
    assert np.load(tmp_path / "f.npy").tobytes() == FeatureExtractor.from_pretrained(small_model).embed(files).tobytes()


def test_the_config_hash_pins_a_model(published: FakeHub, call: Call, tmp_path: Path) -> None:
    digest = hashlib.sha256(published.read("org/name", "config.json")).hexdigest()
    assert call("pull", "org/name", "--config-hash", digest).returncode == 0
    edit_config(published, lambda data: data["robustfeat"].update(name="other-v1"))
    assert "not the requested model" in one_line(call("pull", "org/name", "--config-hash", digest))


# Trust


def test_editing_the_card_breaks_nothing(
    published: FakeHub, call: Call, examples: Path, example_files: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "f.npy"
    assert call("embed", examples / "hat", "--model", "org/name", "--out", out).returncode == 0
    published.commit(published.model("org/name"), "main", {"README.md": b"my own words", "figure.png": b"x"})
    result = call("embed", examples, "--model", "org/name", "--out", out, "--append", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["images"] == 44  # four of them under another name than before


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"onnx/model.onnx": b"weights of somebody else"}, "onnx/model.onnx: altered or truncated"),
        ({"pytorch_model.bin": b"\x80\x04."}, "contains pytorch_model.bin, which may run code"),
        ({"modeling_robust.py": b"import os"}, "contains modeling_robust.py, which may run code"),
        ({".hidden.pkl": b"\x80\x04."}, "contains .hidden.pkl, which may run code"),
        ({"preprocessor_config.json": b"{}", "onnx/model.onnx": None}, "holds no onnx/model.onnx"),
    ],
)
def test_what_was_altered_or_added_is_refused_by_name(
    published: FakeHub, call: Call, examples: Path, tmp_path: Path, files: dict[str, bytes | None], message: str
) -> None:
    published.commit(published.model("org/name"), "main", files)
    line = one_line(call("embed", examples, "--model", "org/name", "--out", tmp_path / "f.npy"))
    assert message in line
    assert "org/name" in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(auto_map={"AutoModel": "modeling.Robust"}), "the entry 'auto_map' names code to run"),
        (
            lambda data: data["robustfeat"]["files"].update({"../../../x": "0"}),
            "lists '../../../x', which is outside",
        ),
        (
            lambda data: data["robustfeat"]["files"].update({"/etc/passwd": "0"}),
            "lists '/etc/passwd', which is outside",
        ),
        (
            lambda data: data["robustfeat"]["files"].update({"weights.pkl": "0"}),
            "contains weights.pkl, which may run code",
        ),
        (
            lambda data: data["robustfeat"].update(format_version=2),
            "format_version must be 1; got 2; upgrade robustfeat",
        ),
    ],
)
def test_a_config_that_may_not_be_trusted_is_refused_by_name(
    published: FakeHub, call: Call, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    edit_config(published, change)
    assert message in one_line(call("info", "org/name"))


def test_what_names_code_for_other_libraries_is_refused_as_it_arrives(published: FakeHub, call: Call) -> None:
    content = json.dumps({"auto_map": {"AutoImageProcessor": "evil.Processor"}}).encode()
    published.commit(published.model("org/name"), "main", {"preprocessor_config.json": content})
    digest = hashlib.sha256(content).hexdigest()
    edit_config(published, lambda data: data["robustfeat"]["files"].update({"preprocessor_config.json": digest}))
    assert "the entry 'auto_map' names code to run" in one_line(call("pull", "org/name"))


def test_what_is_pushed_between_two_questions_is_not_used(published: FakeHub, call: Call, tmp_path: Path) -> None:
    repo = published.model("org/name")
    seen = repo.branches["main"]
    published.after = {"/api/models/org/name": lambda: published.commit(repo, "main", {"evil.pkl": b"x"})}
    result = call("pull", "org/name", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["revision"] == seen
    assert repo.branches["main"] != seen


def test_access_that_was_withdrawn_is_not_answered_by_an_older_commit(published: FakeHub, call: Call) -> None:
    assert call("pull", "org/name", token="hf_bob").returncode == 0
    published.commit(published.model("org/name"), "main", {"README.md": b"new"})
    published.model("org/name").gated = True
    assert "access is gated" in one_line(call("pull", "org/name", token="hf_bob"))


# Finding


def test_models_lists_what_is_here_and_what_is_there(published_builtin: FakeHub, call: Call) -> None:
    published_builtin.add("org/bert", {"README.md": b"---\ntags: [bert]\n---\n"})
    _, title, *public = call("models").stdout.splitlines()
    assert title == "Public models:"
    commands = [line.split(maxsplit=2)[1:] for line in public[1::2]]
    assert ["import", "timm:tf_efficientnet_lite0.in1k --out tf_efficientnet_lite0.in1k"] in commands
    assert ["pull", "onnx-community/dinov2-small"] in commands
    assert call("pull", "org/name").returncode == 0
    builtin, cached, *_ = call("models").stdout.splitlines()
    commit = published_builtin.model("org/name").branches["main"]
    score = str(builtin_model().config.evaluations[-1])
    assert score.startswith("CIFAR-10 (JPEG copy) accuracy ")
    for line, start in ((builtin, "builtin"), (cached, f"org/name {commit[:12]} (main)")):
        assert " ".join(line.split()).startswith(start)
        assert score in line
        assert "MB" in line
    (found,) = call("models", "--remote", "NAM", "--json").stdout.splitlines()
    listing = json.loads(found)
    assert (listing["model"], listing["revision"]) == ("org/name", commit)
    assert listing["size_bytes"] > 10_000_000
    assert score in listing["scores"]
    assert "no model on the Hub has 'zebra' in its name" in call("models", "--remote", "zebra").stderr


def test_models_of_others_are_shown_apart_if_they_load_by_name(published_builtin: FakeHub, call: Call) -> None:
    def card(task: str, *tags: str) -> bytes:
        return f"---\npipeline_tag: {task}\nlicense: mit\ntags: [{', '.join(tags)}]\n---\n".encode()

    def add(name: str, readme: bytes, downloads: int = 0, files: dict[str, bytes] | None = None) -> None:
        usual = {"config.json": b'{"model_type": "vit"}', "preprocessor_config.json": b"{}", "onnx/model.onnx": b"x"}
        tree = {path: content for path, content in {**usual, **(files or {})}.items() if content}
        published_builtin.add(name, {"README.md": readme, **tree}, downloads=downloads)

    features, classes = "image-feature-extraction", "image-classification"
    add("x/small", card(features, "onnx"), 10)
    add("x/large", card(features, "onnx", "transformers.js"), 20)
    towers = {"onnx/model.onnx": b"", "onnx/vision_model.onnx": b"x"}
    add("x/two", card("zero-shot-image-classification", "onnx"), files=towers)
    add("x/classes", card(classes, "onnx"), 5)
    add("x/no-network", card(features, "onnx"), files={"onnx/model.onnx": b"", "onnx/decoder.onnx": b"x"})
    add("x/no-processor", card(features, "onnx"), files={"preprocessor_config.json": b""})
    add("x/no-type", card(features, "onnx"), files={"config.json": b"{}"})
    add("x/torch", card(features, "pytorch"))
    add("x/text", card("feature-extraction", "onnx"))
    ours, title, *others = call("models", "--remote").stdout.splitlines()
    assert ours.startswith("org/name ")
    assert title == "ONNX models of others:"
    assert others == [
        *("  x/large: mit, 20 downloads a month", "      robustfeat pull x/large"),
        *("  x/small: mit, 10 downloads a month", "      robustfeat pull x/small"),
        *("  x/classes: mit, 5 downloads a month", "      robustfeat pull x/classes"),
        *("  x/two: mit, 0 downloads a month", "      robustfeat pull x/two"),
    ]
    (found,) = map(json.loads, call("models", "--remote", "SMALL", "--json").stdout.splitlines())
    assert (found["group"], found["model"], found["license"]) == ("others", "x/small", "mit")
    assert found["command"] == "robustfeat pull x/small"
    assert found["revision"] == published_builtin.model("x/small").branches["main"]


def test_info_of_a_remote_model_downloads_its_config_alone(published: FakeHub, call: Call) -> None:
    result = call("info", "org/name")
    assert result.returncode == 0, result.stderr
    assert published.model("org/name").branches["main"] in result.stdout
    assert "0 of 14 here" in result.stdout
    fetched = [request for request in published.requests if request.startswith("GET")]
    commit = published.model("org/name").branches["main"]
    assert fetched == ["GET /api/models/org/name", f"GET /org/name/resolve/{commit}/config.json"]


def test_verify_runs_every_engine_and_says_what_falls_short(call: Call, published: FakeHub, tmp_path: Path) -> None:
    result = call("verify", "org/name", "--json")
    assert result.returncode == 0, result.stderr
    checks = {(check["engine"], check["precision"]): check for check in map(json.loads, result.stdout.splitlines())}
    ways = {("onnxruntime", "fp32"), ("onnxruntime", "fp16"), ("onnxruntime", "int8"), ("openvino", "fp32")}
    assert ways | {("pytorch", "fp32")} <= set(checks)
    assert all(check["cosine"] >= 0.99 for check in checks.values() if check["cosine"] is not None)


@pytest.fixture
def other_answers(small_model: Path, tmp_path: Path) -> Path:
    """A folder whose golden features are another network's, its hashes in order."""
    copy = Path(shutil.copytree(small_model, tmp_path / "copy"))
    file = copy / "golden" / "features.npy"
    np.save(file, np.load(file)[:, ::-1].copy())
    data = json.loads((copy / "config.json").read_text())
    data["robustfeat"]["files"]["golden/features.npy"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (copy / "config.json").write_text(json.dumps(data))
    return copy


def test_a_model_that_gives_other_answers_is_found_out_and_not_pushed(
    hub: FakeHub, call: Call, other_answers: Path
) -> None:
    result = call("verify", other_answers)
    assert result.returncode == 3
    assert re.search(r"onnxruntime fp32 +cosine 0\.\d+ .* below 0\.9999", result.stdout)
    assert "nothing was sent" in one_line(call("push", other_answers, "org/name"))
    assert not hub.requests
