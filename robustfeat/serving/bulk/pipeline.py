"""Embeds rows of an input list in order, with decoders and the model in parallel.

There are as many decoder processes as processors, and as many parallel batches in the model, each on one thread.
Neither side has its own processors. A bounded number of batches is between them, so the faster side waits and leaves
the processors to the other. That keeps all processors busy at every ratio of decoding to inference.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from robustfeat.serving.decoding.parts import PartReader, size_of
from robustfeat.serving.decoding.pool import DEADLINE_S, DecoderPool
from robustfeat.serving.decoding.worker import Decoded, Task
from robustfeat.serving.extractor import FeatureExtractor
from robustfeat.serving.inputs.input_list import InputList
from robustfeat.system import available_cpus

__all__ = ["EmbeddedBatch", "Pipeline"]

_BATCHES_AHEAD = 4
_RESULTS_AHEAD = 256
_HELD_BYTES = 2**27
"""Most bytes of encoded images from Parquet files in decoders and their queue. A larger image goes by itself."""


@dataclass(frozen=True)
class EmbeddedBatch:
    """Features of consecutive rows.

    Attributes:
        first: number of the first row.
        features: (n, D) float32; NaN for failed rows.
        index: the rows' lines of the index file.
        failed: offsets of the failed rows.
    """

    first: int
    features: NDArray[np.float32]
    index: bytes
    failed: tuple[int, ...]


@dataclass
class _Batch:
    first: int
    count: int
    slot: int
    result: Future[EmbeddedBatch] = field(default_factory=Future)
    parts: list[Future[Decoded]] = field(default_factory=list)


class Pipeline:
    """Decoders and a model, ready to embed. Use it in a `with` block.

    Args:
        extractor: the model. It needs as many `streams` as threads to use all processors.
        batch_size: rows per batch; by default the extractor's.
        workers: number of decoder processes; by default all that the cgroup allows.
        deadline_s: see `pool.DEADLINE_S`.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        *,
        batch_size: int | None = None,
        workers: int | None = None,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self._extractor = extractor
        self._batch_size = batch_size or extractor.batch_size
        self._workers = workers or available_cpus()
        streams = extractor.engine.streams
        # One batch per decoder and stream, and some between them.
        self._slots = deque(range(self._workers + streams + _BATCHES_AHEAD))
        self._decoders = DecoderPool(
            extractor.config.preprocessing,
            scaled=extractor.decoding == "scaled",
            max_pixels=extractor.options.max_pixels,
            workers=self._workers,
            places=len(self._slots) * self._batch_size,
            deadline_s=deadline_s,
        )
        self._model = ThreadPoolExecutor(streams, "model")
        self._changed = threading.Condition()
        self._reader = PartReader()
        self._held_bytes = 0

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self._decoders.__exit__(None, None, None)
        # An interrupted run does not wait for its network, which may take very long.
        self._model.shutdown(wait=kind is not KeyboardInterrupt, cancel_futures=True)

    def embed(self, inputs: InputList, start: int, stop: int, *, first_row: int = 0) -> Iterator[EmbeddedBatch]:
        """Yields batches of the inputs `start` to `stop` in order, cut at `start + k * batch_size`.

        Args:
            first_row: number of input 0 in the index file.

        Raises:
            InputError: an archive or remote storage cannot be read.
            EngineError: no decoder process can be started.
        """
        lines = inputs.lines(start, stop)
        # Small jobs are spread over all decoders. In large jobs, a whole batch goes to one decoder.
        part = min(self._batch_size, max(1, (stop - start) // (4 * self._workers)))
        waiting: deque[_Batch] = deque()
        position = start

        def may_submit() -> bool:
            return position < stop and len(waiting) < _RESULTS_AHEAD and bool(self._slots)

        while waiting or position < stop:
            while may_submit():
                count = min(self._batch_size, stop - position)
                batch = _Batch(position + first_row, count, self._slots.popleft())
                self._submit(batch, list(itertools.islice(lines, count)), part)
                waiting.append(batch)
                position += count
            with self._changed:
                self._changed.wait_for(lambda: waiting[0].result.done() or may_submit())
            if waiting[0].result.done():
                yield waiting.popleft().result.result()

    def _submit(self, batch: _Batch, lines: Sequence[bytes], part: int) -> None:
        place, offset = batch.slot * self._batch_size, 0
        for some, data in self._reader.parts(lines, part):
            task = Task(batch.first + offset, place + offset, some, data, {})
            batch.parts.append(self._decode(task, size_of(data)))
            offset += len(some)
        left = itertools.count(len(batch.parts) - 1, -1)
        for future in batch.parts:
            future.add_done_callback(lambda _: self._infer(batch, next(left)))

    def _decode(self, task: Task, size: int) -> Future[Decoded]:
        """Gives a task to the decoders once its images, `size` bytes, fit."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held_bytes or self._held_bytes + size <= _HELD_BYTES)
            self._held_bytes += size
        future = self._decoders.submit(task)
        future.add_done_callback(lambda _: self._release(size))
        return future

    def _release(self, size: int) -> None:
        with self._changed:
            self._held_bytes -= size
            self._changed.notify_all()

    def _infer(self, batch: _Batch, parts_left: int) -> None:
        if parts_left:
            return
        try:
            self._model.submit(self._run, batch)
        except RuntimeError as exc:  # the pool is closing
            batch.result.set_exception(exc)
            with self._changed:
                self._changed.notify_all()

    def _run(self, batch: _Batch) -> None:
        try:
            decoded = [future.result() for future in batch.parts]
            batch.parts.clear()  # breaks a reference cycle: results would pile up until garbage collection
            sizes = itertools.accumulate((answer.index.count(b"\n") for answer in decoded), initial=0)
            failed = [size + offset for size, answer in zip(sizes, decoded, strict=False) for offset in answer.failed]
            place = batch.slot * self._batch_size
            squares = self._decoders.squares[place : place + batch.count]
            features = self._extractor.embed_prepared(squares, failed)
            index = b"".join(answer.index for answer in decoded)
            batch.result.set_result(EmbeddedBatch(batch.first, features, index, tuple(failed)))
        except BaseException as exc:
            batch.result.set_exception(exc)
        finally:
            with self._changed:
                self._slots.append(batch.slot)
                self._changed.notify_all()
