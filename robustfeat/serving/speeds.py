"""Whether another engine or precision that is installed would be faster here, by measuring it once."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from robustfeat.errors import RobustFeatError
from robustfeat.files import new_file
from robustfeat.serving.extractor import MIN_COSINE, FeatureExtractor, cosine
from robustfeat.serving.options import ENGINES, RunOptions

__all__ = ["Speed", "fastest_way", "measure_speeds"]

_MEASURE_S = 0.15
_WORTH_SAYING = 1.2


@dataclass(frozen=True)
class Speed:
    """One way to run a model.

    Attributes:
        engine, precision: as `FeatureExtractor.from_pretrained` takes them.
        images_per_s: of the model alone, one batch at a time.
        cosine: the smallest one, over the golden images, to PyTorch's features.
    """

    engine: str
    precision: str
    images_per_s: float
    cosine: float


def fastest_way(extractor: FeatureExtractor) -> tuple[Speed, float] | None:
    """The fastest way that is installed, and how many times faster than this one; None where that is not much.

    What was measured is kept in the user's cache folder, for this model, these versions and this processor.
    """
    if any(name.startswith(("golden/", "onnx/")) for name in extractor.folder.absent):
        return None  # a hint is no reason to download, either
    speeds: list[Speed] = []
    with suppress(RobustFeatError):  # a hint is no reason to fail
        speeds = _load_or_measure(extractor)
    own = next((speed for speed in speeds if _way(speed) == (extractor.engine.name, extractor.precision)), None)
    good = [speed for speed in speeds if speed.cosine >= MIN_COSINE]
    if own is None or not good:
        return None
    best = max(good, key=lambda speed: speed.images_per_s)
    gain = best.images_per_s / own.images_per_s
    return (best, gain) if gain >= _WORTH_SAYING else None


def measure_speeds(extractor: FeatureExtractor) -> list[Speed]:
    """Runs every engine and precision that this model, this processor and the installed packages allow."""
    images, expected = extractor.folder.golden()
    squares = np.stack([extractor.prepare(image) for image in images])
    batch = np.resize(squares, (extractor.batch_size, *squares.shape[1:]))
    speeds = []
    for other in _ways(extractor):
        worst = float(cosine(other.embed_prepared(squares), expected).min())
        other.embed_prepared(batch)
        began, count = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - began) < _MEASURE_S or count < 2:
            other.embed_prepared(batch)
            count += 1
        speeds.append(Speed(other.engine.name, other.precision, count * len(batch) / elapsed, worst))
    return speeds


def _ways(extractor: FeatureExtractor) -> Iterator[FeatureExtractor]:
    for engine in ENGINES:
        for precision in ("fp32", "bf16", "int8"):
            if (engine, precision) == (extractor.engine.name, extractor.precision):
                yield extractor
            elif importlib.util.find_spec(engine) and extractor.engine.device == "cpu":
                threads, streams = extractor.engine.threads, extractor.engine.streams
                with suppress(RobustFeatError):  # no such precision in this folder, or on this processor
                    options = RunOptions(precision, engine, "cpu", threads=threads, streams=streams)
                    yield FeatureExtractor.open(extractor.folder, options)


def _way(speed: Speed) -> tuple[str, str]:
    return speed.engine, speed.precision


def _load_or_measure(extractor: FeatureExtractor) -> list[Speed]:
    versions = {name: importlib.metadata.version(name) for name in ENGINES if importlib.util.find_spec(name)}
    subject = [extractor.config.files, versions, extractor.engine.threads, extractor.engine.streams, _processor()]
    key = hashlib.sha256(json.dumps(subject, sort_keys=True).encode()).hexdigest()[:16]
    file = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "robustfeat" / f"speeds-{key}.json"
    with suppress(OSError, ValueError, TypeError):
        return [Speed(**entry) for entry in json.loads(file.read_text("utf-8"))]
    speeds = measure_speeds(extractor)
    with suppress(OSError, RobustFeatError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with new_file(file) as partial:
            partial.write_text(json.dumps([asdict(speed) for speed in speeds]) + "\n", "utf-8")
    return speeds


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):  # what decides which kernels an engine takes
                return line
    return platform.processor()
