"""Runs networks with ONNX Runtime, OpenVINO or TensorRT."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from robustfeat.errors import EngineError, ModelFolderError, NotFiniteError, first_line
from robustfeat.hub.outputs import Outputs
from robustfeat.progress import remark
from robustfeat.serving.engines.nvidia import (
    CUDA,
    CUDA_OPTIONS,
    PROCESSOR,
    TENSORRT,
    InputBuffers,
    find_gpu,
    load_cuda_runtime,
)
from robustfeat.serving.engines.options import RunOptions
from robustfeat.serving.engines.pooling import Pooling, choose_pooling
from robustfeat.serving.engines.signal_stack import keep_signal_stack
from robustfeat.serving.engines.tensorrt import (
    MAX_BATCH,
    cache_place,
    engine_key,
    kept_engines,
    load_tensorrt,
    tensorrt_options,
)

__all__ = [
    "HASH_KEY",
    "Engine",
    "OnnxRuntimeEngine",
    "OpenVINOEngine",
    "TensorRTEngine",
    "open_engine",
    "open_on_processor",
]

HASH_KEY = "robustfeat.preprocessing_hash"
"""Key in an ONNX file's metadata for the hash of its preprocessing."""

_WARNINGS, _ERRORS, _FATAL = 2, 3, 4  # ONNX Runtime's severities
_LINE = 250
_REINSTALL = "uninstall all onnxruntime packages, then pip install 'robustfeat[cpu]' or 'robustfeat[gpu]' again"


