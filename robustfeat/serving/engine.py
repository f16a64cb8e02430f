"""The inference engines, ONNX Runtime and OpenVINO: prepared input in, features out."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from robustfeat.errors import EngineError, ModelFolderError, NotFiniteError, first_line
from robustfeat.serving.options import RunOptions

__all__ = [
    "HASH_KEY",
    "Engine",
    "OnnxRuntimeEngine",
    "OpenVINOEngine",
    "open_engine",
]

HASH_KEY = "robustfeat.preprocessing_hash"
"""Where an ONNX file's metadata keeps the hash of the preprocessing that it was exported for."""

_REINSTALL = "uninstall all that are named onnxruntime, and pip install 'robustfeat[cpu]' or 'robustfeat[gpu]' again"


class Engine(Protocol):
    """A network that is ready to run. `run` may be called from `streams` threads at once.

    Attributes:
        name: as in `options.ENGINES`.
        precision: as in `options.PRECISIONS`.
        version: of the library.
        device: cpu or cuda, what it runs on.
        streams: batches that it runs side by side, each on `threads // streams` processors.
        threads: processors that it uses.
        input_shape, output_shape: of `pixel_values` and `features`; a free dimension is its name or None.
        preprocessing_hash: from the file's metadata; None where it holds none.
    """

    name: str
    precision: str
    version: str
    device: str
    threads: int
    streams: int
    input_shape: list[int | str | None]
    output_shape: list[int | str | None]
    preprocessing_hash: str | None

    def run(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        """(N, 3, S, S) float32 to (N, D) float32, all finite.

        Raises:
            EngineError: the network fails, or gives something else.
        """
        ...


def open_engine(file: Path, content: bytes, options: RunOptions) -> Engine:
    """An engine on one ONNX file.

    Args:
        file: what messages call it.
        content: of the file, its weights included; input `pixel_values` (N, 3, S, S) float32, output `features`
            (N, D) float32.
        options: bf16 is computed from the fp32 file; the other precisions are what the file holds.

    Raises:
        EngineError: the engine is missing or cannot run as asked.
        ModelFolderError: it cannot read the file.
    """
    return _CLASSES[options.choose_engine()](file, content, options)


class OnnxRuntimeEngine:
    """An `Engine` that is a session of ONNX Runtime."""

    name = "onnxruntime"

    def __init__(self, file: Path, content: bytes, options: RunOptions) -> None:
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
            raise EngineError(
                "ONNX Runtime is installed in part, as when one of two of its wheels was removed", fix=_REINSTALL
            )
        self.version: str = onnxruntime.__version__
        self.precision = options.precision
        self.threads, self.streams = options.thread_count, options.stream_count
        settings = onnxruntime.SessionOptions()
        # With one thread a stream, run() computes on the thread that calls it, and none waits for another.
        settings.intra_op_num_threads = max(1, self.threads // self.streams)
        settings.log_severity_level = 3
        settings.add_session_config_entry("session.load_model_format", "ONNX")
        providers = ["CPUExecutionProvider"]
        if options.may_use_gpu and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            onnxruntime.preload_dlls()
            providers.insert(0, "CUDAExecutionProvider")
        try:
            self._session: Any = onnxruntime.InferenceSession(content, settings, providers=providers)
        except Exception as exc:  # ONNX Runtime's exceptions share no base class of their own
            raise ModelFolderError(f"{file}: ONNX Runtime cannot load it ({first_line(exc)})") from exc
        # The GPU build falls back to the CPU silently; only the session knows.
        self.device = "cuda" if "CUDAExecutionProvider" in self._session.get_providers() else "cpu"
        if options.device == "cuda" and self.device != "cuda":
            raise EngineError(
                "ONNX Runtime runs on the CPU here",
                argument="device",
                value="cuda",
                fix="install 'robustfeat[gpu]' without onnxruntime and check the NVIDIA driver, or pass `device=cpu`",
            )
        if self.device == "cuda":
            self.streams = min(self.streams, 2)  # one computes while the other's batch is prepared
        inputs = {value.name: value for value in self._session.get_inputs()}
        outputs = {value.name: value for value in self._session.get_outputs()}
        _check_names(file, inputs, outputs)
        taken, given = inputs["pixel_values"], outputs["features"]
        _check_types(file, taken.type, given.type, "tensor(float)")
        self.input_shape: list[int | str | None] = list(taken.shape)
        self.output_shape: list[int | str | None] = list(given.shape)
        self.preprocessing_hash: str | None = self._session.get_modelmeta().custom_metadata_map.get(HASH_KEY)

    def run(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        """(N, 3, S, S) float32 to (N, D) float32."""
        # Bound to the device, so that a GPU makes one copy in and one copy out.
        binding = self._session.io_binding()
        binding.bind_cpu_input("pixel_values", pixel_values)
        binding.bind_output("features", self.device)
        with _explaining(self.name):
            self._session.run_with_iobinding(binding)
            features = binding.copy_outputs_to_cpu()[0]
        return _checked(features, pixel_values, self.output_shape, self.precision)


class OpenVINOEngine:
    """An `Engine` that OpenVINO compiled for this processor."""

    name = "openvino"
    device = "cpu"

    def __init__(self, file: Path, content: bytes, options: RunOptions) -> None:
        # Importing openvino reports to its makers unless its telemetry cannot be imported.
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
        try:
            import openvino
        except ImportError as exc:
            found = "is not installed" if exc.name == "openvino" else f"cannot be imported ({first_line(exc)})"
            raise EngineError(f"OpenVINO {found}", fix="pip install --upgrade 'robustfeat[openvino]'") from exc
        self.version: str = openvino.__version__
        self.precision = options.precision
        self.threads, self.streams = options.thread_count, options.stream_count
        core = openvino.Core()
        half = options.precision if options.precision in {"bf16", "fp16"} else None
        if half and half.upper() not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise EngineError(
                f"this processor has no {half} instructions", fix="pass `precision=fp32` or `precision=int8`"
            )
        settings = {
            # Without it OpenVINO takes bf16 by itself where the processor has it.
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
        inputs = {value.any_name: value for value in model.inputs}
        outputs = {value.any_name: value for value in model.outputs}
        _check_names(file, inputs, outputs)
        taken, given = inputs["pixel_values"], outputs["features"]
        _check_types(file, taken.element_type.get_type_name(), given.element_type.get_type_name(), "f32")
        self.input_shape, self.output_shape = _shape(taken.partial_shape), _shape(given.partial_shape)
        place = ["framework", HASH_KEY]
        self.preprocessing_hash = model.get_rt_info(place).astype(str) if model.has_rt_info(place) else None
        self._requests: deque[Any] = deque()

    def run(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        """(N, 3, S, S) float32 to (N, D) float32."""
        try:
            request = self._requests.pop()
        except IndexError:  # as many as run at once
            request = self._compiled.create_infer_request()
        with _explaining(self.name):
            # The output is copied: the request keeps its own for the next batch.
            features = request.infer({"pixel_values": pixel_values}, share_inputs=True)["features"]
        self._requests.append(request)
        return _checked(features, pixel_values, self.output_shape, self.precision)


_CLASSES: dict[str, type[OnnxRuntimeEngine] | type[OpenVINOEngine]] = {
    engine.name: engine for engine in (OnnxRuntimeEngine, OpenVINOEngine)
}


def _shape(shape: Any) -> list[int | str | None]:
    return [dimension.get_length() if dimension.is_static else None for dimension in shape]


@contextmanager
def _explaining(engine: str) -> Iterator[None]:
    """What an engine raises while it runs a network shares no class with anything."""
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
    expected = (len(pixel_values), shape[-1])
    if features.dtype != np.float32 or features.shape != expected:
        raise EngineError(
            f"the model gives features of shape {features.shape} and type {features.dtype}, not {expected} and float32",
            fix="export the model again",
        )
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        raise NotFiniteError(
            f"the model gives features that are not finite for {np.count_nonzero(~finite)} of {len(features)} images",
            fix="numbers in it exceed the range of fp16: pass `precision=fp32`"
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


def _check_names(file: Path, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
    if "pixel_values" not in inputs or "features" not in outputs:
        raise ModelFolderError(
            f"{file}: needs an input pixel_values and an output features; it has {', '.join([*inputs, *outputs])}"
        )
