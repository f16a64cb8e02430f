"""GPUs: what is said where there is none, memory for batches, TensorRT's options and its kept engines."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import importlib.util
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robustfeat import FeatureExtractor
from robustfeat.errors import EngineError
from robustfeat.hub.catalog import builtin_model
from robustfeat.serving.engines.nvidia import CUDA_OPTIONS, Gpu, InputBuffers, find_gpu
from robustfeat.serving.engines.options import RunOptions
from robustfeat.serving.engines.tensorrt import (
    MAX_BATCH,
    cache_place,
    engine_key,
    kept_engines,
    load_tensorrt,
    tensorrt_options,
)
from robustfeat.serving.verify import check_golden, check_ways, cosine, ways_on_gpu

# Read by ONNX Runtime 1.31 for GPUs, and documented at https://onnxruntime.ai/docs/execution-providers/
KNOWN_CUDA = {
    "device_id", "user_compute_stream", "gpu_mem_limit", "arena_extend_strategy", "cudnn_conv_algo_search",
    "cudnn_conv_use_max_workspace", "cudnn_conv1d_pad_to_nc1d", "do_copy_in_default_stream", "enable_cuda_graph",
    "enable_skip_layer_norm_strict_mode", "use_tf32", "prefer_nhwc", "fuse_conv_bias", "sdpa_kernel",
    "use_ep_level_unified_stream", "tunable_op_enable", "tunable_op_tuning_enable", "tunable_op_max_tuning_duration_ms",
}  # fmt: skip
KNOWN_TENSORRT = {
    "device_id", "user_compute_stream", "trt_max_workspace_size", "trt_max_partition_iterations",
    "trt_min_subgraph_size", "trt_fp16_enable", "trt_bf16_enable", "trt_int8_enable",
    "trt_int8_calibration_table_name", "trt_int8_use_native_calibration_table", "trt_dla_enable", "trt_dla_core",
    "trt_engine_cache_enable", "trt_engine_cache_path", "trt_engine_cache_prefix", "trt_dump_subgraphs",
    "trt_force_sequential_engine_build", "trt_context_memory_sharing_enable", "trt_layer_norm_fp32_fallback",
    "trt_timing_cache_enable", "trt_timing_cache_path", "trt_force_timing_cache", "trt_detailed_build_log",
    "trt_build_heuristics_enable", "trt_cuda_graph_enable", "trt_sparsity_enable", "trt_builder_optimization_level",
    "trt_auxiliary_streams", "trt_tactic_sources", "trt_extra_plugin_lib_paths", "trt_profile_min_shapes",
    "trt_profile_max_shapes", "trt_profile_opt_shapes", "trt_engine_hw_compatible", "trt_op_types_to_exclude",
}  # fmt: skip
H200 = Gpu("NVIDIA H200", "9.0")


def test_options_of_providers_are_known_to_onnx_runtime(tmp_path: Path) -> None:
    half, full = (tensorrt_options(tmp_path, precision, 224) for precision in ("fp16", "fp32"))
    assert set(half) <= KNOWN_TENSORRT
    assert set(CUDA_OPTIONS) <= KNOWN_CUDA
    assert CUDA_OPTIONS["use_tf32"] == "0"  # fp32 is fp32
    assert (half["trt_fp16_enable"], full["trt_fp16_enable"]) == ("True", "False")
    assert half["trt_engine_cache_path"] == str(tmp_path)
    assert half["trt_profile_min_shapes"] == "pixel_values:1x3x224x224"
    assert half["trt_profile_max_shapes"] == half["trt_profile_opt_shapes"] == f"pixel_values:{MAX_BATCH}x3x224x224"
    assert {type(value) for value in half.values()} == {str}


def test_an_engine_is_of_one_network_gpu_version_and_precision() -> None:
    keys = {
        engine_key(b"network", H200, ("10.16.1", "1.31.1"), "fp16", 224),
        engine_key(b"another", H200, ("10.16.1", "1.31.1"), "fp16", 224),
        engine_key(b"network", Gpu("NVIDIA L4", "8.9"), ("10.16.1", "1.31.1"), "fp16", 224),
        engine_key(b"network", H200, ("10.16.2", "1.31.1"), "fp16", 224),
        engine_key(b"network", H200, ("10.16.1", "1.31.2"), "fp16", 224),
        engine_key(b"network", H200, ("10.16.1", "1.31.1"), "fp32", 224),
        engine_key(b"network", H200, ("10.16.1", "1.31.1"), "fp16", 256),
    }
    assert len(keys) == 7
    assert engine_key(b"network", H200, ("10.16.1", "1.31.1"), "fp16", 224) in keys


def test_engines_lie_beside_the_hubs_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/data/hf/hub")
    assert cache_place() == Path("/data/hf/robustfeat-tensorrt")


def keep(place: Path, key: str, size: int, **limit: int) -> None:
    with kept_engines(place, key, **limit) as folder:
        (folder / "one.engine").write_bytes(bytes(size))


def test_engines_used_longest_ago_are_removed(tmp_path: Path) -> None:
    place = tmp_path / "engines"
    for age, key in enumerate(("newest", "middle", "oldest")):
        keep(place, key, 100)
        os.utime(place / key, (1e9 - age, 1e9 - age))
    keep(place, "oldest", 100, max_bytes=250)  # used now
    assert {entry.name for entry in place.iterdir()} == {"oldest", "newest"}
    keep(place, "large", 900, max_bytes=250)
    assert {entry.name for entry in place.iterdir()} == {"large"}  # what is in use stays, whatever its size


def test_an_engine_that_another_process_uses_stays(tmp_path: Path) -> None:
    keep(tmp_path, "other", 100)
    descriptor = os.open(tmp_path / "other", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    keep(tmp_path, "own", 100, max_bytes=50)
    assert (tmp_path / "other" / "one.engine").exists()
    os.close(descriptor)


def test_an_engine_removed_while_a_process_waits_is_made_again(tmp_path: Path) -> None:
    inside = threading.Event()

    def remove() -> None:
        with kept_engines(tmp_path, "key") as folder:
            inside.set()
            time.sleep(0.3)
            folder.rmdir()

    thread = threading.Thread(target=remove)
    thread.start()
    assert inside.wait(10)
    keep(tmp_path, "key", 1)
    thread.join()
    assert (tmp_path / "key" / "one.engine").exists()


def test_one_process_builds_and_the_others_wait(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    order: list[str] = []
    inside = threading.Event()

    def build() -> None:
        with kept_engines(tmp_path, "key"):
            inside.set()
            time.sleep(0.3)
            order.append("built")

    thread = threading.Thread(target=build)
    thread.start()
    assert inside.wait(10)
    with kept_engines(tmp_path, "key"):
        order.append("read")
    thread.join()
    assert order == ["built", "read"]
    assert "waiting for another process to build an engine" in capfd.readouterr().err


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    place = tmp_path / "engines"
    place.mkdir()
    place.chmod(mode)
    with pytest.raises(EngineError, match="others may write to it, and an engine is code; remove it, or chmod"):
        keep(place, "key", 1)
    assert not list(place.iterdir())


def test_a_place_that_cannot_be_written_is_one_line() -> None:
    with pytest.raises(EngineError, match=r"/proc/none/key: cannot keep engines of TensorRT .* set HF_HOME"):
        keep(Path("/proc/none"), "key", 1)


def test_tensorrt_is_named_where_it_is_missing(tmp_path: Path) -> None:
    fix = r"pip install 'robustfeat\[tensorrt\]' on a machine with an NVIDIA GPU, or pass `engine=onnxruntime`"
    with pytest.raises(EngineError, match=f"the installed ONNX Runtime has no TensorRT; {fix}"):
        load_tensorrt(tmp_path / "libonnxruntime_providers_tensorrt.so")
    provider = tmp_path / "provider.so"
    provider.write_bytes(b"\0libc.so.6\0libnvinfer.so.77\0")
    with pytest.raises(EngineError, match=f"TensorRT 77 is not installed; {fix}"):
        load_tensorrt(provider)


@pytest.mark.skipif(find_gpu() is not None, reason="there is a GPU")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "tensorrt"}, r"TensorRT.*; (pip install|check the NVIDIA driver)"),
        ({"engine": "tensorrt", "device": "cpu"}, "TensorRT does not run on the processor; pass `engine=onnxruntime`"),
        ({"engine": "tensorrt", "precision": "int8"}, "int8 runs on processors, not on cuda; pass `precision=fp16`"),
        ({"device": "cuda"}, "ONNX Runtime runs on the CPU here, and no NVIDIA GPU answers; install"),
        ({"device": "cuda", "precision": "fp16"}, "ONNX Runtime runs on the CPU here, and no NVIDIA GPU answers"),
    ],
)
def test_what_needs_a_gpu_is_one_line_where_there_is_none(options: dict[str, str], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        FeatureExtractor.from_pretrained(**options)  # type: ignore[arg-type]


def test_int8_and_bf16_stay_on_the_processor() -> None:
    may = {precision: RunOptions(precision).may_use_gpu for precision in ("fp32", "fp16", "bf16", "int8")}
    assert may == {"fp32": True, "fp16": True, "bf16": False, "int8": False}
    assert RunOptions("int8").choose_engine() == "onnxruntime"


class OrdinaryMemory:
    """The three functions of the CUDA runtime that are called, with memory of the C library."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        self.held = 0

    def cudaHostAlloc(self, place: Any, size: ctypes.c_size_t, flags: ctypes.c_uint) -> int:  # noqa: N802
        self.held += 1
        return int(self._library.posix_memalign(place, ctypes.c_size_t(4096), size))

    def cudaFreeHost(self, place: ctypes.c_void_p) -> int:  # noqa: N802
        self.held -= 1
        self._library.free(place)
        return 0


