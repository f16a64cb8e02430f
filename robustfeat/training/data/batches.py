"""Batches that depend on seed, epoch and step alone."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from robustfeat.errors import DecodeError, RobustFeatError, TrainingError
from robustfeat.hub.preprocessing import Preprocessing, resize_and_crop
from robustfeat.training.data.image_set import ImageSet
from robustfeat.training.data.order import epoch_order

__all__ = ["Batch", "EvaluationBatches", "TrainingBatches", "load_batches"]


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
        self._order = epoch_order(len(data), data.blocks, batch_size, seed=seed, epoch=epoch)

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
        RobustFeatError: what a worker raised.
    """
    raised: RobustFeatError | None = None
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
    except RobustFeatError as exc:
        # A worker's error comes with its traceback as text, whose last line is `module.Class: message`.
        raised = type(exc)(
            str(exc).strip().splitlines()[-1].removeprefix(f"{type(exc).__module__}.{type(exc).__name__}: ")
        )
        # Its frames hold the iterator: without them that is gone here, and with it the workers, or the process would
        # wait for them at its end.
        exc.__traceback__ = None
    except RuntimeError as exc:
        if "DataLoader worker" not in str(exc):
            raise
        raise TrainingError(
            "a process that decodes images died (out of memory?); pass fewer --workers, then go on with --resume"
        ) from exc
    if raised:
        raise raised


def _leave_signals_to_the_parent(worker: int) -> None:
    """A signal to the process group reaches workers, too; the parent still needs them to finish its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