class Engine(Protocol):
    """A network that is ready to run. Up to `streams` threads may call `run` at once.

    Attributes:
        name: one of `options.ENGINES`.
        precision: one of `options.PRECISIONS`.
        version: version of the library.
        device: the device that runs it, cpu or cuda.
        streams: number of parallel batches, each on `threads // streams` processors.
        threads: number of processors.
        pooling: which output becomes the features, and how.
        input_shape, output_shape: shapes of `pixel_values` and the features. A free dimension is its name or None.
        preprocessing_hash: hash in the file's metadata; None if it has none.
    """

    name: str
    precision: str
    version: str
    device: str
    threads: int
    streams: int
    pooling: Pooling
    input_shape: list[int | str | None]
    output_shape: list[int | str | None]
    preprocessing_hash: str | None

    def new_input(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """A float32 array for `run` with arbitrary content. The thread's next call may return the same memory."""
        ...

    def run(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Runs a batch, (N, 3, S, S) float32, to finite features, (N, D) float32.

        Raises:
            EngineError: the network fails or returns another shape, type or infinite values.
        """
        ...


def open_engine(
    file: Path,
    content: bytes,
    options: RunOptions,
    outputs: Outputs | None = None,
    image_size: int | None = None,
) -> Engine:
    """Opens an engine with one ONNX file.

    Args:
        file: the file's name in messages.
        content: the file's content with its weights. The input is `pixel_values` (N, 3, S, S) float32; the output is
            `features` (N, D) float32, or one of `outputs`.
        options: how to run it. bf16 is computed from the fp32 file; other precisions must match the file.
        outputs: the meaning of a transformers network's outputs.
        image_size: S, which the file may leave open. TensorRT needs it.

    Raises:
        EngineError: the engine is missing or cannot run as requested.
        ModelFolderError: the engine cannot read the file.
    """
    name = options.choose_engine()
    if name == TensorRTEngine.name:
        return TensorRTEngine(file, content, options, outputs, image_size)
    return _CLASSES[name](file, content, options, outputs)


class OnnxRuntimeEngine:
    """Runs a network with ONNX Runtime, on the processor or on a GPU."""

    name = "onnxruntime"

    def __init__(self, file: Path, content: bytes, options: RunOptions, outputs: Outputs | None = None) -> None:
        onnxruntime = _import_onnxruntime()
        self.version: str = onnxruntime.__version__
        self.precision = options.precision
        self.threads, self.streams = options.thread_count, options.stream_count
        # With one thread per stream, run() computes on the calling thread, so no thread waits for another.
        settings = _session_settings(onnxruntime, max(1, self.threads // self.streams))
        self._session: Any = self._open(onnxruntime, file, content, settings, options)
        # The GPU build falls back to the processor silently. Only the session knows its device.
        used = self._session.get_providers()
        self.device = "cuda" if CUDA in used else "cpu"
        if options.device == "cuda" and self.device != "cuda":
            raise EngineError(
                f"ONNX Runtime runs on the CPU here{'' if find_gpu() else ', and no NVIDIA GPU answers'}",
                argument="device",
                value="cuda",
                fix="install 'robustfeat[gpu]' without onnxruntime and check the NVIDIA driver, or pass `device=cpu`",
            )
        if self.device == "cuda":
            self.streams = min(self.streams, 2)  # one computes while the other prepares its batch
        self._buffers = InputBuffers(load_cuda_runtime() if self.device == "cuda" else None)
        taken = _only_input(file, {value.name: value for value in self._session.get_inputs()})
        given = {value.name: value for value in self._session.get_outputs()}
        shapes = {name: value.shape for name, value in given.items()}
        self.pooling = choose_pooling(options.pooling, outputs, shapes, file)
        _check_types(file, taken.type, given[self.pooling.output].type, "tensor(float)")
        self.input_shape: list[int | str | None] = list(taken.shape)
        self.output_shape = self.pooling.feature_shape(given[self.pooling.output].shape)
        self.preprocessing_hash: str | None = self._session.get_modelmeta().custom_metadata_map.get(HASH_KEY)

    def _open(self, onnxruntime: Any, file: Path, content: bytes, settings: Any, options: RunOptions) -> Any:
        if options.may_use_gpu and CUDA in onnxruntime.get_available_providers():
            try:
                return _open_session(onnxruntime, content, settings, [(CUDA, CUDA_OPTIONS)])
            except Exception as exc:  # ONNX Runtime's exceptions have no common base class
                if options.device == "cuda":
                    fix = "check the GPU and its driver (nvidia-smi), or pass `device=cpu`"
                    raise EngineError(f"{file}: CUDA cannot load it ({_end_of_line(exc)})", fix=fix) from exc
        try:
            return _open_session(onnxruntime, content, settings, [])
        except Exception as exc:
            problem = f"{file}: ONNX Runtime cannot load it ({first_line(exc)})"
            if options.precision == "fp16":
                raise EngineError(problem, fix="pass `precision=fp32`; some operators may lack fp16") from exc
            raise ModelFolderError(problem) from exc

    def new_input(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """A float32 array for `run`, for a GPU in memory that it reads at full speed."""
        return self._buffers.array(shape) if self.device == "cuda" else np.empty(shape, np.float32)

    def run(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Runs a batch; see `Engine.run`."""
        # Bind input and output to the device, so a GPU makes one copy each way.
        binding = self._session.io_binding()
        binding.bind_cpu_input("pixel_values", pixel_values)
        binding.bind_output(self.pooling.output, self.device)
        with _explaining(self.name):
            self._session.run_with_iobinding(binding)
            features = self.pooling(binding.copy_outputs_to_cpu()[0])
        return _checked(features, pixel_values, self.output_shape, self.precision)


class TensorRTEngine(OnnxRuntimeEngine):
    """Runs a network with an engine that TensorRT built for this GPU. CUDA runs nodes that TensorRT lacks."""

    name = "tensorrt"

    def __init__(
        self,
        file: Path,
        content: bytes,
        options: RunOptions,
        outputs: Outputs | None = None,
        image_size: int | None = None,
    ) -> None:
        if image_size is None:
            raise ValueError("TensorRT needs image_size to build an engine")
        self._side = image_size
        super().__init__(file, content, options, outputs)

    def _open(self, onnxruntime: Any, file: Path, content: bytes, settings: Any, options: RunOptions) -> Any:
        version = load_tensorrt(Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_tensorrt.so")
        gpu = find_gpu()
        if gpu is None:
            raise EngineError(
                "TensorRT needs an NVIDIA GPU, and none answers",
                argument="engine",
                value="tensorrt",
                fix="check the NVIDIA driver (nvidia-smi), or pass `engine=onnxruntime`",
            )
        self.version = f"{version} (ONNX Runtime {onnxruntime.__version__})"
        side = self._side
        key = engine_key(content, gpu, (version, onnxruntime.__version__), options.precision, side)
        with kept_engines(cache_place(), key) as folder:
            is_new, began = not any(folder.glob("*.engine")), time.monotonic()
            if is_new:
                remark(f"TensorRT builds an engine for {file.name} on {gpu.name}; this takes minutes, once")
            chosen = [(TENSORRT, tensorrt_options(folder, options.precision, side)), (CUDA, CUDA_OPTIONS)]
            fix = "pip install --upgrade tensorrt-cu13-libs, or pass `engine=onnxruntime`"
            try:
                session = _open_session(onnxruntime, content, settings, chosen)
            except Exception as exc:
                raise EngineError(f"{file}: TensorRT {version} cannot load it ({_end_of_line(exc)})", fix=fix) from exc
            if TENSORRT not in session.get_providers():
                raise EngineError(f"ONNX Runtime {onnxruntime.__version__} cannot start TensorRT {version}", fix=fix)
            with _explaining(self.name):  # the first run may still have to build the engine
                session.run(None, {"pixel_values": np.zeros((1, 3, side, side), np.float32)})
            if is_new:
                remark(f"TensorRT built the engine in {time.monotonic() - began:.0f} s and keeps it in {folder}")
        return session

    def run(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Runs a batch in pieces of at most `MAX_BATCH`, the engine's limit; see `Engine.run`."""
        starts = range(0, max(1, len(pixel_values)), MAX_BATCH)
        return np.concatenate([super(TensorRTEngine, self).run(pixel_values[at : at + MAX_BATCH]) for at in starts])


def _import_onnxruntime() -> Any:
    # Official builds send telemetry unless this is set before the library starts.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as exc:
        if exc.name != "onnxruntime":
            raise EngineError(f"ONNX Runtime cannot be imported ({first_line(exc)})", fix=_REINSTALL) from exc
        raise EngineError(
            "ONNX Runtime is not installed",
            fix="pip install 'robustfeat[cpu]', or 'robustfeat[gpu]' on a machine with an NVIDIA GPU",
        ) from exc
    if not hasattr(onnxruntime, "InferenceSession"):
        raise EngineError("ONNX Runtime is incomplete, as after the removal of one of two wheels", fix=_REINSTALL)
    return onnxruntime


def open_on_processor(file: Path, content: bytes, threads: int) -> Any:
    """Opens a session of ONNX Runtime on the processor, for a network other than the image network.

    Raises:
        EngineError: ONNX Runtime is missing.
        ModelFolderError: the engine cannot read the file.
    """
    onnxruntime = _import_onnxruntime()
    try:
        return _open_session(onnxruntime, content, _session_settings(onnxruntime, threads), [])
    except Exception as exc:  # ONNX Runtime's exceptions have no common base class
        raise ModelFolderError(f"{file}: ONNX Runtime cannot load it ({first_line(exc)})") from exc


def _session_settings(onnxruntime: Any, threads: int) -> Any:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = _ERRORS
    settings.add_session_config_entry("session.load_model_format", "ONNX")
    return settings


def _end_of_line(exc: BaseException) -> str:
    """The reason in a GPU provider's error, which starts with places in its source."""
    line = first_line(exc)
    return line if len(line) <= _LINE else f"...{line[-_LINE:]}"


def _open_session(
    onnxruntime: Any, content: bytes, settings: Any, gpu_providers: Sequence[tuple[str, dict[str, str]]]
) -> Any:
    """Opens a session on these providers and the processor. Only the session knows which of them work."""
    if gpu_providers:
        # ONNX Runtime prints missing libraries to stdout and logs each. Our errors say it in one line.
        with redirect_stdout(None):
            onnxruntime.preload_dlls()
        onnxruntime.set_default_logger_severity(_FATAL)
    try:
        # Without `enable_fallback=0`, a failing provider is reported on stdout and replaced.
        return onnxruntime.InferenceSession(content, settings, providers=[*gpu_providers, PROCESSOR], enable_fallback=0)
    finally:
        if gpu_providers:
            onnxruntime.set_default_logger_severity(_WARNINGS)


class OpenVINOEngine:
    """Runs a network that OpenVINO compiled for this processor."""

    name = "openvino"
    device = "cpu"

    def __init__(self, file: Path, content: bytes, options: RunOptions, outputs: Outputs | None = None) -> None:
        # OpenVINO sends telemetry at import unless its telemetry module cannot be imported.
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
        try:
            import openvino
        except ImportError as exc:
            if exc.name == "openvino":
                raise EngineError("OpenVINO is not installed", fix="pip install 'robustfeat[openvino]'") from exc
            said = f"OpenVINO cannot be imported ({first_line(exc)})"
            raise EngineError(said, fix="pip install --force-reinstall openvino") from exc
        self.version: str = openvino.__version__
        self.precision = options.precision
        self.threads, self.streams = options.thread_count, options.stream_count
        core = openvino.Core()
        with keep_signal_stack():  # this query loads the plugin for processors
            known = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        half = options.precision if options.precision in {"bf16", "fp16"} else None
        if half and half.upper() not in known:
            raise EngineError(
                f"this processor has no {half} instructions", fix="pass `precision=fp32` or `precision=int8`"
            )
        settings = {
            # Otherwise OpenVINO uses bf16 on processors that have it.
            "INFERENCE_PRECISION_HINT": {"bf16": "bf16", "fp16": "f16"}.get(options.precision, "f32"),
            "NUM_STREAMS": self.streams,
            "INFERENCE_NUM_THREADS": self.threads,
            # The decoders run on the same processors.
            "ENABLE_CPU_PINNING": False,
        }
        try:
            model = core.read_model(content, b"")
            self._compiled: Any = core.compile_model(model, "CPU", settings)
        except RuntimeError as exc:
            raise ModelFolderError(f"{file}: OpenVINO cannot load it ({first_line(exc)})") from exc
        taken = _only_input(file, {value.any_name: value for value in model.inputs})
        given = {value.any_name: value for value in model.outputs}
        shapes = {name: _shape(value.partial_shape) for name, value in given.items()}
        self.pooling = choose_pooling(options.pooling, outputs, shapes, file)
        out = given[self.pooling.output]
        _check_types(file, taken.element_type.get_type_name(), out.element_type.get_type_name(), "f32")
        self.input_shape = _shape(taken.partial_shape)
        self.output_shape = self.pooling.feature_shape(shapes[self.pooling.output])
        place = ["framework", HASH_KEY]
        self.preprocessing_hash = model.get_rt_info(place).astype(str) if model.has_rt_info(place) else None
        self._requests: deque[Any] = deque()

    def new_input(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """A float32 array for `run`."""
        return np.empty(shape, np.float32)

    def run(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Runs a batch; see `Engine.run`."""
        try:
            request = self._requests.pop()
        except IndexError:  # all requests are in use
            request = self._compiled.create_infer_request()
        with _explaining(self.name):
            # Copy the output, since the request reuses its memory for the next batch.
            found = request.infer({"pixel_values": pixel_values}, share_inputs=True)[self.pooling.output]
            features = self.pooling(found)
        self._requests.append(request)
        return _checked(features, pixel_values, self.output_shape, self.precision)


_CLASSES: dict[str, type[OnnxRuntimeEngine] | type[OpenVINOEngine]] = {
    engine.name: engine for engine in (OnnxRuntimeEngine, OpenVINOEngine)
}


def _shape(shape: Any) -> list[int | str | None]:
    if shape.rank.is_dynamic:
        return []
    return [dimension.get_length() if dimension.is_static else None for dimension in shape]


@contextmanager
def _explaining(engine: str) -> Iterator[None]:
    """Converts an engine's run-time errors, which have no common class."""
    try:
        yield
    except Exception as exc:
        raise EngineError(
            f"{engine} cannot run the model ({first_line(exc)})",
            fix="check the model with robustfeat verify, or choose another `engine`",
        ) from exc


def _checked(
    features: NDArray[Any], pixel_values: NDArray[np.float32], shape: list[int | str | None], precision: str
) -> NDArray[np.float32]:
    size = shape[-1] if isinstance(shape[-1], int) else features.shape[-1]  # the file may leave D open
    expected = (len(pixel_values), size)
    if features.dtype != np.float32 or features.shape != expected:
        raise EngineError(
            f"the model's features must be {expected} float32; got {features.shape} {features.dtype}",
            fix="export the model again",
        )
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        raise NotFiniteError(
            f"the model's features are not finite for {np.count_nonzero(~finite)} of {len(features)} images",
            fix="its values exceed the range of fp16: pass `precision=fp32`"
            if precision == "fp16"
            else "check the model with robustfeat verify; its weights may be damaged",
        )
    return features


def _check_types(file: Path, taken: str, given: str, expected: str) -> None:
    if not taken == given == expected:
        raise ModelFolderError(
            f"{file}: pixel_values and features must be float32 tensors; got {taken} and {given}",
            fix="export the model again",
        )


def _only_input(file: Path, inputs: dict[str, Any]) -> Any:
    """The input for images. Refuses a network with another input or without it."""
    if set(inputs) != {"pixel_values"}:
        raise ModelFolderError(
            f"{file}: must have pixel_values as its only input; it has {', '.join(inputs)}",
            fix="keep the image part of the network with robustfeat import" if "pixel_values" in inputs else None,
        )
    return inputs["pixel_values"]
