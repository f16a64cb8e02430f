"""Model repositories, as Triton's protobuf, Triton itself and OpenVINO read them."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime
import openvino
import pytest
import tritonclient.http
from google.protobuf import text_format
from numpy.typing import NDArray
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from robustfeat import FeatureExtractor
from robustfeat.hub.catalog import builtin_model
from robustfeat.hub.preprocessing import Preprocessing, normalise, prepare_square
from robustfeat.serving import triton as triton_files
from tests import built_in
from tests.conftest import ROOT, Repositories, Run, build_once

TEXT = (ROOT / "docs" / "triton.md").read_text("utf-8")
PYTRITON = "nvidia-pytriton==0.7.0"
"""A wheel that carries Triton's server, without the backend of ONNX Runtime."""


@pytest.fixture(scope="module")
def repository(robustfeat: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("triton") / "repository"
    options = ("--batch-size", 16, "--batch-delay", 200, "--threads", 1)
    done = robustfeat("triton", "--out", out, *options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "name": "robustfeat",
        "model": str(out / "robustfeat"),
        "config": str(out / "robustfeat" / "config.pbtxt"),
        "openvino": str(out / "openvino.json"),
    }
    return out


def read(repository: Path, name: str = "robustfeat") -> Any:
    """config.pbtxt, by the message that Triton publishes; unknown fields and values are errors."""
    return text_format.Parse((repository / name / "config.pbtxt").read_text("utf-8"), ModelConfig())


def golden_input(config: Any) -> NDArray[np.float32]:
    """What a client sends of the golden images, by config.pbtxt alone."""
    contract = Preprocessing.from_dict(json.loads(config.parameters["preprocessing"].string_value))
    assert contract.hash == config.parameters["preprocessing_hash"].string_value
    images, _ = builtin_model().golden()
    return normalise(np.stack([prepare_square(image, contract) for image in images]), contract)


def assert_golden(features: NDArray[Any]) -> None:
    """As exact as `robustfeat verify` wants it."""
    expected = builtin_model().golden()[1]
    products = (features * expected).sum(1)
    assert (products / np.linalg.norm(features, axis=1) / np.linalg.norm(expected, axis=1)).min() > 0.9999
    images, _ = builtin_model().golden()
    np.testing.assert_allclose(features, FeatureExtractor.from_pretrained(threads=1).embed(images), 1e-4, 1e-5)


def test_the_configuration_fits_the_network(repository: Path) -> None:
    config = read(repository)
    assert (config.name, config.backend, config.max_batch_size) == ("robustfeat", "onnxruntime", 16)
    session = onnxruntime.InferenceSession(repository / "robustfeat" / "1" / "model.onnx")
    for ours, its in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        assert [(one.name, list(one.dims)) for one in ours] == [(one.name, one.shape[1:]) for one in its]
        assert isinstance(its[0].shape[0], str)  # a free batch size, which batching needs
    assert_golden(session.run(None, {config.input[0].name: golden_input(config)})[0])
    assert [sample.batch_size for sample in config.model_warmup] == [1, 16]
    policy = config.dynamic_batching.default_queue_policy
    assert config.dynamic_batching.max_queue_delay_microseconds == 200_000
    assert (policy.max_queue_size, policy.default_timeout_microseconds) == (256, 30_000_000)
    assert config.parameters["intra_op_thread_count"].string_value == "1"
    assert config.parameters["weights_sha256"].string_value == builtin_model().config.files["model.safetensors"]


def test_openvino_gives_the_features(repository: Path) -> None:
    """By the engine, the file and the settings of OpenVINO Model Server."""
    (entry,) = json.loads((repository / "openvino.json").read_text())["model_config_list"]
    file = repository / entry["config"]["base_path"] / "1" / "model.onnx"
    compiled = openvino.Core().compile_model(file, "CPU", entry["config"]["plugin_config"])
    assert_golden(compiled(golden_input(read(repository)))[0])


@pytest.mark.parametrize(
    ("options", "kind", "precision"),
    [
        (("--device", "cpu", "--precision", "int8"), "KIND_CPU", "int8"),
        (("--device", "cuda", "--instances", 2), "KIND_GPU", "fp32"),
        (("--engine", "tensorrt", "--precision", "fp16"), "KIND_GPU", "fp16"),
    ],
)
def test_the_options_reach_the_configuration(
    robustfeat: Run, tmp_path: Path, options: tuple[object, ...], kind: str, precision: str
) -> None:
    done = robustfeat("triton", "--out", tmp_path, "--name", "other", *options)
    assert done.returncode == 0, done.stderr
    config = read(tmp_path, "other")
    (group,) = config.instance_group
    assert ModelInstanceGroup.Kind.Name(group.kind) == kind
    assert group.count == (2 if "--instances" in options else 1)
    assert config.parameters["precision"].string_value == precision
    assert config.max_batch_size == (8 if kind == "KIND_CPU" else 128)
    accelerators = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert [one.name for one in accelerators] == (["tensorrt"] if "tensorrt" in options else [])
    for one in accelerators:
        assert one.parameters["precision_mode"] == "FP16"
        assert one.parameters["trt_profile_max_shapes"] == f"pixel_values:128x3x{built_in.SIDE}x{built_in.SIDE}"


def test_models_stand_side_by_side_and_none_is_replaced(robustfeat: Run, small_model: Path, tmp_path: Path) -> None:
    assert robustfeat("triton", "--out", tmp_path).returncode == 0
    done = robustfeat("triton", small_model, "--out", tmp_path, "--name", "small")
    assert done.returncode == 0, done.stderr
    again = robustfeat("triton", "--out", tmp_path)
    assert (again.returncode, again.stdout) == (1, "")
    assert "robustfeat: exists already; remove it" in again.stderr
    shutil.rmtree(tmp_path / "robustfeat")
    assert robustfeat("triton", small_model, "--out", tmp_path, "--name", "third").returncode == 0
    listed = json.loads((tmp_path / "openvino.json").read_text())["model_config_list"]
    assert [entry["config"]["name"] for entry in listed] == ["small", "third"]


def test_models_that_are_written_at_the_same_time_are_all_listed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    both_have_read, read = threading.Barrier(2), triton_files._read_openvino

    def read_together(file: Path) -> dict[str, dict[str, Any]]:
        served = read(file)
        with contextlib.suppress(threading.BrokenBarrierError):  # one waits for the other, as it should
            both_have_read.wait(0.5)
        return served

    monkeypatch.setattr(triton_files, "_read_openvino", read_together)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: triton_files._list_for_openvino(tmp_path, name), ("one", "two")))
    assert set(read(tmp_path / "openvino.json")) == {"one", "two"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--name", "a/b"], "--name a/b: expected letters"),
        (["nowhere"], "no such folder"),
        (["--precision", "int8", "--device", "cuda"], "int8 runs on processors"),
        (["--engine", "tensorrt", "--device", "cpu"], "TensorRT does not run on the processor"),
    ],
)
def test_what_cannot_be_served_leaves_nothing(robustfeat: Run, tmp_path: Path, arguments: list[str], said: str) -> None:
    done = robustfeat("triton", *arguments, "--out", tmp_path / "repository")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert said in done.stderr
    assert not (tmp_path / "repository").exists()


