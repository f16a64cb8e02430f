"""Sets TensorRT's options in ONNX Runtime, loads its library, and keeps its engines.

TensorRT compiles a network for one GPU, which takes minutes. The result, an engine, is kept in a folder beside the
Hub's cache. An engine is code, so the folder must belong to this user, and nobody else may write to it.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from robustfeat.errors import EngineError
from robustfeat.files import FileLock
from robustfeat.progress import remark
from robustfeat.serving.engines.nvidia import Gpu

__all__ = [
    "MAX_BATCH",
    "cache_place",
    "engine_key",
    "kept_engines",
    "load_tensorrt",
    "tensorrt_options",
]

MAX_BATCH = 128
"""Images in an engine's largest batch, and in the batch that it is tuned for."""

MAX_CACHE_BYTES = 4 * 2**30

_INSTALL = "pip install 'robustfeat[tensorrt]' on a machine with an NVIDIA GPU, or pass `engine=onnxruntime`"


def tensorrt_options(folder: Path, precision: str, side: int) -> dict[str, str]:
    """Options of ONNX Runtime's TensorRT provider.

    Args:
        folder: folder of the engines.
        precision: fp32 or fp16.
        side: S. Batches are (1 to `MAX_BATCH`, 3, S, S).

    Source: https://onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html#configurations
    """
    least, most = (f"pixel_values:{count}x3x{side}x{side}" for count in (1, MAX_BATCH))
    return {
        "trt_fp16_enable": str(precision == "fp16"),
        "trt_layer_norm_fp32_fallback": "True",
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(folder),
        # With shapes, one engine is built at load time. Without, each new batch size builds one.
        "trt_profile_min_shapes": least,
        "trt_profile_opt_shapes": most,
        "trt_profile_max_shapes": most,
    }


def load_tensorrt(provider: Path) -> str:
    """Loads the TensorRT that ONNX Runtime was built for, and returns its version.

    Args:
        provider: ONNX Runtime's `libonnxruntime_providers_tensorrt.so`.

    Raises:
        EngineError: ONNX Runtime has no such provider, or TensorRT is not installed.
    """
    try:
        found = re.search(rb"libnvinfer\.so\.(\d+)", provider.read_bytes())
    except OSError as exc:
        raise EngineError("the installed ONNX Runtime has no TensorRT", fix=_INSTALL) from exc
    if found is None:
        raise EngineError(f"{provider}: needs an unknown version of TensorRT", fix=_INSTALL)
    major = found[1].decode()
    library = _load_library(f"libnvinfer.so.{major}")
    if library is None or _load_library(f"libnvonnxparser.so.{major}") is None:
        raise EngineError(f"TensorRT {major} is not installed", fix=_INSTALL)
    number = int(library.getInferLibVersion())
    return f"{number // 10_000}.{number // 100 % 100}.{number % 100}"


def _load_library(name: str) -> Any:
    """Loads a library of TensorRT from the system or the wheel `tensorrt_libs`. ONNX Runtime then finds it loaded."""
    wheel = importlib.util.find_spec("tensorrt_libs")
    places = (wheel and wheel.submodule_search_locations) or []
    for file in (name, *(str(Path(place, name)) for place in places)):
        with suppress(OSError):
            return ctypes.CDLL(file, ctypes.RTLD_GLOBAL)
    return None


def engine_key(content: bytes, gpu: Gpu, versions: tuple[str, ...], precision: str, side: int) -> str:
    """The name of a network's engine: 32 hex digits of all that it depends on.

    Args:
        content: the network.
        gpu: the GPU that runs it.
        versions: versions of the libraries that build it.
    """
    parts = [hashlib.sha256(content).hexdigest(), gpu.name, gpu.capability, *versions, precision, side, MAX_BATCH]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def cache_place() -> Path:
    """The folder of all engines, beside the Hub's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).absolute().with_name("robustfeat-tensorrt")


@contextmanager
def kept_engines(place: Path, key: str, *, max_bytes: int = MAX_CACHE_BYTES) -> Iterator[Path]:
    """Yields the folder for the engines of one network. One process at a time uses it, and others wait.

    When the block ends, the least recently used engines are removed until all engines together take at most
    `max_bytes`.

    Raises:
        EngineError: the folder cannot be created, or others may write to it.
    """
    folder = place / key
    lock = FileLock(folder)
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_private(place)
        _take(lock, folder)
        os.utime(folder)
    except OSError as exc:
        raise EngineError(
            f"{folder}: cannot keep engines of TensorRT ({exc.strerror or exc})",
            fix="set HF_HOME to a writable folder, or pass `engine=onnxruntime`",
        ) from exc
    try:
        yield folder
    finally:
        lock.release()
        _prune(place, folder, max_bytes)


def _take(lock: FileLock, folder: Path) -> None:
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        with suppress(FileNotFoundError):  # somebody removed it in the meantime
            lock.take(on_wait=lambda: remark(f"waiting for another process to build an engine in {folder}"))
            return


def _require_private(place: Path) -> None:
    status = place.stat()
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise EngineError(
            f"{place}: others may write to it, and an engine is code", fix=f"remove it, or chmod go-w {place}"
        )


def _prune(place: Path, used: Path, max_bytes: int) -> None:
    with suppress(OSError):
        folders = sorted((entry for entry in place.iterdir() if entry.is_dir()), key=lambda one: one.stat().st_mtime)
        sizes = {one: sum(file.stat().st_size for file in one.rglob("*") if file.is_file()) for one in folders}
        total = sum(sizes.values())
        for folder in folders:
            if total <= max_bytes:
                return
            lock = FileLock(folder)
            if folder != used and lock.take():
                shutil.rmtree(folder, ignore_errors=True)
                lock.release()
                total -= sizes[folder]
