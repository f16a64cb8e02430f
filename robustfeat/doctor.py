"""Checks an installation and suggests fixes.

Every check is a function that yields findings, and no check can stop the others. Broken libraries may crash or hang, so
they run in separate processes. This module imports nothing that may be missing.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Container, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import robustfeat
from robustfeat.counts import format_count
from robustfeat.errors import RobustFeatError, UnreachableError, first_line
from robustfeat.serving.engines.options import BUILD_LIMIT_S, RunOptions
from robustfeat.system import CGROUP, available_cpus, cpu_quota, visible_cpus
from robustfeat.trial import TRIAL_S, Trial, try_engine, try_torch

if TYPE_CHECKING:
    from packaging.requirements import Requirement

__all__ = ["NOTE", "OK", "PROBLEM", "Finding", "examine"]

OK, NOTE, PROBLEM = "ok", "note", "problem"

_WHEELS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino", "onnxruntime-training")
_ENGINES = {"onnxruntime": "cpu", "openvino": "openvino"}
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_LITTLE_SPACE = 2**30


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    Attributes:
        check: the name of the check.
        status: `OK`, `NOTE` (worth knowing) or `PROBLEM` (the requested run will fail or give wrong results).
        found: the facts.
        fix: what to do; None for nothing. Like `found`, it has parameters in backticks (see `RobustFeatError`).
    """

    check: str
    status: str
    found: str
    fix: str | None = None


def examine(
    model: str = "builtin",
    options: RunOptions = RunOptions(),
    *,
    only: Container[str] | None = None,
    cgroup: Path = CGROUP,
) -> Iterator[Finding]:
    """Yields findings as they arrive. Checks that take seconds come last.

    Args:
        model, options: the model to run and how; by default as in `robustfeat embed`.
        only: names of the checks to run; by default all.
        cgroup: the mount point of the cgroup hierarchy.
    """
    broken = False
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("python", _python),
        ("packages", _packages),
        ("runtime", _runtime),
        ("threads", lambda: _threads(options, cgroup)),
        ("gpu", lambda: _gpu(options)),
        ("torchserve", _torchserve),
        ("hub", _hub),
        ("cache", lambda: _cache(model)),
        ("model", lambda: _model(model, options)),
        # If the model is broken, the engines may still work.
        ("engine", lambda: _engines(*(_unpinned(options) if broken else (model, options)))),
        ("torch", lambda: _torch(torch)),
    ]
    chosen = [name for name, _ in checks if only is None or name in only]
    # Importing torch takes as long as all other checks.
    torch = Trial(try_torch) if "torch" in chosen and importlib.util.find_spec("torch") else None
    for name, check in checks:
        if name not in chosen:
            continue
        try:
            yield from check()
        except RobustFeatError as exc:
            broken |= name == "model"
            yield _failed(name, PROBLEM, exc)
        except Exception as exc:  # a broken library may raise anything
            reason = f"{type(exc).__name__}: {first_line(exc)}"
            yield Finding(name, PROBLEM, reason, "pip install --force-reinstall the package that it names")


def _failed(check: str, status: str, exc: RobustFeatError, before: str = "") -> Finding:
    return Finding(check, status, f"{before}{exc.problem}", exc.fix)


def _unpinned(options: RunOptions) -> tuple[str, RunOptions]:
    """The built-in model and options to run it, to show whether the engines work."""
    return "builtin", replace(options, revision=None, config_hash=None)


def _python() -> Iterator[Finding]:
    version, wanted = platform.python_version(), "3.11 to 3.14"
    place = "a virtual environment" if sys.prefix != sys.base_prefix else "no virtual environment"
    found = f"{version} on {platform.system()} {platform.machine()}, {place}, robustfeat {robustfeat.__version__}"
    good = (3, 11) <= sys.version_info < (3, 15)
    yield Finding("python", OK, found) if good else Finding("python", PROBLEM, found, f"use Python {wanted}")


