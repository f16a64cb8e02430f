"""The files that TorchServe is given."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from robustfeat.hub.folder import ModelFolder
from robustfeat.serving.torchserve.archive import claim_store
from tests.conftest import Run, files_of, hub_environment
from tests.hub_server import FakeHub


@pytest.fixture(scope="module")
def store(robustfeat: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("archive") / "store"
    done = robustfeat("torchserve", "--out", store, "--workers", 3, "--precision", "int8", "--token-life", 90)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "archive": str(store / "robustfeat.mar"),
        "config": str(store / "config.properties"),
        "name": "robustfeat",
    }
    return store


@pytest.fixture(scope="module")
def unpacked(store: Path) -> Path:
    with zipfile.ZipFile(store / "robustfeat.mar") as mar:
        mar.extractall(store.parent / "unpacked")
    return store.parent / "unpacked"


def test_the_manifest_and_the_configuration_say_what_was_asked(unpacked: Path) -> None:
    manifest = json.loads((unpacked / "MAR-INF" / "MANIFEST.json").read_text())["model"]
    assert manifest["modelName"] == "robustfeat"
    assert (unpacked / manifest["handler"].partition(":")[0]).is_file()
    config = yaml.safe_load((unpacked / manifest["configFile"]).read_text())
    assert (config["minWorkers"], config["maxWorkers"]) == (3, 3)
    assert config["robustfeat"]["options"]["precision"] == "int8"
    assert (config["deviceType"], config["batchSize"]) == ("cpu", 8)
    assert config["responseTimeout"] > config["robustfeat"]["timeout_s"] == 60


def test_the_model_in_it_is_whole(unpacked: Path) -> None:
    ModelFolder(unpacked / "model").verify()


def test_it_needs_nothing_but_its_requirements(unpacked: Path) -> None:
    """The code in the archive, and not the installed one, runs; what it loads is in requirements.txt."""
    code = (
        "import sys; standard = set(sys.stdlib_module_names); import robustfeat_handler, robustfeat, onnxruntime;"
        "from robustfeat.serving.decoding import worker as decoder;"
        "print(robustfeat.__file__); print(*{name.partition('.')[0] for name in sys.modules} - standard)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(unpacked)},
        cwd=unpacked,
        capture_output=True,
        text=True,
        check=True,
    )
    place, loaded = done.stdout.splitlines()
    assert place == str(unpacked / "robustfeat" / "__init__.py")
    ours = {line.partition(">")[0] for line in (unpacked / "requirements.txt").read_text().splitlines()}
    assert ours == {"numpy", "onnxruntime", "orjson", "pillow", "pydantic", "pyyaml"}
    heavy = {"click", "fastapi", "huggingface_hub", "prometheus_client", "scipy", "sklearn", "starlette", "torch"}
    assert not heavy & set(loaded.split())
    assert {"numpy", "onnxruntime", "orjson", "PIL", "pydantic"} <= set(loaded.split())


def test_the_defaults_are_safe(store: Path) -> None:
    lines = (store / "config.properties").read_text().splitlines()
    properties = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert properties["disable_token_authorization"] == "false"
    assert properties["token_expiration_min"] == "90"
    assert properties["enable_model_api"] == "false"
    assert properties["allowed_urls"] == ""
    assert properties["install_py_dep_per_model"] == "false"
    assert properties["max_request_size"] == str(32 * 2**20)
    assert int(properties["max_response_size"]) >= 64 * 512 * 12
    assert all("127.0.0.1" in text for name, text in properties.items() if name.endswith("_address"))


def test_the_configuration_is_replaced_while_it_is_ours(robustfeat: Run, tmp_path: Path) -> None:
    assert robustfeat("torchserve", "--out", tmp_path).returncode == 0
    assert robustfeat("torchserve", "--out", tmp_path, "--port", 9000).returncode == 0
    file = tmp_path / "config.properties"
    assert "127.0.0.1:9000" in file.read_text()
    file.write_text("# mine\n")
    (tmp_path / "robustfeat.mar").unlink()
    done = robustfeat("torchserve", "--out", tmp_path)
    assert done.returncode == 1
    assert "was not written by robustfeat" in done.stderr
    assert file.read_text() == "# mine\n"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["config.properties"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--name", "a b"], "expected letters"),
        (["--name", "../up"], "expected letters"),
        (["nowhere"], "no such folder"),
        (["--host", "::1"], "IPv4"),
        (["--precision", "bf16", "--engine", "onnxruntime"], "no bf16"),
        (["--engine", "openvino", "--device", "cuda"], "does not run on cuda"),
    ],
)
def test_what_cannot_be_packed_leaves_nothing(robustfeat: Run, tmp_path: Path, arguments: list[str], said: str) -> None:
    done = robustfeat("torchserve", *arguments, "--out", tmp_path / "store")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert said in done.stderr
    assert not (tmp_path / "store").exists() or not any((tmp_path / "store").iterdir())


def test_a_model_from_the_hub_is_packed_whole_with_its_commit(
    robustfeat: Run, hub: FakeHub, one_file: Path, tmp_path: Path
) -> None:
    hub.add("org/name", files_of(one_file))
    environment = hub_environment(hub, tmp_path / "home")
    done = robustfeat("torchserve", "org/name", "--out", tmp_path / "store", env=environment)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / "store" / "name.mar") as mar:
        mar.extractall(tmp_path / "unpacked")
    ModelFolder(tmp_path / "unpacked" / "model").verify()
    manifest = json.loads((tmp_path / "unpacked" / "MAR-INF" / "MANIFEST.json").read_text())["model"]
    config = json.loads((tmp_path / "unpacked" / "model-config.yaml").read_text())
    commit = config["robustfeat"]["options"]["revision"]
    assert re.fullmatch("[0-9a-f]{40}", commit)
    assert manifest["modelVersion"] == commit


def test_an_archive_is_built_for_machines_unlike_this_one(robustfeat: Run, tmp_path: Path) -> None:
    done = robustfeat("torchserve", "--out", tmp_path, "--device", "cuda", "--name", "gpu")
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / "gpu.mar") as mar:
        config = json.loads(mar.read("model-config.yaml"))
        assert (config["deviceType"], config["batchSize"]) == ("gpu", 128)
        assert config["robustfeat"]["options"]["device"] == "cuda"
        assert "onnxruntime-gpu" in mar.read("requirements.txt").decode()


def test_an_archive_for_tensorrt_waits_for_its_engine(robustfeat: Run, tmp_path: Path) -> None:
    options = ("--engine", "tensorrt", "--precision", "fp16")
    done = robustfeat("torchserve", "--out", tmp_path, "--name", "gpu", *options)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / "gpu.mar") as mar:
        config = json.loads(mar.read("model-config.yaml"))
        assert (config["deviceType"], config["batchSize"], config["startupTimeout"]) == ("gpu", 128, 1200)
        needed = mar.read("requirements.txt").decode()
    assert "onnxruntime-gpu" in needed
    assert "tensorrt-cu13-libs" in needed
    assert "huggingface_hub" in needed


def test_answers_may_be_larger_than_requests(robustfeat: Run, tmp_path: Path) -> None:
    done = robustfeat("torchserve", "--out", tmp_path, "--max-body", 1, "--max-items", 10_000)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "config.properties").read_text()
    assert f"max_request_size={2**20}" in text
    (largest,) = re.findall(r"max_response_size=(\d+)", text)
    assert int(largest) >= 10_000 * 512 * 12


def test_one_command_at_a_time_has_a_store(robustfeat: Run, tmp_path: Path) -> None:
    with claim_store(tmp_path):
        done = robustfeat("torchserve", "--out", tmp_path)
    assert done.returncode == 1
    assert "another robustfeat torchserve uses it" in done.stderr
    assert not any(tmp_path.iterdir())


def test_an_altered_model_is_not_packed(robustfeat: Run, model: Path, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"other")
    done = robustfeat("torchserve", folder, "--out", tmp_path / "store")
    assert done.returncode == 1
    assert "altered" in done.stderr
    assert not list((tmp_path / "store").glob("*.mar"))
