"""The inference engines, ONNX Runtime and OpenVINO: prepared input in, features out."""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from robustfeat.errors import EngineError, ModelFolderError, first_line
from robustfeat.system import available_cpus

__all__ = [
    "DEVICES",
    "ENGINES",
    "HASH_KEY",
    "PRECISIONS",
    "Engine",
    "OnnxRuntimeEngine",
    "OpenVINOEngine",
    "choose_engine",
    "open_engine",
]

HASH_KEY = "robustfeat.preprocessing_hash"
"""Where an ONNX file's metadata keeps the hash of the preprocessing that it was exported for."""

_AGAIN = "uninstall all that are named onnxruntime, and pip install 'robustfeat[cpu]' or 'robustfeat[gpu]' again"

PRECISIONS = ("fp32", "bf16", "int8")
DEVICES = ("auto", "cpu", "cuda")


class Engine(Protocol):
    """A network that is ready to run. `run` may be called from `streams` threads at once.

    Attributes:
        name: as in `ENGINES`.
        version: of the library.
        device: cpu or cuda, what it runs on.
        streams: batches that it runs side by side, each on `threads // streams` processors.
        threads: processors that it uses.
        input_shape, output_shape: of `pixel_values` and `features`; a free dimension is its name or None.
        preprocessing_hash: from the file's metadata; None where it holds none.
    """

    name: str
    version: str
    device: str
    threads: int
    streams: int
    input_shape: list[int | str | None]
    output_shape: list[int | str | None]
    preprocessing_hash: str | None

    def run(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        """(N, 3, S, S) float32 to (N, D) float32."""
        ...


def choose_engine(name: str, precision: str, device: str) -> str:
    """The engine for a precision and a device: the one that is named, or by `auto` the one that suits.

    Args:
        name: one of `ENGINES`, or auto: ONNX Runtime, but OpenVINO for bf16 or where it alone is installed.
        precision: one of `PRECISIONS`.
        device: one of `DEVICES`.

    Raises:
        EngineError: it cannot run so on any machine.
    """
    if name not in {"auto", *ENGINES}:
        raise EngineError(f"engine must be auto, {' or '.join(ENGINES)}; got {name!r}")
    if device not in DEVICES:
        raise EngineError(f"device must be {', '.join(DEVICES)}; got {device!r}")
    if name == "auto":
        alone = importlib.util.find_spec("openvino") and not importlib.util.find_spec("onnxruntime")
        name = "openvino" if precision == "bf16" or (alone and device != "cuda") else "onnxruntime"
    if name == "onnxruntime" and precision == "bf16":
        raise EngineError("ONNX Runtime has no bf16 on processors; pass --engine openvino, or fp32 or int8")
    if name == "openvino" and device == "cuda":
        raise EngineError("OpenVINO does not run on cuda; pass --engine onnxruntime, or device cpu")
    return name


def open_engine(
    name: str,
    file: Path,
    precision: str,
    *,
    device: str = "auto",
    threads: int | None = None,
    streams: int | None = None,
) -> Engine:
    """The engine of that name on one ONNX file.

    Args:
        name: see `choose_engine`.
        file: input `pixel_values` (N, 3, S, S) float32, output `features` (N, D) float32.
        precision: fp32, bf16 (computed from the fp32 file) or int8 (what the file holds).
        device: auto, cpu or cuda. Auto takes the GPU where the session really runs on it.
        threads: processors to use; by default what the cgroup grants.
        streams: batches side by side; 1, or `threads` for the best throughput.

    Raises:
        EngineError: the engine is missing or cannot run as asked.
        ModelFolderError: it cannot read the file.
    """
    name = choose_engine(name, precision, device)
    threads = threads or available_cpus()
    return ENGINES[name](file, precision, device=device, threads=threads, streams=min(streams or 1, threads))


class OnnxRuntimeEngine:
    """An `Engine` that is a session of ONNX Runtime."""

    name = "onnxruntime"

    def __init__(self, file: Path, precision: str, *, device: str, threads: int, streams: int) -> None:
        # Official builds send telemetry unless this is set before the library starts.
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        try:
            import onnxruntime
        except ImportError as exc:
            if exc.name != "onnxruntime":
                raise EngineError(f"ONNX Runtime cannot be imported ({first_line(exc)}); {_AGAIN}") from exc
            raise EngineError(
                "ONNX Runtime is not installed; pip install 'robustfeat[cpu]', "
                "or 'robustfeat[gpu]' on a machine with an NVIDIA GPU"
            ) from exc
        if not hasattr(onnxruntime, "InferenceSession"):
            raise EngineError(
                f"ONNX Runtime is installed in part, as when one of two of its wheels was removed; {_AGAIN}"
            )
        self.version: str = onnxruntime.__version__
        self.threads, self.streams = threads, streams
        options = onnxruntime.SessionOptions()
        # With one thread a stream, run() computes on the thread that calls it, and none waits for another.
        options.intra_op_num_threads = max(1, threads // streams)
        options.log_severity_level = 3
        providers = ["CPUExecutionProvider"]
        if device != "cpu" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            onnxruntime.preload_dlls()
            providers.insert(0, "CUDAExecutionProvider")
        try:
            self._session: Any = onnxruntime.InferenceSession(str(file), options, providers=providers)
        except Exception as exc:  # ONNX Runtime's exceptions share no base class of their own
            raise ModelFolderError(f"{file}: ONNX Runtime cannot load it ({first_line(exc)})") from exc
        # The GPU build falls back to the CPU silently; only the session knows.
        self.device = "cuda" if "CUDAExecutionProvider" in self._session.get_providers() else "cpu"
        if device == "cuda" and self.device != "cuda":
            raise EngineError(
                "device cuda: ONNX Runtime runs on the CPU here; install 'robustfeat[gpu]' without onnxruntime "
                "and check the NVIDIA driver, or use device cpu"
            )
        if self.device == "cuda":
            self.streams = min(streams, 2)  # one computes while the other's batch is prepared
        inputs = {value.name: list(value.shape) for value in self._session.get_inputs()}
        outputs = {value.name: list(value.shape) for value in self._session.get_outputs()}
        _check_names(file, inputs, outputs)
        self.input_shape: list[int | str | None] = inputs["pixel_values"]
        self.output_shape: list[int | str | None] = outputs["features"]
        self.preprocessing_hash: str | None = self._session.get_modelmeta().custom_metadata_map.get(HASH_KEY)

    def run(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        """(N, 3, S, S) float32 to (N, D) float32."""
        # Bound to the device, so that a GPU makes one copy in and one copy out.
        binding = self._session.io_binding()
        binding.bind_cpu_input("pixel_values", pixel_values)
        binding.bind_output("features", self.device)
        self._session.run_with_iobinding(binding)
        features: NDArray[np.float32] = binding.copy_outputs_to_cpu()[0]
        return features


class OpenVINOEngine:
    """An `Engine` that OpenVINO compiled for this processor."""

    name = "openvino"
    device = "cpu"

    def __init__(self, file: Path, precision: str, *, device: str, threads: int, streams: int) -> None:
        # Importing openvino reports to its makers unless its telemetry cannot be imported.
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
        try:
            import openvino
        except ImportError as exc:
            found = "is not installed" if exc.name == "openvino" else f"cannot be imported ({first_line(exc)})"
            raise EngineError(f"OpenVINO {found}; pip install --upgrade 'robustfeat[openvino]'") from exc
        self.version: str = openvino.__version__
        self.threads, self.streams = threads, streams
        core = openvino.Core()
        if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise EngineError("bf16: this processor has no bf16 instructions; use fp32 or int8")
        options = {
            # Without it OpenVINO takes bf16 by itself where the processor has it.
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": threads,
            # The decoders run on the same processors.
            "ENABLE_CPU_PINNING": False,
        }
        try:
            model = core.read_model(str(file))
            self._compiled: Any = core.compile_model(model, "CPU", options)
        except RuntimeError as exc:
            raise ModelFolderError(f"{file}: OpenVINO cannot load it ({first_line(exc)})") from exc
        inputs = {value.any_name: _shape(value.partial_shape) for value in model.inputs}
        outputs = {value.any_name: _shape(value.partial_shape) for value in model.outputs}
        _check_names(file, inputs, outputs)
        self.input_shape, self.output_shape = inputs["pixel_values"], outputs["features"]
        place = ["framework", HASH_KEY]
        self.preprocessing_hash = model.get_rt_info(place).astype(str) if model.has_rt_info(place) else None
        self._requests = threading.local()

    def run(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        """(N, 3, S, S) float32 to (N, D) float32."""
        if not hasattr(self._requests, "own"):
            self._requests.own = self._compiled.create_infer_request()
        # The output is copied: the request keeps its own for the next batch.
        features: NDArray[np.float32] = self._requests.own.infer({"pixel_values": pixel_values}, share_inputs=True)[
            "features"
        ]
        return features


ENGINES: dict[str, type[OnnxRuntimeEngine] | type[OpenVINOEngine]] = {
    engine.name: engine for engine in (OnnxRuntimeEngine, OpenVINOEngine)
}


def _shape(shape: Any) -> list[int | str | None]:
    return [dimension.get_length() if dimension.is_static else None for dimension in shape]


def _check_names(file: Path, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
    if "pixel_values" not in inputs or "features" not in outputs:
        raise ModelFolderError(
            f"{file}: needs an input pixel_values and an output features; it has {', '.join([*inputs, *outputs])}"
        )
