"""`robustfeat doctor` finds what is wrong, and nothing where nothing is."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from robustfeat import doctor
from robustfeat.doctor import NOTE, OK, PROBLEM, Finding, examine
from robustfeat.serving.engines.options import RunOptions
from robustfeat.serving.torchserve.java import find_java
from robustfeat.system import CGROUP
from tests.conftest import ROOT, Run
from tests.serving.torchserve.conftest import why_not

VISIBLE = len(os.sched_getaffinity(0))


def check(name: str, model: str = "builtin", *, cgroup: Path = CGROUP, **options: Any) -> list[Finding]:
    """What one check finds."""
    return list(examine(model, RunOptions(**options), only=[name], cgroup=cgroup))


def problems(findings: list[Finding]) -> list[Finding]:
    found = [finding for finding in findings if finding.status == PROBLEM]
    assert all(finding.fix for finding in found)
    return found


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_a_good_installation_has_no_problem(robustfeat: Run) -> None:
    done = robustfeat("doctor")
    assert (done.returncode, done.stderr) == (0, "no problems\n")
    checks = {line.split()[1] for line in done.stdout.splitlines() if not line.startswith(" ")}
    assert checks == {
        *("python", "packages", "runtime", "threads", "gpu", "model", "engine", "torch", "torchserve", "hub", "cache")
    }
    assert f"{VISIBLE} processors" in done.stdout
    (asked,) = (line for line in done.stdout.splitlines() if "onnxruntime" in line and " fp32 on cpu" in line)
    assert float(asked.rpartition("cosine ")[2]) >= 0.9999
    assert "openvino" in done.stdout


def plant_wheels(folder: Path) -> Path:
    for name in ("onnxruntime_gpu", "onnxruntime"):
        info = folder / f"{name}-1.99.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.99.0\n")
    return folder


def break_model(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    with (folder / "onnx" / "model.onnx").open("ab") as file:
        file.write(b"x")
    return folder


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU")
def test_the_command_finds_all_that_is_wrong(robustfeat: Run, model: Path, tmp_path: Path) -> None:
    broken, wheels = break_model(model, tmp_path / "model"), plant_wheels(tmp_path / "wheels")
    environment = {**os.environ, "PYTHONPATH": str(wheels), "PATH": str(tmp_path), "JAVA_HOME": ""}
    done = robustfeat("doctor", broken, "--device", "cuda", "--threads", VISIBLE + 1, "--json", env=environment)
    assert (done.returncode, done.stderr) == (3, "")
    findings = [Finding(**json.loads(line)) for line in done.stdout.splitlines()]
    served = {"torchserve"} if sys.version_info < (3, 14) else set()
    assert {finding.check for finding in problems(findings)} == {
        "runtime",
        "threads",
        "model",
        "engine",
    } | served
    (fix,) = (finding.fix for finding in problems(findings) if finding.check == "threads")
    assert fix == f"pass --threads {VISIBLE} or less, or leave it out"  # as the command line has it


def test_two_wheels_of_onnx_runtime_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(plant_wheels(tmp_path))
    (found,) = problems(check("runtime"))
    assert found.found == "onnxruntime 1.99.0 and onnxruntime-gpu 1.99.0 overwrite each other's files"
    assert found.fix == "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'robustfeat[gpu]'"


@pytest.mark.parametrize(
    ("code", "said", "fix"),
    [
        # What stays when one of two wheels is uninstalled: a folder without its modules.
        ("", "is incomplete", "uninstall all onnxruntime packages"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n", "crashed (signal 11)", "--force-reinstall"),
        ("raise ImportError('libcudart.so.13')", "cannot be imported (libcudart.so.13)", "uninstall all"),
    ],
)
def test_an_engine_that_does_not_run_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, said: str, fix: str
) -> None:
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    findings = check("engine")
    (found,) = problems(findings)
    assert said in found.found
    assert fix in str(found.fix)
    assert {finding.status for finding in findings if "openvino" in finding.found} == {OK}


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU")
def test_cuda_that_is_asked_for_and_absent_is_found() -> None:
    (found,) = check("gpu", device="cuda")
    assert found.status == NOTE
    assert found.found == "CUDA is required, but no NVIDIA GPU answers (nvidia-smi)"
    (found,) = problems(check("engine", device="cuda"))
    assert "ONNX Runtime runs on the CPU here" in found.found
    (found,) = check("gpu", engine="tensorrt")
    assert (found.status, str(found.fix).rpartition(", or ")[2]) == (NOTE, "leave out `engine=tensorrt`")
    (found,) = problems(check("engine", engine="tensorrt"))
    assert "robustfeat[tensorrt]" in str(found.fix)


def test_a_gpu_without_its_runtime_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H200, 590.44, 143771 MiB'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (found,) = check("gpu")
    assert (found.status, found.fix) == (NOTE, "pip uninstall -y onnxruntime, then pip install 'robustfeat[gpu]'")
    assert "NVIDIA H200" in found.found


def test_java_that_is_missing_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    (found,) = check("torchserve")
    served = sys.version_info < (3, 14)
    assert found.status == (PROBLEM if served else NOTE)
    assert found.found == "TorchServe needs Java 17 or newer; none is on the PATH"
    assert "openjdk-17" in str(found.fix)


def test_java_that_is_too_old_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "java"
    program.write_text("#!/bin/sh\necho 'openjdk version \"1.8.0_432\"' >&2\n")
    program.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    from robustfeat.errors import EngineError

    with pytest.raises(EngineError, match="needs Java 17 or newer; this is 8"):
        find_java()


def quota(folder: Path, processors: float) -> Path:
    (folder / "cpu.max").write_text(f"{round(processors * 100_000)} 100000\n")
    return folder


def test_a_quota_below_the_threads_asked_for_is_found(tmp_path: Path) -> None:
    (found,) = problems(check("threads", threads=VISIBLE, cgroup=quota(tmp_path, 0.5)))
    assert "a cgroup quota of 0.5" in found.found
    assert found.fix == "pass `threads=1` or less, or leave it out"


def test_a_quota_below_the_threads_of_the_environment_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    (found,) = problems(check("threads", cgroup=quota(tmp_path, 1)))
    assert (found.found, found.fix) == (
        "OMP_NUM_THREADS is 8, but 1 processor is available",
        "export OMP_NUM_THREADS=1",
    )


@pytest.fixture
def no_thread_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever limits the one who runs the tests has set."""
    for variable in doctor._THREAD_VARIABLES:
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.skipif(VISIBLE < 2, reason="needs two processors")
@pytest.mark.usefixtures("no_thread_variables")
def test_a_quota_below_the_processors_is_a_note(tmp_path: Path) -> None:
    first, second = check("threads", cgroup=quota(tmp_path, 1))
    assert first.found == f"{VISIBLE} processors, a cgroup quota of 1: 1 thread for the model"
    assert second.status == NOTE
    assert f"start {VISIBLE} threads" in second.found