def _packages() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires("robustfeat") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("packages", NOTE, "robustfeat runs without being installed", "pip install '.[cpu]' in its folder")
        return
    needed = [Requirement(line) for line in lines]
    core = [entry for entry in needed if not _extras(entry)]
    lacking = [entry for entry in core if _applies(entry) and not _satisfied(entry)]
    for entry in lacking:
        yield Finding("packages", PROBLEM, _compared(entry), f"pip install '{_plain(entry)}'")
    optional: dict[str, list[Requirement]] = {}
    for entry in needed:
        for extra in _extras(entry) - {"dev"}:
            optional.setdefault(extra, []).append(entry)
    for extra, entries in list(optional.items()):
        if not all(_applies(entry, extra) for entry in entries):  # a package may not support this Python
            del optional[extra]
    old = {
        _compared(entry): entry
        for entries in optional.values()
        for entry in entries
        if _version(entry.name) is not None and not _satisfied(entry)
    }
    for found, entry in old.items():
        yield Finding("packages", NOTE, found, f"pip install '{_plain(entry)}'")
    here = sorted(extra for extra, entries in optional.items() if all(map(_satisfied, entries)))
    if not lacking:
        yield Finding("packages", OK, f"all required; installed extras: {', '.join(here) or 'none'}")


def _extras(entry: Requirement) -> set[str]:
    """The extras that a requirement belongs to."""
    words = str(entry.marker or "").replace('"', " ").replace("'", " ").replace(")", " ").split()
    return {words[at + 2] for at, word in enumerate(words) if word == "extra"}


def _applies(entry: Requirement, extra: str = "") -> bool:
    return entry.marker is None or entry.marker.evaluate({"extra": extra})


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _satisfied(entry: Requirement) -> bool:
    version = _version(entry.name)
    return version is not None and entry.specifier.contains(version, prereleases=True)


def _plain(entry: Requirement) -> str:
    return f"{entry.name}{entry.specifier}"


def _compared(entry: Requirement) -> str:
    version = _version(entry.name)
    return f"{_plain(entry)} is needed; {'it is missing' if version is None else f'{version} is installed'}"


def _runtime() -> Iterator[Finding]:
    wheels = [name for name in _WHEELS if _version(name) is not None]
    found = " and ".join(f"{name} {_version(name)}" for name in wheels)
    if len(wheels) > 1:
        extra = "gpu" if "onnxruntime-gpu" in wheels else "cpu"
        fix = f"pip uninstall -y {' '.join(wheels)}, then pip install 'robustfeat[{extra}]'"
        yield Finding("runtime", PROBLEM, f"{found} overwrite each other's files", fix)
    elif wheels:
        yield Finding("runtime", OK, f"{found}, and no other ONNX Runtime")
    elif (version := _version("openvino")) is not None:
        yield Finding("runtime", NOTE, f"openvino {version}, and no ONNX Runtime")
    else:
        fix = "pip install 'robustfeat[cpu]', or 'robustfeat[gpu]' on a machine with an NVIDIA GPU"
        yield Finding("runtime", PROBLEM, "no inference engine is installed", fix)


def _threads(options: RunOptions, cgroup: Path) -> Iterator[Finding]:
    granted, visible, quota = available_cpus(cgroup), visible_cpus(), cpu_quota(cgroup)
    limit = "no cgroup quota" if quota is None else f"a cgroup quota of {quota:g}"
    chosen = options.threads or granted
    found = f"{format_count(visible, 'processor')}, {limit}: {format_count(chosen, 'thread')} for the model"
    if options.threads and options.threads > granted:
        fix = f"pass `threads={granted}` or less, or leave it out"
        yield Finding("threads", PROBLEM, f"{found}, more than the {granted} available", fix)
    else:
        yield Finding("threads", OK, found)
    given = {name: os.environ[name] for name in _THREAD_VARIABLES if name in os.environ}
    for name, text in given.items():
        if text.isdecimal() and int(text) > granted:
            fix = f"export {name}={granted}"
            granted_text = format_count(granted, "processor is", "processors are")
            yield Finding("threads", PROBLEM, f"{name} is {text}, but {granted_text} available", fix)
    if visible > granted and not given:
        fix = " ".join(["export", *(f"{name}={granted}" for name in _THREAD_VARIABLES)])
        found = f"programs that count processors start {visible} threads, but the quota allows {quota:g} processors"
        yield Finding("threads", NOTE, found, fix)


