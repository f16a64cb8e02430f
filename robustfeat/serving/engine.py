"""ONNX Runtime as the engine: prepared input in, features out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.errors import EngineError, ModelFolderError, first_line
from robustfeat.serving.cpus import available_cpus

__all__ = ["HASH_KEY", "OnnxRuntimeEngine"]

HASH_KEY = "robustfeat.preprocessing_hash"
"""Where an ONNX file's metadata keeps the hash of the preprocessing that it was exported for."""


class OnnxRuntimeEngine:
    """A session on one ONNX file.

    Args:
        file: input `pixel_values` (N, 3, S, S) float32, output `features` (N, D) float32.
        device: auto, cpu or cuda. Auto takes the GPU where the session really runs on it.
        threads: processors to use; by default what the cgroup grants.

    Attributes:
        name: `onnxruntime`.
        version: of ONNX Runtime.
        device: cpu or cuda, what the session runs on.
        input_shape, output_shape: of `pixel_values` and `features`; a free dimension is its name.
        preprocessing_hash: from the file's metadata; None where it holds none.

    Raises:
        EngineError: ONNX Runtime is missing, or cuda was asked for and the session fell back to the CPU.
        ModelFolderError: ONNX Runtime cannot read the file.
    """

    name = "onnxruntime"

    def __init__(self, file: Path, *, device: str = "auto", threads: int | None = None) -> None:
        if device not in {"auto", "cpu", "cuda"}:
            raise EngineError(f"device must be auto, cpu or cuda; got {device!r}")
        # Official builds send telemetry unless this is set before the library starts.
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        try:
            import onnxruntime
        except ImportError as exc:
            raise EngineError(
                "ONNX Runtime is not installed: pip install 'robustfeat[cpu]', "
                "or 'robustfeat[gpu]' on a machine with an NVIDIA GPU"
            ) from exc
        self.version: str = onnxruntime.__version__
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or available_cpus()
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
        inputs = {value.name: list(value.shape) for value in self._session.get_inputs()}
        outputs = {value.name: list(value.shape) for value in self._session.get_outputs()}
        if "pixel_values" not in inputs or "features" not in outputs:
            raise ModelFolderError(
                f"{file}: needs an input pixel_values and an output features; it has {', '.join([*inputs, *outputs])}"
            )
        self.input_shape: list[int | str] = inputs["pixel_values"]
        self.output_shape: list[int | str] = outputs["features"]
        self.preprocessing_hash: str | None = self._session.get_modelmeta().custom_metadata_map.get(HASH_KEY)

    def run(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        """(N, 3, S, S) float32 to (N, D) float32."""
        features: NDArray[np.float32] = self._session.run(["features"], {"pixel_values": pixel_values})[0]
        return features
