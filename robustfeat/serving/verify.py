"""Checks a model's features against its golden features, and measures its speed.

A transformers folder has no golden images. Its combinations of engine, precision and device are compared with the
first one, ONNX Runtime in fp32 if installed, on the built-in model's images.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from robustfeat.errors import EngineError, ModelFolderError
from robustfeat.hub.catalog import sample_images
from robustfeat.hub.folder import ModelFolder
from robustfeat.serving.engines.nvidia import find_gpu
from robustfeat.serving.engines.options import ENGINES, PRECISIONS, RunOptions

__all__ = [
    "MIN_COSINE",
    "Check",
    "check_golden",
    "check_ways",
    "compare",
    "cosine",
    "golden_answers",
    "ways_on_gpu",
    "ways_to_run",
]

MIN_COSINE = {"fp32": 0.9999, "fp16": 0.999, "bf16": 0.99, "int8": 0.99}
"""Smallest accepted cosine to PyTorch's features per golden image, by precision. int8 saturates on some processors."""

_MIN_COSINE_SCALED = 0.99
_MEASURE_S = 0.15


class GoldenSubject(Protocol):
    """The subject of a check, a `FeatureExtractor`."""

    folder: ModelFolder
    options: RunOptions

    @property
    def batch_size(self) -> int:
        """Images per batch."""

    def prepare(self, image: Any) -> NDArray[np.uint8]:
        """Prepares an image's (S, S, 3) uint8 square."""

    def embed_prepared(self, squares: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embeds (n, S, S, 3) uint8 to (n, D) float32."""


@dataclass(frozen=True)
class Check:
    """The result for one engine, precision and device.

    Attributes:
        engine, precision, device: the combination.
        cosine: the smallest cosine over the golden images; None if it did not run.
        needed: the smallest accepted cosine.
        reason: why it did not run.
        images_per_s: images per second of the network, one batch at a time; None if not measured.
        is_reference: whether the other combinations are compared with this one, which has no reference itself.
    """

    engine: str
    precision: str
    cosine: float | None
    needed: float
    reason: str | None = None
    images_per_s: float | None = None
    device: str = "cpu"
    is_reference: bool = False

    @property
    def short(self) -> bool:
        """Whether it ran with too small a cosine."""
        return self.cosine is not None and not self.cosine >= self.needed

    def __str__(self) -> str:
        way = f"{self.engine:12}{self.precision:6}" + ("cuda  " if self.device == "cuda" else "")
        if self.cosine is None:
            return f"{way}not run: {self.reason}"
        speed = "" if self.images_per_s is None else f"  {self.images_per_s:9,.1f} images/s"
        compared = "the reference    " if self.is_reference else f"cosine {self.cosine:.7f}"
        return f"{way}{compared}{speed}" + (f"  below {self.needed}" if self.short else "")


def cosine(a: NDArray[np.floating[Any]], b: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Row-wise cosine similarity of two (n, D) arrays: (n,) float64, NaN for zero rows."""
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
    """Checks computed features, (n, D), against PyTorch's, (n, D)."""
    needed = MIN_COSINE[precision]
    if decoding == "scaled":
        needed = min(needed, _MIN_COSINE_SCALED)
    return Check(engine, precision, float(cosine(features, expected).min()), needed, None, images_per_s, device)


def check_golden(subject: GoldenSubject, *, timed: bool = False) -> Check:
    """Runs the golden images through an open model; `timed` also measures the speed.

    A transformers folder has no golden features, so the check only shows that it runs.
    """
    return _check(subject, None, timed=timed)[0]


def golden_answers(subject: GoldenSubject) -> tuple[list[bytes], NDArray[np.floating[Any]]]:
    """Images, and the (n, D) features that a model must keep giving: golden ones, or else its features now."""
    images, expected = _golden(subject.folder)
    return images, _features(subject, images)[1] if expected is None else expected


def _golden(folder: ModelFolder) -> tuple[list[bytes], NDArray[np.float32] | None]:
    """Golden images and their features; a transformers folder has no features."""
    return folder.golden() if folder.is_own else (sample_images(), None)


def _features(subject: GoldenSubject, images: list[bytes]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The images' squares and features."""
    squares = np.stack([subject.prepare(image) for image in images])
    return squares, subject.embed_prepared(squares)


def _check(
    subject: GoldenSubject, reference: NDArray[np.float32] | None, *, timed: bool
) -> tuple[Check, NDArray[np.float32]]:
    """The check of a model and its features, against `reference` if the folder has no golden features."""
    images, expected = _golden(subject.folder)
    squares, features = _features(subject, images)
    expected, options, speed = reference if expected is None else expected, subject.options, None
    if timed:
        batch = np.resize(squares, (subject.batch_size, *squares.shape[1:]))
        subject.embed_prepared(batch)
        began, count = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - began) < _MEASURE_S or count < 2:
            subject.embed_prepared(batch)
            count += 1
        speed = round(count * len(batch) / elapsed, 1)
    check = compare(
        features,
        features if expected is None else expected,
        engine=options.engine,
        precision=options.precision,
        decoding=options.decoding,
        images_per_s=speed,
        device=options.device,
    )
    return replace(check, is_reference=expected is None), features


def ways_to_run(folder: ModelFolder, *converted: str) -> Iterator[RunOptions]:
    """All engines and precisions on the processor with an ONNX file, including those converted from fp32.

    A folder in robustfeat's layout needs an fp32 file; opening it reports a missing one.
    """
    stored = {*folder.precisions, *(["fp32"] if folder.is_own else [])}
    stored |= set(converted if "fp32" in stored else ())
    for engine in (name for name in ENGINES if name != "tensorrt"):
        for precision in PRECISIONS:
            options = RunOptions(precision, engine, "cpu")
            if (precision == "bf16" and engine != "openvino") or options.stored_precision not in stored:
                continue
            yield options


def ways_on_gpu() -> Iterator[RunOptions]:
    """All engines and precisions on the GPU, if one works."""
    if find_gpu() is not None:
        for engine in ("onnxruntime", "tensorrt"):
            for precision in ("fp32", "fp16"):
                yield RunOptions(precision, engine, "cuda")


def check_ways(
    open_way: Callable[[RunOptions], GoldenSubject], ways: Iterable[RunOptions], *, timed: bool = False
) -> Iterator[Check]:
    """Runs `check_golden` for each combination. A combination that cannot run gives its reason.

    Args:
        open_way: opens the model, such as `partial(FeatureExtractor.open, folder)`.
        ways: the combinations.
        timed: also measure the speed.

    Raises:
        ModelFolderError: a file was altered, or no engine can read it.
    """
    reference: NDArray[np.float32] | None = None
    for options in ways:
        try:
            check, features = _check(open_way(options), reference, timed=timed)
            if check.is_reference:
                reference = features
            yield check
        except ModelFolderError as exc:
            if reference is None:
                raise
            # The file itself is good, but an engine may lack an operator.
            yield Check(options.engine, options.precision, None, MIN_COSINE[options.precision], exc.what)
        except EngineError as exc:
            # The check chose the parameters itself, so a fix that names them would not help.
            reason = exc.problem.replace("`", "") if exc.fix_parameters else str(exc)
            needed = MIN_COSINE[options.precision]
            yield Check(options.engine, options.precision, None, needed, reason, device=options.device)
