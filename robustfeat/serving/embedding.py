"""Bulk embedding: image files to `feats.npy`, with an index and a description beside it."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray

import robustfeat
from robustfeat.errors import DecodeError, InputError
from robustfeat.files import new_file
from robustfeat.progress import Progress
from robustfeat.serving.cpus import available_cpus
from robustfeat.serving.extractor import BATCH_SIZE, FeatureExtractor
from robustfeat.serving.inputs import ImageFile, Inputs

__all__ = ["EmbeddingResult", "embed_files"]

_BATCHES_AHEAD = 4


@dataclass(frozen=True)
class EmbeddingResult:
    """What was written.

    Attributes:
        features: the .npy file.
        images: rows in it.
        failed: how many of them are NaN.
        skipped: files with other suffixes, not in it.
        feature_size: D.
        seconds: wall time.
    """

    features: Path
    images: int
    failed: int
    skipped: int
    feature_size: int
    seconds: float


@dataclass(frozen=True)
class _Row:
    square: NDArray[np.uint8] | None
    sha256: str | None
    error: str | None


def embed_files(
    extractor: FeatureExtractor, inputs: Inputs, out: str | Path, *, quiet: bool = False
) -> EmbeddingResult:
    """Embeds every image of `inputs` into `out`, row by row in their order.

    Writes `out` (.npy, (n, D) float32; a failed image is a row of NaN) and, beside it, NAME.index.jsonl (row, path,
    sha256 of the bytes, error or null) and NAME.meta.json. All three appear once they are complete.

    Raises:
        InputError: `out` is not a .npy path or cannot be written.
    """
    out = Path(out)
    if out.suffix != ".npy":
        raise InputError(f"--out {out}: expected a name ending in .npy")
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: the folder {out.parent} does not exist; make it first")
    images = inputs.images
    progress = Progress("embed", len(images), quiet=quiet)
    began, failed = time.monotonic(), 0
    shape = (len(images), extractor.feature_size)
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    with (
        new_file(out.with_suffix(".meta.json")) as meta_file,
        new_file(out.with_suffix(".index.jsonl")) as index_file,
        new_file(out) as features_file,
        # Plain appends: a full disk is then an error to report, where a memory map would crash the process.
        open(features_file, "wb") as features_handle,
        open(index_file, "w", encoding="utf-8") as index_handle,
    ):
        np.lib.format.write_array_header_1_0(features_handle, header)
        for first, rows in _prepared_batches(extractor, images):
            features = extractor.embed_prepared([row.square for row in rows])
            features_handle.write(features.astype("<f4", copy=False).tobytes())
            for offset, row in enumerate(rows):
                record = {"row": first + offset, **images[first + offset].index_fields()}
                line = {**record, "sha256": row.sha256, "error": row.error}
                index_handle.write(json.dumps(line, ensure_ascii=False) + "\n")
            failed += sum(row.error is not None for row in rows)
            progress.advance(len(rows), f"{failed} failed" if failed else "")
        seconds = time.monotonic() - began
        meta = _describe(extractor, inputs, failed, seconds)
        meta_file.write_text(json.dumps(meta, indent=2) + "\n", "utf-8")
    progress.finish(f"{failed} failed" if failed else "")
    return EmbeddingResult(out, len(images), failed, inputs.skipped, extractor.feature_size, seconds)


def _prepared_batches(extractor: FeatureExtractor, images: Sequence[ImageFile]) -> Iterator[tuple[int, list[_Row]]]:
    """Batches of fixed row numbers, decoded by threads a few batches ahead of the model."""

    def prepare(image: ImageFile) -> _Row:
        try:
            data = image.read()
        except OSError as exc:
            return _Row(None, None, exc.strerror or str(exc))
        digest = hashlib.sha256(data).hexdigest()
        try:
            return _Row(extractor.prepare(data), digest, None)
        except DecodeError as exc:
            return _Row(None, digest, str(exc))
        except MemoryError:
            return _Row(None, digest, "out of memory while resizing")

    starts = iter(range(0, len(images), BATCH_SIZE))
    with ThreadPoolExecutor(available_cpus(), "decode") as pool:
        waiting: deque[tuple[int, list[Future[_Row]]]] = deque()

        def enqueue() -> None:
            first = next(starts, None)
            if first is not None:
                waiting.append((first, [pool.submit(prepare, image) for image in images[first : first + BATCH_SIZE]]))

        for _ in range(_BATCHES_AHEAD):
            enqueue()
        try:
            while waiting:
                first, futures = waiting.popleft()
                rows = [future.result() for future in futures]
                enqueue()
                yield first, rows
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _describe(extractor: FeatureExtractor, inputs: Inputs, failed: int, seconds: float) -> dict[str, Any]:
    config = extractor.config
    return {
        "model": config.name,
        "revision": None,
        "files": dict(config.files),
        "precision": extractor.precision,
        "engine": extractor.engine.name,
        "device": extractor.engine.device,
        "preprocessing_hash": config.preprocessing.hash,
        "feature_size": extractor.feature_size,
        "batch_size": BATCH_SIZE,
        "versions": {
            "robustfeat": robustfeat.__version__,
            extractor.engine.name: extractor.engine.version,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
            "python": platform.python_version(),
        },
        "images": len(inputs.images),
        "failed": failed,
        "skipped": inputs.skipped,
        "seconds": round(seconds, 3),
        "images_per_s": round(len(inputs.images) / max(seconds, 1e-9), 1),
    }
