"""Training images decoded once: squares of uint8 in memory, in a memory-mapped file, or on the GPU.

An image is kept whole, resized to a square without regard to its proportions; crops are drawn in its own proportions
and undo that. Images that are such squares already are kept as they are.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Full, Queue
from threading import Event, Thread
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from robustfeat.errors import DataError, DecodeError, InputError
from robustfeat.files import FileLock, new_file, reserve_space
from robustfeat.progress import Progress, remark
from robustfeat.system import available_memory
from robustfeat.training.data.batches import Batch, EpochPlan, load_batches
from robustfeat.training.data.image_set import ImageSet, decoding_key

__all__ = ["CachedSet", "build_cache", "cached_batches", "require_room"]

_FORMAT_VERSION = 1
_BLOCK_BYTES = 2**25
_SHARE_OF_FREE = 0.9


@dataclass(frozen=True, kw_only=True)
class CachedSet(ImageSet):
    """An `ImageSet` whose images need no decoding.

    Attributes:
        squares: (N, P, P, 3) uint8; zero for bad images.
        sizes: (N, 2) int32, width and height before.
        bad: rows that could not be decoded, and why.
    """

    squares: Tensor = field(repr=False)
    sizes: NDArray[np.int32] = field(repr=False)
    bad: dict[int, str]

    def image(self, index: int) -> Image.Image:
        """RGB, P x P.

        Raises:
            DecodeError: it could not be decoded when the cache was filled.
        """
        if index in self.bad:
            raise DecodeError(self.bad[index])
        return Image.fromarray(self.squares[index].numpy())

    def decoded_by(self, preprocessing_version: int) -> CachedSet:
        """These images: they were decoded when the cache was filled."""
        return self

    def original_sizes(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """(m, 2) widths and heights of the images themselves, which `image` returns as squares."""
        return self.sizes[indices].astype(np.int64)


@dataclass(frozen=True)
class _Block:
    squares: NDArray[np.uint8]
    sizes: NDArray[np.int32]
    bad: dict[int, str]


class _Blocks(Dataset[_Block]):
    """All images in order, decoded, so many at once."""

    def __init__(self, data: ImageSet, side: int) -> None:
        self._data, self._side = data, side
        self.rows = max(16, _BLOCK_BYTES // (side * side * 3))

    def __len__(self) -> int:
        return math.ceil(len(self._data) / self.rows)

    def __getitem__(self, number: int) -> _Block:
        rows = range(number * self.rows, min((number + 1) * self.rows, len(self._data)))
        block = _Block(np.zeros((len(rows), self._side, self._side, 3), np.uint8), np.ones((len(rows), 2), "i4"), {})
        for place, row in enumerate(rows):
            try:
                image = self._data.image(row)
            except DecodeError as exc:
                block.bad[row] = str(exc)
                continue
            block.sizes[place] = image.size
            if image.size != (self._side, self._side):
                image = image.resize((self._side, self._side), Image.Resampling.BICUBIC)
            block.squares[place] = np.asarray(image)
        return block


def build_cache(
    data: ImageSet,
    side: int,
    place: str,
    *,
    device: torch.device,
    workers: int = 0,
    quiet: bool = False,
) -> CachedSet:
    """Decodes every image of `data` once.

    Args:
        side: P.
        place: `ram`, `device` (the GPU), or a folder for memory-mapped files, which later runs and other processes
            of this machine share. A killed run resumes filling it.
        device: the network's.
        workers: processes that decode.

    Raises:
        DataError: a folder has not enough room, which is said before anything is decoded (see also `require_room`).
        InputError: `place` is no folder that can be written.
    """
    if place not in {"ram", "device"}:
        return _build_file(data, side, Path(place), workers, quiet)
    squares = torch.empty((len(data), side, side, 3), dtype=torch.uint8, device=device if place == "device" else "cpu")
    sizes, bad = np.ones((len(data), 2), np.int32), {}
    for first, block in _decode(data, side, workers, 0, quiet):
        last = first + len(block.sizes)
        squares[first:last] = torch.from_numpy(block.squares)
        sizes[first:last] = block.sizes
        bad.update(block.bad)
    return _cached(data, squares, sizes, bad)


def require_room(data: ImageSet, side: int, place: str, *, device: torch.device, processes: int = 1) -> None:
    """Says before anything is decoded that memory does not suffice.

    Args:
        data, side, place, device: see `build_cache`; a folder's room is looked at when its file is made.
        processes: number of processes of this machine that fill their own cache, for `ram`.

    Raises:
        DataError: there is not enough.
        InputError: `place` is `device` and there is no GPU.
    """
    need = len(data) * (side * side * 3 + 8)
    if place == "device":
        if device.type != "cuda":
            raise InputError(
                "training runs on the CPU", argument="cache", value="device", fix="pass `cache=ram` or a folder"
            )
        _require(need, torch.cuda.mem_get_info(device)[0], "GPU memory", len(data), side)
    elif place == "ram":
        _require(need * processes, available_memory(), "memory", len(data), side)


def _cached(data: ImageSet, squares: Tensor, sizes: NDArray[np.int32], bad: dict[int, str]) -> CachedSet:
    return CachedSet(
        data.classes,
        data.labels,
        data.source,
        data.fingerprint,
        preprocessing_version=data.preprocessing_version,
        squares=squares,
        sizes=sizes,
        bad=bad,
    )


def _decode(data: ImageSet, side: int, workers: int, done: int, quiet: bool) -> Iterator[tuple[int, _Block]]:
    progress = Progress("decoding to the cache", len(data), start=done, quiet=quiet)
    blocks = _Blocks(data, side)
    first = done // blocks.rows
    for number, block in enumerate(load_batches(blocks, workers, range(first, len(blocks))), first):
        yield number * blocks.rows, block
        progress.advance(len(block.sizes))
    progress.finish()


def _require(need: int, free: int | None, what: str, images: int, side: int) -> None:
    if free is not None and need > _SHARE_OF_FREE * free:
        fitting = int((_SHARE_OF_FREE * free / need) ** 0.5 * side)
        raise DataError(
            f"the cache of {images:,} images of {side} px needs {need / 1e9:.1f} GB of {what} and {free / 1e9:.1f} GB "
            "are free",
            fix=f"pass `cache=FOLDER` on a disk with room, `cache_px={fitting}` or less, or `cache_px=0` "
            "to decode each time",
        )


def _build_file(data: ImageSet, side: int, folder: Path, workers: int, quiet: bool) -> CachedSet:
    """The cache as files in `folder`: NAME.u8 (squares, then sizes) and NAME.json (progress and bad images)."""
    key = {"format_version": _FORMAT_VERSION, "fingerprint": data.fingerprint, "side": side, "images": len(data)}
    key |= decoding_key(data.preprocessing_version)
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    file, state_file = folder / f"{name}.u8", folder / f"{name}.json"
    pixels = side * side * 3
    size = len(data) * (pixels + 8)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{name}.lock")
        lock.take(
            on_wait=lambda: remark(f"waiting for another process, which fills the cache in {folder}", quiet=quiet)
        )
        try:
            state = _read_state(state_file, key)
            if (
                state is None
                or not file.exists()
                or file.stat().st_size != size
                or _zeroed(file, len(data), state["done"])
            ):
                # First what says that the file is full: a kill may come at any point.
                state_file.unlink(missing_ok=True)
                file.unlink(missing_ok=True)
                _require(size, shutil.disk_usage(folder).free, f"{folder}", len(data), side)
                with open(file, "wb") as handle:
                    try:
                        reserve_space(handle, size)
                    except OSError:
                        file.unlink()
                        raise
                state = {**key, "done": 0, "bad": {}}
            if state["done"] < len(data):
                _fill_file(data, side, file, state, state_file, workers, quiet)
        finally:
            lock.release()
    except OSError as exc:
        raise InputError(
            f"cannot be written ({exc.strerror or exc})",
            argument="cache",
            value=folder,
            fix="free space or choose another folder",
        ) from exc
    whole = np.memmap(file, np.uint8, "c")  # pages of our own where written, which nothing does
    squares = whole[: len(data) * pixels].reshape(len(data), side, side, 3)
    sizes = whole[len(data) * pixels :].view(np.int32).reshape(len(data), 2)
    return _cached(data, torch.from_numpy(squares), sizes, {int(row): line for row, line in state["bad"].items()})


def _fill_file(
    data: ImageSet, side: int, file: Path, state: dict[str, Any], state_file: Path, workers: int, quiet: bool
) -> None:
    pixels = side * side * 3
    with open(file, "r+b") as handle:
        for first, block in _decode(data, side, workers, state["done"], quiet):
            for values, offset in ((block.squares, first * pixels), (block.sizes, len(data) * pixels + first * 8)):
                handle.seek(offset)
                handle.write(values.tobytes())
            handle.flush()
            os.fsync(handle.fileno())
            state["done"] = first + len(block.sizes)
            state["bad"] |= {str(row): line for row, line in block.bad.items()}
            with new_file(state_file) as partial:
                partial.write_text(json.dumps(state), "utf-8")


def _read_state(file: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    try:
        state = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(state, dict) or not key.items() <= state.items():
        return None
    done, bad = state.get("done"), state.get("bad")
    if type(done) is not int or not 0 <= done <= key["images"] or not isinstance(bad, dict):
        return None
    return state if all(row.isdecimal() and int(row) < key["images"] for row in bad) else None


def _zeroed(file: Path, images: int, done: int) -> bool:
    """Whether rows that are said to be done are not there: every image has a size."""
    sizes = np.memmap(file, np.int32, "r", offset=file.stat().st_size - images * 8, shape=(images, 2))
    return bool((sizes[:done] < 1).any())


def cached_batches(data: CachedSet, plan: EpochPlan, numbers: range, device: torch.device) -> Iterator[Batch]:
    """Whole squares and their boxes, to be cropped on the GPU; a thread prepares the next while one is used."""

    def prepare(number: int) -> Batch:
        rows, draws = plan.rows(number), plan.draws(number)
        failures = tuple(data.bad[int(row)] for row in rows if int(row) in data.bad)
        if failures:
            good = np.array([int(row) not in data.bad for row in rows])
            rows, draws = rows[good], draws[good]
        sizes = data.original_sizes(rows)
        boxes, flips = plan.crops(draws, sizes)
        index = torch.from_numpy(rows)
        if data.squares.is_cuda:
            index = index.pin_memory().to(data.squares.device, non_blocking=True)
        batch = Batch(
            data.squares.index_select(0, index).permute(0, 3, 1, 2),
            torch.from_numpy(data.labels[rows]),
            failures,
            torch.from_numpy(boxes / np.tile(sizes, 2)).float(),
            torch.from_numpy(flips),
            torch.from_numpy(rows),
        )
        return batch.pin_memory() if device.type == "cuda" else batch

    yield from _prefetched(prepare, numbers, device)


def _prefetched(prepare: Callable[[int], Batch], numbers: range, device: torch.device) -> Iterator[Batch]:
    queue: Queue[Batch | BaseException | None] = Queue(2)
    ended = Event()

    def put(item: Batch | BaseException | None) -> None:
        while not ended.is_set():
            with suppress(Full):
                queue.put(item, timeout=1)
                return

    def work() -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # each thread has a current device of its own
            for number in numbers:
                if ended.is_set():
                    return
                put(prepare(number))
            put(None)
        except BaseException as exc:
            put(exc)

    Thread(target=work, daemon=True).start()
    try:
        while (item := queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        ended.set()