def test_another_programs_list_stays(robustfeat: Run, tmp_path: Path) -> None:
    (tmp_path / "openvino.json").write_text("{}")
    done = robustfeat("triton", "--out", tmp_path)
    assert "openvino.json: expected a list of models that robustfeat triton wrote" in done.stderr
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["openvino.json"]


def test_a_network_without_features_is_refused(robustfeat: Run, repositories: Repositories, tmp_path: Path) -> None:
    done = robustfeat("triton", repositories("dinov2"), "--out", tmp_path / "repository")
    assert done.returncode == 1
    assert "the network outputs last_hidden_state, not features" in done.stderr
    assert "robustfeat import hf:" in done.stderr


def why_not() -> str:
    """Why Triton does not run here; empty if it does."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64") or sys.version_info >= (3, 14):
        return "no wheel has Triton for this Python or machine"
    library = Path(sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("LDLIBRARY"))
    return "" if library.suffix != ".a" and library.exists() else "this Python has no shared library"


def install(target: Path) -> None:
    # Without what the wheel asks for: only the server in it is used.
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), PYTRITON]
    subprocess.run(command, check=True)


class Triton:
    """Triton at work on a repository, until it is stopped."""

    def __init__(self, wheel: Path, repository: Path, folder: Path) -> None:
        server = wheel / "pytriton" / "tritonserver"
        stub = f"python_backend_stubs/{sys.version_info[0]}.{sys.version_info[1]}/triton_python_backend_stub"
        shutil.copytree(server / "backends" / "python", folder / "python")
        shutil.copy(server / stub, folder / "python")
        (folder / "onnxruntime").mkdir()
        shutil.copy(Path(__file__).with_name("triton_backend.py"), folder / "onnxruntime" / "model.py")
        self.batches = folder / "onnxruntime" / "batches"
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONHOME": sys.base_prefix,
            "LD_LIBRARY_PATH": f"{sysconfig.get_config_var('LIBDIR')}:{wheel / 'nvidia_pytriton.libs'}",
            "ROBUSTFEAT_PACKAGES": ":".join(path for path in sys.path if path.endswith("-packages")),
        }
        self.port = free_port()
        command: list[str | Path] = [server / "bin" / "tritonserver", "--model-repository", repository]
        command += ["--backend-directory", folder]
        command += ["--http-address", "127.0.0.1", "--http-port", str(self.port)]
        command += ["--allow-grpc", "false", "--allow-metrics", "false"]
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while not self.ready():
            assert self.process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)

    def sizes(self) -> list[int]:
        """Of the batches so far."""
        return list(map(int, self.batches.read_text().split()))

    def ready(self) -> bool:
        place = f"http://127.0.0.1:{self.port}/v2/models/robustfeat/ready"
        with contextlib.suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(place) as answer:
            return bool(answer.status == 200)
        return False


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def triton(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    if reason := why_not():
        pytest.skip(reason)
    wheel = build_once(Path.home() / ".cache" / "robustfeat-tests", PYTRITON, install)
    server = Triton(wheel, repository, tmp_path_factory.mktemp("backends"))
    yield server
    server.process.terminate()
    server.process.wait(60)


def documented_client(port: int) -> Callable[[list[str]], NDArray[np.float32]]:
    """The function of the program in docs/triton.md, which prints what it shows."""
    (code,) = re.findall(r"<!-- tested -->\n```python\n(.*?)```", TEXT, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("localhost:8000", f"127.0.0.1:{port}"), names)
    embed: Callable[[list[str]], NDArray[np.float32]] = names["embed"]
    return embed


def test_the_documented_client_gets_the_features_of_triton(
    triton: Triton, example_files: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    embed = documented_client(triton.port)
    (shown,) = re.findall(r"print\(.*\)  # (.*)", TEXT)
    assert capsys.readouterr().out.strip() == shown
    files = [str(file) for file in example_files[:3]]
    np.testing.assert_allclose(
        embed(files), FeatureExtractor.from_pretrained(threads=1).embed(files), rtol=1e-4, atol=1e-5
    )


def test_triton_warms_up_and_makes_batches(triton: Triton, repository: Path) -> None:
    values = golden_input(read(repository))
    before = triton.sizes()
    assert sorted(before[:2]) == [1, 16]
    client = tritonclient.http.InferenceServerClient(f"127.0.0.1:{triton.port}", concurrency=len(values))
    answers = []
    for row in values:
        pixels = tritonclient.http.InferInput("pixel_values", [1, *row.shape], "FP32")
        pixels.set_data_from_numpy(row[None])
        answers.append(client.async_infer("robustfeat", [pixels]))
    assert_golden(np.concatenate([answer.get_result().as_numpy("features") for answer in answers]))
    sizes = triton.sizes()[len(before) :]
    assert sum(sizes) == len(values)
    assert max(sizes) > 1


def test_the_options_in_the_document_are_the_commands() -> None:
    from robustfeat.cli.triton_command import command

    known = {name for parameter in command.params if isinstance(parameter, click.Option) for name in parameter.opts}
    of_others = {"--rm", "--gpus", "--model-repository", "--config_path", "--rest_port"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*", TEXT)) <= known | of_others
