"""Defines `RunOptions`, how to run a model."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace

from robustfeat.errors import EngineError
from robustfeat.hub.outputs import POOLED
from robustfeat.system import available_cpus

__all__ = [
    "AUTO",
    "BUILD_LIMIT_S",
    "DECODINGS",
    "DEVICES",
    "ENGINES",
    "MAX_PIXELS",
    "POOLINGS",
    "PRECISIONS",
    "RunOptions",
]

# The command line shows these choices, so importing them must not import NumPy.
AUTO = "auto"
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
ENGINES = ("onnxruntime", "openvino", "tensorrt")
DEVICES = ("cpu", "cuda")
DECODINGS = ("exact", "scaled")
POOLINGS = tuple(POOLED)
MAX_PIXELS = 100_000_000
BUILD_LIMIT_S = 1200
"""Time limit for the start of a model, in which TensorRT may build an engine."""

_CHOICES = {
    "precision": PRECISIONS,
    "engine": (AUTO, *ENGINES),
    "device": (AUTO, *DEVICES),
    "decoding": DECODINGS,
    "pooling": (AUTO, *POOLINGS),
}


@dataclass(frozen=True)
class RunOptions:
    """How to run a model, and which version of it.

    Attributes:
        precision: fp32; fp16, meant for GPUs; int8 if the folder has it; bf16 with OpenVINO on processors that support
            it.
        engine: auto (see `choose_engine`), onnxruntime, openvino or tensorrt.
        device: auto, cpu or cuda. auto uses a GPU if the session really runs on it.
        decoding: exact, or scaled, which decodes large JPEGs at a fraction of their size.
        threads: number of processors for the model; None for all that the cgroup allows.
        streams: number of parallel batches, each on `threads / streams` processors; None for 1.
        max_pixels: largest accepted image; larger ones are refused from their header.
        revision: a branch, tag or commit on the Hub; None for main.
        config_hash: the expected config hash, which pins all files; `robustfeat info` prints it.
        pooling: how the output of a transformers model becomes features: auto (by its model type), embeds, pooler, cls
            or mean (see `hub.outputs`).

    Raises:
        EngineError: a value is not among the choices.
    """

    precision: str = "fp32"
    engine: str = AUTO
    device: str = AUTO
    decoding: str = "exact"
    threads: int | None = None
    streams: int | None = None
    max_pixels: int = MAX_PIXELS
    revision: str | None = None
    config_hash: str | None = None
    pooling: str = AUTO

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                expected = f"{', '.join(choices[:-1])} or {choices[-1]}"
                raise EngineError(f"expected {expected}", argument=name, value=value)
        for name in ("threads", "streams", "max_pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise EngineError("expected 1 or more", argument=name, value=value, fix=f"leave `{name}` out")

    @property
    def thread_count(self) -> int:
        """Number of processors for the model on this machine."""
        return self.threads or available_cpus()

    @property
    def stream_count(self) -> int:
        """Number of parallel batches on this machine, at most one per processor."""
        return min(self.streams or 1, self.thread_count)

    @property
    def stored_precision(self) -> str:
        """The precision of the ONNX file. bf16 is computed from the fp32 file."""
        return "fp32" if self.precision == "bf16" else self.precision

    @property
    def requires_gpu(self) -> bool:
        """Whether the model must run on a GPU."""
        return self.device == "cuda" or self.engine == "tensorrt"

    @property
    def may_use_gpu(self) -> bool:
        """Whether to run the model on a GPU if there is one. int8 and bf16 are for processors."""
        return self.device != "cpu" and self.precision in {"fp32", "fp16"}

    def for_throughput(self) -> RunOptions:
        """Options with one stream per processor, for the most images per second at the highest latency."""
        return replace(self, threads=self.thread_count, streams=self.thread_count)

    def choose_engine(self) -> str:
        """The engine to use. `auto` is ONNX Runtime, or OpenVINO for bf16 or if ONNX Runtime is not installed.

        Raises:
            EngineError: the engine does not support the precision or the device on any machine.
        """
        name = self.engine
        if name == AUTO:
            alone = importlib.util.find_spec("openvino") and not importlib.util.find_spec("onnxruntime")
            name = "openvino" if self.precision == "bf16" or (alone and self.device != "cuda") else "onnxruntime"
        if name == "tensorrt" and self.device == "cpu":
            raise EngineError(
                "TensorRT does not run on the processor", fix="pass `engine=onnxruntime`, or `device=cuda`"
            )
        if self.requires_gpu and self.precision in {"bf16", "int8"}:
            raise EngineError(
                f"{self.precision} runs on processors, not on cuda",
                fix="pass `precision=fp16` or `precision=fp32`, or `engine=auto` and `device=cpu`",
            )
        if name == "onnxruntime" and self.precision == "bf16":
            raise EngineError(
                "ONNX Runtime has no bf16 on processors",
                fix="pass `engine=openvino`, or `precision=fp32` or `precision=int8`",
            )
        if name == "openvino" and self.device == "cuda":
            raise EngineError("OpenVINO does not run on cuda", fix="pass `engine=onnxruntime`, or `device=cpu`")
        return name
