"""The golden check: whether a model gives here the features that its folder holds, and how fast it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from robustfeat.errors import EngineError
from robustfeat.hub.folder import ModelFolder
from robustfeat.serving.nvidia import find_gpu
from robustfeat.serving.options import ENGINES, PRECISIONS, RunOptions

__all__ = ["MIN_COSINE", "Check", "check_golden", "check_ways", "compare", "cosine", "ways_on_gpu", "ways_to_run"]

MIN_COSINE = {"fp32": 0.9999, "fp16": 0.999, "bf16": 0.99, "int8": 0.99}
"""What a precision must reach against PyTorch's features on every golden image; int8 saturates on some processors."""

_MIN_COSINE_SCALED = 0.99
_MEASURE_S = 0.15


class GoldenSubject(Protocol):
    """What is checked: a `FeatureExtractor`."""

    folder: ModelFolder
    options: RunOptions

    @property
    def batch_size(self) -> int:
        """Images in a batch."""

    def prepare(self, image: Any) -> NDArray[np.uint8]:
        """The (S, S, 3) uint8 square of an image."""

    def embed_prepared(self, squares: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(n, S, S, 3) uint8 to (n, D) float32."""


@dataclass(frozen=True)
class Check:
    """The result for one way to run a model.

    Attributes:
        engine, precision, device: the way.
        cosine: the smallest one over the golden images; None where it was not run.
        needed: what it must reach.
        reason: why it was not run.
        images_per_s: of the model alone, one batch at a time; None where it was not measured.
    """

    engine: str
    precision: str
    cosine: float | None
    needed: float
    reason: str | None = None
    images_per_s: float | None = None
    device: str = "cpu"

    @property
    def short(self) -> bool:
        """Whether it was run and falls short."""
        return self.cosine is not None and not self.cosine >= self.needed

    def __str__(self) -> str:
        way = f"{self.engine:12}{self.precision:6}" + ("cuda  " if self.device == "cuda" else "")
        if self.cosine is None:
            return f"{way}not run: {self.reason}"
        speed = "" if self.images_per_s is None else f"  {self.images_per_s:9,.1f} images/s"
        return f"{way}cosine {self.cosine:.7f}{speed}" + (f"  below {self.needed}" if self.short else "")


def cosine(a: NDArray[np.floating[Any]], b: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Row-wise cosine similarity of two (n, D) arrays: (n,) float64, NaN where a row is zero."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore"):
        similarity: NDArray[np.float64] = (x * y).sum(1) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1))
    return similarity


def compare(
    features: NDArray[np.floating[Any]],
    expected: NDArray[np.floating[Any]],
    *,
    engine: str,
    precision: str = "fp32",
    decoding: str = "exact",
    images_per_s: float | None = None,
    device: str = "cpu",
) -> Check:
    """The check of features that were computed, (n, D), against PyTorch's, (n, D)."""
    needed = MIN_COSINE[precision]
    if decoding == "scaled":
        needed = min(needed, _MIN_COSINE_SCALED)
    return Check(engine, precision, float(cosine(features, expected).min()), needed, None, images_per_s, device)


def check_golden(subject: GoldenSubject, *, timed: bool = False) -> Check:
    """Runs the golden images through an open model; `timed` measures its speed, too."""
    images, expected = subject.folder.golden()
    squares, options = np.stack([subject.prepare(image) for image in images]), subject.options
    features, speed = subject.embed_prepared(squares), None
    if timed:
        batch = np.resize(squares, (subject.batch_size, *squares.shape[1:]))
        subject.embed_prepared(batch)
        began, count = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - began) < _MEASURE_S or count < 2:
            subject.embed_prepared(batch)
            count += 1
        speed = round(count * len(batch) / elapsed, 1)
    return compare(
        features,
        expected,
        engine=options.engine,
        precision=options.precision,
        decoding=options.decoding,
        images_per_s=speed,
        device=options.device,
    )


def ways_to_run(precisions: Iterable[str]) -> Iterator[RunOptions]:
    """Every engine and precision on the processor, for a folder that has these precisions.

    A folder without an fp32 file is no model; opening it says so.
    """
    stored = {"fp32", *precisions}
    for engine in (name for name in ENGINES if name != "tensorrt"):
        for precision in PRECISIONS:
            options = RunOptions(precision, engine, "cpu")
            if (precision == "bf16" and engine != "openvino") or options.stored_precision not in stored:
                continue
            yield options


def ways_on_gpu() -> Iterator[RunOptions]:
    """Every engine and precision for the GPU, where one answers."""
    if find_gpu() is not None:
        for engine in ("onnxruntime", "tensorrt"):
            for precision in ("fp32", "fp16"):
                yield RunOptions(precision, engine, "cuda")


def check_ways(
    open_way: Callable[[RunOptions], GoldenSubject], ways: Iterable[RunOptions], *, timed: bool = False
) -> Iterator[Check]:
    """`check_golden` of one way after the other; a way that cannot run here says why.

    Args:
        open_way: opens the model, such as `partial(FeatureExtractor.open, folder)`.
        ways: how to run it.
        timed: measure the speed, too.

    Raises:
        ModelFolderError: a file was altered, or an engine cannot read it.
    """
    for options in ways:
        try:
            yield check_golden(open_way(options), timed=timed)
        except EngineError as exc:
            # The check chooses the parameters itself, so a fix that names some does not help its reader.
            reason = exc.problem.replace("`", "") if exc.fix_parameters else str(exc)
            needed = MIN_COSINE[options.precision]
            yield Check(options.engine, options.precision, None, needed, reason, device=options.device)