def _gpus() -> list[str]:
    """Name, driver and memory of each working NVIDIA GPU."""
    if program := shutil.which("nvidia-smi"):
        query = [program, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        with suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
            return done.stdout.strip().splitlines() if done.returncode == 0 else []
    return []


def _gpu(options: RunOptions) -> Iterator[Finding]:
    gpus = _gpus()
    if not gpus:
        if options.requires_gpu:  # a note only: the engine's check shows whether it runs
            chosen = "`device=cuda`" if options.device == "cuda" else "`engine=tensorrt`"
            fix = f"install the NVIDIA driver (in a container: start it with its GPUs), or leave out {chosen}"
            yield Finding("gpu", NOTE, "CUDA is required, but no NVIDIA GPU answers (nvidia-smi)", fix)
        else:
            yield Finding("gpu", OK, "no NVIDIA GPU; everything runs on the processor")
        return
    found = "; ".join(gpus)
    if _version("onnxruntime-gpu") is None:
        fix = "pip uninstall -y onnxruntime, then pip install 'robustfeat[gpu]'"
        yield Finding("gpu", NOTE, f"{found}; onnxruntime-gpu, which would use it, is not installed", fix)
    else:
        yield Finding("gpu", OK, found)


def _model(model: str, options: RunOptions) -> Iterator[Finding]:
    from robustfeat.hub.catalog import resolve_model

    folder = resolve_model(model, revision=options.revision, config_hash=options.config_hash)
    folder.verify()
    megabytes = folder.size_bytes() / 1e6
    files = format_count(len(folder.config.files), "file")
    yield Finding("model", OK, f"{folder.config.name}: {files} of {megabytes:.0f} MB, hashes verified")


def _engines(model: str, options: RunOptions) -> Iterator[Finding]:
    """Runs the chosen engine, then the other one, each in a process. `robustfeat verify` runs all combinations."""
    first, way, device = _try_engine(model, options, PROBLEM)
    yield first
    if device == "cpu" and options.device == "auto" and options.may_use_gpu and _gpus():
        fix = "run again with `device=cuda` to see why; docs/embedding.md lists its requirements"
        yield Finding("engine", NOTE, "it runs on the processor although there is a GPU", fix)
    for engine, extra in _ENGINES.items():
        if engine in {way, options.engine}:
            continue
        if importlib.util.find_spec(engine):
            other = replace(options, engine=engine, precision="fp32", device="cpu")
            yield _try_engine(model, other, NOTE)[0]
        else:
            yield Finding("engine", NOTE, f"{engine} is not installed", f"pip install 'robustfeat[{extra}]' to use it")


def _try_engine(model: str, options: RunOptions, status: str) -> tuple[Finding, str | None, str | None]:
    """The finding, with `status` if the engine fails, and the engine and the device that ran."""
    label = f"{options.engine} {options.precision}"
    try:
        limit_s = BUILD_LIMIT_S if options.engine == "tensorrt" else TRIAL_S
        ran = Trial(try_engine, model, json.dumps(asdict(options)), limit_s=limit_s).result()
    except RobustFeatError as exc:
        fix = exc.fix or "pip install --force-reinstall the engine's package"
        return replace(_failed("engine", status, exc, f"{label}: "), fix=fix), None, None
    found = (
        f"{ran['engine']} {ran['version']} {options.precision} on {ran['device']}, {ran['threads']} threads: "
        f"golden images {'through' if ran['is_reference'] else 'of'} {ran['model']} "
        f"at {ran['images_per_s']:,.0f} images/s"
    )
    if not ran["is_reference"]:  # else the folder has no golden features to compare with
        found += f", cosine {ran['cosine']:.5f}"
    if not ran["short"]:
        return Finding("engine", OK, found), ran["engine"], ran["device"]
    fix = "use another precision or engine; this one gives wrong features here"
    return Finding("engine", PROBLEM, found, fix), ran["engine"], ran["device"]


def _torch(trial: Trial | None) -> Iterator[Finding]:
    if trial is None:
        fix = "pip install 'robustfeat[train]' for robustfeat train, evaluate, paper, export and import timm:NAME"
        yield Finding("torch", OK, "not installed, and not needed to embed or serve", fix)
        return
    try:
        yield Finding("torch", OK, trial.result()["found"])
    except RobustFeatError as exc:
        if importlib.util.find_spec("torchvision") is None:
            yield Finding("torch", NOTE, "torch without torchvision", "pip install 'robustfeat[train]' to train models")
            return
        fix = "install torch and torchvision from one index: pip install --force-reinstall torch torchvision"
        yield Finding("torch", PROBLEM, f"cannot be imported ({exc})", fix)


def _torchserve() -> Iterator[Finding]:
    from robustfeat.serving.torchserve.java import find_java

    wanted = _version("torchserve") is not None
    for name in ("torch", "yaml"):  # TorchServe needs both without declaring them, and hangs without yaml
        if wanted and importlib.util.find_spec(name) is None:
            fix = "pip install 'robustfeat[torchserve]'"
            yield Finding("torchserve", PROBLEM, f"TorchServe is installed without {name}, which it needs", fix)
    try:
        java = find_java()
    except RobustFeatError as exc:
        yield _failed("torchserve", PROBLEM if wanted else NOTE, exc)
        return
    served = f"TorchServe {_version('torchserve')}" if wanted else "TorchServe is not installed"
    yield Finding("torchserve", OK, f"Java {java.version} at {java.path}; {served}")


def _hub() -> Iterator[Finding]:
    from robustfeat.hub.remote import HubAccess

    access = HubAccess()
    if access.offline:
        yield Finding("hub", NOTE, "HF_HUB_OFFLINE forbids requests; the cache is used", "unset HF_HUB_OFFLINE")
        return
    try:
        with access.explaining("the Hub"):
            access.reach()
    except UnreachableError as exc:
        yield _failed("hub", NOTE, exc)
        return
    yield Finding("hub", OK, f"{access.address} answers")


def _cache(model: str) -> Iterator[Finding]:
    from huggingface_hub import constants

    from robustfeat.hub.catalog import cached_models
    from robustfeat.hub.remote import NO_HOME, is_hub_name

    place = Path(constants.HF_HUB_CACHE)
    if place.parts[:1] == ("~",):
        status = PROBLEM if is_hub_name(model) else NOTE
        yield Finding("cache", status, NO_HOME, "set HF_HOME to a writable folder")
        return
    models = list(cached_models())
    size = sum(model.size_bytes or 0 for model in models) / 1e6
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    found = f"{place}: {len(models)} of robustfeat's models, {size:.0f} MB; {free / 1e9:.1f} GB free"
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as exc:
        fix = "set HF_HOME to your own folder, and unset HF_HUB_CACHE"
        status = PROBLEM if is_hub_name(model) else NOTE
        yield Finding("cache", status, f"{place}: cannot be written ({exc.strerror})", fix)
        return
    if free < _LITTLE_SPACE:
        yield Finding("cache", NOTE, found, "free space, or set HF_HOME to a larger disk")
    else:
        yield Finding("cache", OK, found)
