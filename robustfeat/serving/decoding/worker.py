"""The program of a decoder process, which decodes image files to squares in shared memory.

`robustfeat.serving.decoding.process` starts it. An image that crashes or hangs it only loses that image.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import mmap
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
from PIL import Image

from robustfeat.errors import DecodeError, InputError
from robustfeat.hub.heif import use_one_thread
from robustfeat.hub.preprocessing import BYTES_PER_PIXEL, Preprocessing, TooLargeError, prepare_square
from robustfeat.serving.inputs.remote import is_remote
from robustfeat.serving.inputs.sources import ImageSource, index_line
from robustfeat.system import die_with_parent, offer_to_die_first

__all__ = [
    "LARGE",
    "MAILBOX_BYTES",
    "MEMORY_BYTES",
    "READY",
    "Decoded",
    "ImageDecoder",
    "Images",
    "SharedSquares",
    "Task",
    "answer_tasks",
    "serve",
]

MEMORY_BYTES = 4 * 2**30
"""Memory limit for decoding one image. An image that needs more is a failed row."""

MAILBOX_BYTES = 2**20

READY = "ready"
"""A decoder's first message."""

LARGE = "large"
"""Marks an image with so many pixels that it takes long, in place of an error."""

_LARGE_PIXELS = 25_000_000
_SHARED_PIXELS = 4_000_000
"""Number of pixels above which an image does not delay the results of earlier ones in a task."""
_LONG_S = 0.05
"""Time after which a decoder returns the rest of a task."""

_REMOTE_READS = 16
_HEARTBEAT_S = 5.0


@dataclass(frozen=True)
class Task:
    """Consecutive rows to decode.

    Attributes:
        first: number of the first row.
        place: index of the first row's square in the shared memory. The others follow.
        lines: `ImageSource.to_line` of each row.
        data: encoded images of Parquet rows, which the parent reads, or the reasons for missing ones. None without
            Parquet rows.
        lost: rows of this task that crashed a decoder before, with the reason.
    """

    first: int
    place: int
    lines: Sequence[bytes]
    data: Sequence[bytes | str | None] | None
    lost: dict[int, str]


@dataclass(frozen=True)
class Images:
    """Encoded images of a request.

    Attributes:
        data: their bytes; None if they are in the decoder's mailbox, one after the other.
        sizes: the number of bytes of each.
        places: index of each image's square in the shared memory.
        max_pixels: largest accepted image.
        large: whether to decode images that take long. Otherwise they get `LARGE` as their error.
    """

    data: Sequence[bytes] | None
    sizes: Sequence[int]
    places: Sequence[int]
    max_pixels: int
    large: bool = False


@dataclass(frozen=True)
class Decoded:
    """The result of a task.

    Attributes:
        index: the rows' lines of the index file.
        failed: offsets of the rows without a square.
        stopped: why the whole run cannot continue; None if it can.
    """

    index: bytes
    failed: tuple[int, ...]
    stopped: str | None = None


class SharedSquares:
    """Memory that decoders share with their parent.

    Attributes:
        progress: (decoders, 2) int64: each decoder's current offset in its task, and a counter that shows progress.
        squares: (places, S, S, 3) uint8.
        mailboxes: (decoders, MAILBOX_BYTES) uint8, for `Images`. A full pipe would block its writer.
    """

    def __init__(self, descriptor: int, decoders: int, places: int, side: int) -> None:
        head, body = decoders * 2 * 8, places * side * side * 3
        self.size = head + body + decoders * MAILBOX_BYTES
        os.truncate(descriptor, self.size)  # takes no memory until it is used
        memory = mmap.mmap(descriptor, self.size)
        self.progress = np.frombuffer(memory, np.int64, decoders * 2).reshape(decoders, 2)
        self.squares = np.frombuffer(memory, np.uint8, body, offset=head).reshape(places, side, side, 3)
        self.mailboxes = np.frombuffer(memory, np.uint8, offset=head + body).reshape(decoders, MAILBOX_BYTES)


def serve(
    parent: int,
    pipe: int,
    memory: int,
    number: int,
    decoders: int,
    places: int,
    contract: str,
    scaled: bool,
    max_pixels: int,
) -> None:
    """The program of a decoder process, which runs tasks until the parent closes the pipe."""
    import resource  # which Windows lacks

    # Ignore Ctrl+C and signals to the process group. The parent decides, and this process ends with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with_parent(signal.SIGKILL, parent)  # otherwise it would finish its current image
    offer_to_die_first()
    # Pillow warns of large images and odd metadata. All that matters becomes the row's error.
    warnings.filterwarnings("ignore", module="PIL")
    preprocessing = Preprocessing.from_dict(json.loads(contract))
    shared = SharedSquares(memory, decoders, places, preprocessing.image_size)
    limit = max(MEMORY_BYTES, max_pixels * BYTES_PER_PIXEL + 2**30) + shared.size
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    with suppress(OSError, ValueError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))
    answer_tasks(
        Connection(pipe), ImageDecoder(shared, number, preprocessing, scaled, max_pixels), before_images=_close_stderr
    )