def fill_batches(runtime: OrdinaryMemory) -> None:
    buffers = InputBuffers(runtime)
    first = buffers.array((4, 3, 8, 8))
    first[:] = 7
    smaller = buffers.array((2, 3, 8, 8))
    assert smaller.shape == (2, 3, 8, 8)
    assert smaller.flags.c_contiguous
    assert smaller.dtype == np.float32
    assert (smaller == 7).all()  # the same memory
    others: list[Any] = []
    thread = threading.Thread(target=lambda: others.append(buffers.array((4, 3, 8, 8))))
    thread.start()
    thread.join()
    others[0][:] = 1
    assert (first == 7).all()
    assert runtime.held == 2
    larger = buffers.array((8, 3, 8, 8))
    larger[:] = 2
    assert (first == 7).all()
    assert runtime.held == 3  # the first is still in use


def test_a_thread_fills_the_same_memory_again_and_it_is_freed() -> None:
    runtime = OrdinaryMemory()
    fill_batches(runtime)
    gc.collect()
    assert runtime.held == 0


@pytest.mark.skipif(find_gpu() is not None, reason="there is a GPU")
def test_a_cuda_runtime_without_a_gpu_gives_ordinary_memory() -> None:
    package = importlib.util.find_spec("nvidia")
    places = package.submodule_search_locations if package and package.submodule_search_locations else []
    libraries = [file for place in places for file in Path(place).glob("*/lib/libcudart.so.*")]
    if not libraries:
        pytest.skip("no CUDA runtime is installed")
    array = InputBuffers(ctypes.CDLL(str(libraries[0]))).array((2, 3, 4, 4))
    array[:] = 1
    assert array.sum() == 96
    assert InputBuffers(None).array((0, 3, 4, 4)).shape == (0, 3, 4, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_golden_images_give_pytorchs_features_on_a_gpu(engine: str, precision: str, example_files: list[Path]) -> None:
    extractor = FeatureExtractor.from_pretrained(engine=engine, precision=precision, device="cuda", streams=2)
    assert (extractor.engine.name, extractor.engine.device, extractor.engine.streams) == (engine, "cuda", 2)
    check = check_golden(extractor, timed=True)
    assert not check.short, check
    exact = FeatureExtractor.from_pretrained(device="cpu").embed(example_files)
    assert cosine(exact, extractor.embed(example_files)).min() >= (0.99999 if precision == "fp32" else 0.999)


@pytest.mark.gpu
def test_fp32_on_a_gpu_is_not_tf32(example_files: list[Path]) -> None:
    exact = FeatureExtractor.from_pretrained(device="cpu").embed(example_files)
    on_gpu = FeatureExtractor.from_pretrained(device="cuda").embed(example_files)
    assert np.abs(exact - on_gpu).max() <= 1e-4 * np.abs(exact).max()


@pytest.mark.gpu
def test_batches_of_two_streams_do_not_mix(example_files: list[Path]) -> None:
    extractor = FeatureExtractor.from_pretrained(device="cuda", precision="fp16", streams=2)
    squares = np.stack([extractor.prepare(file) for file in example_files])
    expected = [extractor.embed_prepared(squares[at : at + 8]) for at in range(0, len(squares) - 7, 8)]
    failures: list[int] = []

    def repeat(turn: int) -> None:
        for number in range(50):
            at = (turn + number) % len(expected)
            if not np.array_equal(extractor.embed_prepared(squares[8 * at : 8 * at + 8]), expected[at]):
                failures.append(at)

    threads = [threading.Thread(target=repeat, args=(turn,)) for turn in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.gpu
def test_a_batch_beyond_an_engines_largest_is_parted(example_files: list[Path]) -> None:
    extractor = FeatureExtractor.from_pretrained(engine="tensorrt", precision="fp16")
    squares = np.stack([extractor.prepare(file) for file in example_files])
    many = np.resize(squares, (2 * MAX_BATCH + 5, *squares.shape[1:]))
    features = extractor.embed_prepared(many)
    assert len(features) == len(many)
    assert cosine(features[: len(squares)], extractor.embed_prepared(squares)).min() > 0.9999


@pytest.mark.gpu
def test_an_engine_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    first = FeatureExtractor.from_pretrained(engine="tensorrt", precision="fp16")
    assert "TensorRT built the engine in" in capfd.readouterr().err
    assert list((tmp_path / "robustfeat-tensorrt").rglob("*.engine"))
    second = FeatureExtractor.from_pretrained(engine="tensorrt", precision="fp16")
    assert "TensorRT builds" not in capfd.readouterr().err
    squares = np.zeros((4, 64, 64, 3), np.uint8)
    assert np.array_equal(first.embed_prepared(squares), second.embed_prepared(squares))


@pytest.mark.gpu
def test_verify_tries_the_gpu() -> None:
    checks = list(check_ways(lambda options: FeatureExtractor.open(builtin_model(), options), ways_on_gpu()))
    assert [(check.engine, check.precision, check.device) for check in checks] == [
        ("onnxruntime", "fp32", "cuda"),
        ("onnxruntime", "fp16", "cuda"),
        ("tensorrt", "fp32", "cuda"),
        ("tensorrt", "fp16", "cuda"),
    ]
    assert not any(check.short for check in checks)
