"""Training sets, read from class folders or Parquet files, and batches that depend on seed, epoch and step alone."""

from __future__ import annotations

import hashlib
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from robustfeat.errors import DataError, DecodeError, TrainingError, first_line
from robustfeat.hub.preprocessing import Preprocessing, decode, resize_and_crop
from robustfeat.serving.inputs import IMAGE_SUFFIXES, list_folder
from robustfeat.serving.sources import class_names

__all__ = ["Batch", "EvaluationBatches", "ImageSet", "TrainingBatches", "load_batches", "open_training_data"]

_VALIDATION_NAMES = ("val", "validation", "test")


class _Files:
    """Image bytes from files."""

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self._root, self._names = root, names

    def read(self, index: int) -> bytes:
        return (self._root / self._names[index]).read_bytes()

    def name(self, index: int) -> str:
        return self._names[index]


class _Rows:
    """Image bytes from a column in memory."""

    def __init__(self, chunks: Sequence[Any], places: Sequence[tuple[str, int]]) -> None:
        # One Arrow array a chunk: a lookup by (chunk, row) copies one image, not the column.
        self._chunks = chunks
        self._starts = np.cumsum([0] + [len(chunk) for chunk in chunks])
        self._places = places

    def read(self, index: int) -> bytes:
        chunk = int(np.searchsorted(self._starts, index, side="right")) - 1
        value = self._chunks[chunk][index - int(self._starts[chunk])].as_py()
        return bytes(value or b"")

    def name(self, index: int) -> str:
        file = int(np.searchsorted([start for _, start in self._places], index, side="right")) - 1
        name, start = self._places[file]
        return f"{name} row {index - start}"


class _Source(Protocol):
    def read(self, index: int) -> bytes: ...
    def name(self, index: int) -> str: ...


@dataclass(frozen=True)
class ImageSet:
    """Labelled images, encoded.

    Attributes:
        classes: the C class names.
        labels: (N,) int64.
        source: gives each image's bytes and its name for messages.
        fingerprint: sha256 over the classes, the labels and the images' names and sizes.
    """

    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    source: _Source
    fingerprint: str

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """RGB, upright.

        Raises:
            DecodeError: naming the image.
        """
        try:
            return decode(self.source.read(index))
        except (DecodeError, OSError) as exc:
            raise DecodeError(f"{self.source.name(index)}: {exc}") from exc

    def subset(self, indices: NDArray[np.int64]) -> ImageSet:
        """These rows, in this order."""
        digest = hashlib.sha256(self.fingerprint.encode() + indices.tobytes()).hexdigest()
        return ImageSet(self.classes, self.labels[indices], _Subset(self.source, indices), digest)


class _Subset:
    def __init__(self, source: _Source, indices: NDArray[np.int64]) -> None:
        self._source, self._indices = source, indices

    def read(self, index: int) -> bytes:
        return self._source.read(int(self._indices[index]))

    def name(self, index: int) -> str:
        return self._source.name(int(self._indices[index]))