def answer_tasks(
    connection: Connection, decoder: ImageDecoder, *, before_images: Callable[[], None] | None = None
) -> None:
    """Answers tasks until the other end of the pipe is closed.

    Args:
        connection: this end.
        decoder: decodes the images.
        before_images: called once, before the first `Images`.
    """
    _load_formats()
    try:
        connection.send(READY)
        while True:
            task = connection.recv()
            if isinstance(task, Images) and before_images is not None:
                before_images()
                before_images = None
            connection.send(decoder.run(task) if isinstance(task, Task) else decoder.decode(task))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _close_stderr() -> None:
    """Drops messages of libraries about damaged files, which would end up in the server's log."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)


def _load_formats() -> None:
    """Loads Pillow's readers early, which saves the first image of each format some 40 ms.

    pillow-heif (30 ms) loads with the first HEIC image, since most folders have none.
    """
    Image.preinit()
    for name in ("TiffImagePlugin", "WebPImagePlugin"):
        importlib.import_module(f"PIL.{name}")
    use_one_thread()


class ImageDecoder:
    """Decodes the images of tasks into its squares.

    Args:
        shared: the memory.
        number: its line there.
        contract: the preprocessing.
        scaled: see `prepare_square`.
        max_pixels: larger images of a `Task` are refused.
    """

    def __init__(
        self, shared: SharedSquares, number: int, contract: Preprocessing, scaled: bool, max_pixels: int
    ) -> None:
        self._squares, self._progress = shared.squares, shared.progress[number]
        self._mailbox = shared.mailboxes[number].data
        self._contract, self._scaled, self._max_pixels = contract, scaled, max_pixels
        self._readers: ThreadPoolExecutor | None = None

    def run(self, task: Task) -> Decoded:
        """Reads and decodes a task's rows."""
        index: list[str] = []
        failed: list[int] = []
        sources = [ImageSource.from_line(line) for line in task.lines]
        try:
            for offset, (source, data) in enumerate(zip(sources, self._read(sources, task), strict=True)):
                digest: str | None = None
                error: str | None = None
                if isinstance(data, bytes):
                    digest, error = (
                        hashlib.sha256(data).hexdigest(),
                        self._decode(data, task.place + offset, self._max_pixels),
                    )
                else:
                    error = data
                if error is not None:
                    failed.append(offset)
                index.append(index_line(task.first + offset, source, digest, error))
        except InputError as exc:
            return Decoded(b"", (), str(exc))
        return Decoded("".join(index).encode(), tuple(failed))

    def decode(self, images: Images) -> tuple[str | None, ...]:
        """Decodes images. Returns the error of each, or None for success.

        It may return early with at least one result, so an image that takes long does not delay other requests.
        """
        began = time.monotonic()
        errors: list[str | None] = []
        ends = itertools.accumulate(images.sizes)
        for offset, (size, end, place) in enumerate(zip(images.sizes, ends, images.places, strict=True)):
            self._progress[:] = offset, self._progress[1] + 1
            data = bytes(self._mailbox[end - size : end]) if images.data is None else images.data[offset]
            quick = images.max_pixels if images.large else _SHARED_PIXELS if errors else _LARGE_PIXELS
            error = self._decode(data, place, images.max_pixels, quick)
            if error == LARGE and errors:
                break
            errors.append(error)
            if time.monotonic() - began > _LONG_S:
                break
        return tuple(errors)

    def _decode(self, data: bytes, place: int, max_pixels: int, quick: int | None = None) -> str | None:
        """Fills a square. Returns an error, `LARGE` for more than `quick` pixels, or None."""
        limit = max_pixels if quick is None else min(quick, max_pixels)
        try:
            self._squares[place] = prepare_square(data, self._contract, scaled=self._scaled, max_pixels=limit)
        except DecodeError as exc:
            if isinstance(exc, TooLargeError) and limit < max_pixels:
                return LARGE
            error = str(exc)
        except MemoryError:
            error = "out of memory while resizing"
        else:
            return None
        self._squares[place] = 0  # a fixed content, so its neighbours' last bits do not vary
        return error

    def _read(self, sources: Sequence[ImageSource], task: Task) -> Iterator[bytes | str]:
        """Yields the bytes of each image, or the reason why it has none, and records progress."""
        coming: dict[int, Future[bytes]] = {}
        if any(is_remote(source.file) and source.kind != "parquet" for source in sources):
            # Remote storage is slow, but answers many requests at once.
            self._readers = self._readers or ThreadPoolExecutor(_REMOTE_READS)
            reading = {offset: source for offset, source in enumerate(sources) if source.kind != "parquet"}
            coming = {offset: self._readers.submit(source.read) for offset, source in reading.items()}
        for offset, source in enumerate(sources):
            self._progress[:] = offset, self._progress[1] + 1
            if offset in task.lost:
                self._squares[task.place + offset] = 0
                yield task.lost[offset]
                continue
            try:
                if offset in coming:
                    while not wait([coming[offset]], _HEARTBEAT_S).done:
                        self._progress[1] += 1  # waiting counts as progress
                    yield coming[offset].result()
                elif task.data is not None and (data := task.data[offset]) is not None:
                    if isinstance(data, str):
                        self._squares[task.place + offset] = 0
                    yield data
                else:
                    yield source.read()
            except OSError as exc:
                self._squares[task.place + offset] = 0
                yield exc.strerror or str(exc)
            except (MemoryError, ValueError) as exc:
                self._squares[task.place + offset] = 0
                yield "out of memory while reading" if isinstance(exc, MemoryError) else str(exc)