@pytest.mark.skipif(VISIBLE < 2, reason="needs two processors")
@pytest.mark.usefixtures("no_thread_variables")
def test_a_quota_below_the_processors_is_told(tmp_path: Path) -> None:
    """With a real file in the place of the system's, where the system lets us."""
    quota(tmp_path, 1)
    code = "import json, dataclasses; from robustfeat.doctor import examine; "
    code += "[print(json.dumps(dataclasses.asdict(found))) for found in examine(only=['threads'])]"
    script = f"mount --bind {tmp_path} /sys/fs/cgroup && exec {sys.executable} -c {shlex.quote(code)}"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    if "permitted" in done.stderr or "denied" in done.stderr:
        pytest.skip("mounts are not permitted here")
    found = [Finding(**json.loads(line)) for line in done.stdout.splitlines()]
    first, second = found
    assert first.found == f"{VISIBLE} processors, a cgroup quota of 1: 1 thread for the model"
    assert second.status == NOTE
    assert f"start {VISIBLE} threads" in second.found


def test_threads_beyond_the_machine_are_found() -> None:
    (found,) = problems(check("threads", threads=VISIBLE + 1))
    assert found.fix == f"pass `threads={VISIBLE}` or less, or leave it out"


def test_a_broken_model_folder_is_found(model: Path, tmp_path: Path) -> None:
    findings = list(examine(str(break_model(model, tmp_path / "model")), only=["model", "engine"]))
    (found,) = problems(findings)
    assert found.check == "model"
    assert "altered or truncated" in found.found
    assert found.fix == "copy or export the model again"
    assert any(finding.check == "engine" and finding.status == OK for finding in findings)


def test_a_package_that_is_too_old_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "orjson-3.0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: orjson\nVersion: 3.0.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    (found,) = problems(check("packages"))
    assert (found.found, found.fix) == ("orjson>=3.10 is needed; 3.0.0 is installed", "pip install 'orjson>=3.10'")


def test_a_hub_that_does_not_answer_is_told() -> None:
    """In a process of its own: the Hub's client reads the environment once."""
    code = "from robustfeat.doctor import examine; from dataclasses import asdict; import json\n"
    code += "print(json.dumps(asdict(next(examine(only=['hub'])))))"
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    found = Finding(**json.loads(done.stdout))
    assert found.status == NOTE
    assert "http://127.0.0.1:9 cannot be reached" in found.found
    assert found.fix == "check the network and HF_ENDPOINT"


def test_a_cache_that_cannot_be_written_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/proc/none")
    (found,) = problems(check("cache", "org/name"))
    assert found.found.startswith("/proc/none: cannot be written")
    assert check("cache")[0].status == NOTE


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        (RunOptions(engine="openvino", device="cuda"), "pass `engine=onnxruntime`, or `device=cpu`"),
        (RunOptions(config_hash="abc"), "copy it from robustfeat info"),
        (
            RunOptions(engine="onnxruntime", precision="bf16"),
            "pass `engine=openvino`, or `precision=fp32` or `precision=int8`",
        ),
    ],
)
def test_a_fix_is_what_to_do(options: RunOptions, fix: str) -> None:
    found = next(iter(problems(list(examine("builtin", options, only=["model", "engine"])))))
    assert found.fix == fix


def test_the_cache_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "none" / "yet"))
    (found,) = check("cache")
    assert found.status == OK
    assert found.found.startswith(f"{tmp_path}/none/yet: 0 of robustfeat's models, 0 MB; ")