def open_training_data(
    root: str | Path, *, val_fraction: float = 0.02, seed: int = 0, parts: int | None = None
) -> tuple[ImageSet, ImageSet]:
    """The training and validation images under `root`.

    Args:
        root: a folder with `train/` and `val|validation|test/` of class folders, or with `train-*.parquet` and
            `validation-*.parquet` files (columns `image`, `label`).
        val_fraction: where there is no validation split, this share of the training images, drawn with `seed`.
        parts: only the first `parts` Parquet files of the training split.

    Raises:
        DataError: with what is missing and what would do.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; expected a folder with train/ class folders or train-*.parquet files")
    if (root / "train").is_dir():
        train = _open_folders(root / "train")
        splits = [root / name for name in _VALIDATION_NAMES if (root / name).is_dir()]
        validation = _open_folders(splits[0], train.classes) if splits else None
    else:
        files = sorted(root.glob("train-*.parquet"))
        if not files:
            raise DataError(
                f"{root}: holds neither train/ with class folders nor train-*.parquet files; see docs/training.md"
            )
        table = _read_parquet(files[:parts])
        names = table.class_names or tuple(str(label) for label in sorted(set(table.labels)))
        train = table.to_image_set(names, indexed=table.class_names is not None)
        found = [sorted(root.glob(f"{name}-*.parquet")) for name in _VALIDATION_NAMES]
        held_out = next((_read_parquet(files) for files in found if files), None)
        validation = held_out.to_image_set(names, indexed=table.class_names is not None) if held_out else None
    if validation is None:
        order = np.random.default_rng([seed, 0x5EED]).permutation(len(train))
        size = max(1, round(val_fraction * len(train)))
        if not 0 < val_fraction < 1 or size >= len(train):
            raise DataError(
                f"{root}: no validation split, and --val-fraction {val_fraction} of {len(train)} images leaves none"
            )
        validation, train = train.subset(np.sort(order[:size])), train.subset(np.sort(order[size:]))
    return train, validation


def _open_folders(root: Path, classes: tuple[str, ...] | None = None) -> ImageSet:
    found = tuple(sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")))
    if not found:
        raise DataError(f"{root}: holds no class folders; expected {root.name}/CLASS/image.jpg")
    classes = classes or found
    unknown = sorted(set(found) - set(classes))
    if unknown:
        raise DataError(f"{root}: class {unknown[0]!r} is not in the training split; remove it or add it there")
    names: list[str] = []
    labels: list[int] = []
    digest = hashlib.sha256("\n".join(classes).encode())
    for label, name in enumerate(classes):
        images = list_folder(root / name)[0] if (root / name).is_dir() else []
        for image in images:
            names.append(f"{name}/{image.path}")
            labels.append(label)
            # A dangling link has no size; it is left out, and named, when its turn comes.
            size = Path(image.file).stat().st_size if Path(image.file).exists() else -1
            digest.update(f"{names[-1]}\0{size}\n".encode(errors="surrogateescape"))
    if not names:
        raise DataError(f"{root}: holds no images; expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}")
    return ImageSet(classes, np.array(labels, np.int64), _Files(root, names), digest.hexdigest())


@dataclass(frozen=True)
class _ParquetSplit:
    """The rows of a split's files.

    Attributes:
        labels: as they stand in the files, numbers or text.
        class_names: from the files' metadata, where they have it.
    """

    files: Sequence[Path]
    source: _Rows
    labels: list[Any]
    class_names: tuple[str, ...] | None

    def to_image_set(self, classes: tuple[str, ...], *, indexed: bool) -> ImageSet:
        """Labels as numbers within `classes`; `indexed`: numbers in the files are such numbers already."""
        own_names = dict(enumerate(self.class_names or classes))
        index = {name: number for number, name in enumerate(classes)}
        numbers = []
        for row, label in enumerate(self.labels):
            try:
                numbers.append(index[own_names[label] if indexed and isinstance(label, int) else str(label)])
            except KeyError:
                raise DataError(
                    f"{self.source.name(row)}: label {label!r} is none of the training split's {len(classes)} classes"
                ) from None
        labels = np.array(numbers, np.int64)
        digest = hashlib.sha256("\n".join(classes).encode())
        digest.update(labels.tobytes())
        for file in self.files:
            digest.update(f"{file.name}\0{file.stat().st_size}\n".encode())
        return ImageSet(classes, labels, self.source, digest.hexdigest())


def _read_parquet(files: Sequence[Path]) -> _ParquetSplit:
    import pyarrow
    import pyarrow.parquet

    chunks: list[Any] = []
    places: list[tuple[str, int]] = []
    labels: list[Any] = []
    names: tuple[str, ...] | None = None
    for file in files:
        try:
            table = pyarrow.parquet.read_table(file, columns=["image", "label"])
        except (pyarrow.ArrowException, OSError) as exc:
            raise DataError(f"{file}: not a Parquet file with the columns image and label ({first_line(exc)})") from exc
        if set(table.column_names) != {"image", "label"}:
            got = ", ".join(table.column_names) or "others"
            raise DataError(f"{file}: needs the columns image and label; got {got}")
        names = names or class_names(table.schema, "label")
        places.append((file.name, len(labels)))
        for chunk in table.column("image").chunks:
            chunks.append(chunk.field("bytes") if pyarrow.types.is_struct(chunk.type) else chunk)
        labels.extend(table.column("label").to_pylist())
    if not labels:
        raise DataError(f"{files[0]}: holds no rows; expected images and their labels")
    if None in labels:
        raise DataError(f"{files[0].parent}: row {labels.index(None)} has no label; every row needs one")
    return _ParquetSplit(files, _Rows(chunks, places), labels, names)


@dataclass(frozen=True)
class Batch:
    """One batch, on the CPU.

    Attributes:
        images: (m, 3, S, S) uint8, channels last in memory.
        labels: (m,) int64.
        failures: a line for each image that could not be decoded; such images are left out of the batch.
    """

    images: Tensor
    labels: Tensor
    failures: tuple[str, ...] = ()


def _collect(
    data: ImageSet,
    indices: NDArray[np.int64],
    view: Callable[[Image.Image, int], NDArray[np.uint8]],
    side: int,
) -> Batch:
    """`view` maps an image and its place in the batch to (side, side, 3)."""
    squares = np.empty((len(indices), side, side, 3), np.uint8)
    kept: list[int] = []
    failures: list[str] = []
    for place, index in enumerate(indices):
        try:
            squares[len(kept)] = view(data.image(int(index)), place)
            kept.append(int(index))
        except DecodeError as exc:
            failures.append(str(exc))
    images = torch.from_numpy(squares[: len(kept)]).permute(0, 3, 1, 2)
    return Batch(images, torch.from_numpy(data.labels[np.array(kept, np.int64)]), tuple(failures))


class TrainingBatches(Dataset[Batch]):
    """The batches of one epoch: item `step` is a whole batch, shuffled, cropped and flipped.

    What item `step` holds follows from seed, epoch and step alone, whatever the number of workers, so a resumed
    run sees the batches that the unbroken one saw. The last, smaller batch of an epoch is left out.

    Args:
        side: S, the side of the square crops in pixels.
        min_crop_area: crops cover between this share and all of an image's area, at aspect ratios 3/4 to 4/3.
    """

    def __init__(
        self, data: ImageSet, batch_size: int, side: int, *, seed: int, epoch: int, min_crop_area: float = 0.08
    ) -> None:
        self._data, self._batch_size, self._side = data, batch_size, side
        self._seed, self._epoch, self._min_crop_area = seed, epoch, min_crop_area
        self._order = np.random.default_rng([seed, epoch]).permutation(len(data))

    def __len__(self) -> int:
        return len(self._order) // self._batch_size

    def __getitem__(self, step: int) -> Batch:
        indices = self._order[step * self._batch_size : (step + 1) * self._batch_size]
        rng = np.random.default_rng([self._seed, self._epoch, step])
        draws = rng.random((len(indices), 5))
        return _collect(self._data, indices, lambda image, place: self._crop(image, draws[place]), self._side)

    def _crop(self, image: Image.Image, draw: NDArray[np.float64]) -> NDArray[np.uint8]:
        width, height = image.size
        area = height * width * (self._min_crop_area + (1 - self._min_crop_area) * draw[0])
        ratio = math.exp((2 * draw[1] - 1) * math.log(4 / 3))
        w, h = min(math.sqrt(area * ratio), width), min(math.sqrt(area / ratio), height)
        left, top = draw[2] * (width - w), draw[3] * (height - h)
        size = (self._side, self._side)
        square = np.asarray(image.resize(size, Image.Resampling.BILINEAR, box=(left, top, left + w, top + h)))
        return square[:, ::-1] if draw[4] < 0.5 else square


class EvaluationBatches(Dataset[Batch]):
    """All images once, in order, through the preprocessing contract's resize and centre crop."""

    def __init__(self, data: ImageSet, batch_size: int, contract: Preprocessing) -> None:
        self._data, self._batch_size, self._contract = data, batch_size, contract

    def __len__(self) -> int:
        return math.ceil(len(self._data) / self._batch_size)

    def __getitem__(self, step: int) -> Batch:
        stop = min((step + 1) * self._batch_size, len(self._data))
        indices = np.arange(step * self._batch_size, stop)
        contract = self._contract
        return _collect(self._data, indices, lambda image, _: resize_and_crop(image, contract), contract.image_size)


def load_batches(batches: Dataset[Batch], workers: int, start: int = 0) -> Iterator[Batch]:
    """Items `start` onwards in order, prepared by `workers` processes (0: in this one).

    Raises:
        TrainingError: a worker died.
    """
    steps = range(start, len(batches))  # type: ignore[arg-type]
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        # Forked workers share the images in memory; other start methods would copy them into each.
        multiprocessing_context="fork" if workers else None,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_leave_signals_to_the_parent,
    )
    try:
        yield from loader
    except RuntimeError as exc:
        if "DataLoader worker" not in str(exc):
            raise
        raise TrainingError(
            "a process that decodes images died (out of memory?); pass fewer --workers, then go on with --resume"
        ) from exc


def _leave_signals_to_the_parent(worker: int) -> None:
    """A signal to the process group reaches workers, too; the parent still needs them to finish its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
