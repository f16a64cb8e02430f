"""Makes batches that depend only on seed, epoch and step."""

from __future__ import annotations

import functools
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from robustfeat.errors import DecodeError, RobustFeatError, TrainingError
from robustfeat.hub.preprocessing import Preprocessing, resize_and_crop
from robustfeat.training.data.augmentation import Augmentation
from robustfeat.training.data.crops import crop_boxes, crop_squares
from robustfeat.training.data.image_set import ImageSet
from robustfeat.training.data.order import epoch_order

__all__ = [
    "Batch",
    "EpochPlan",
    "EvaluationBatches",
    "OrderedPlan",
    "TrainingBatches",
    "explain_worker",
    "load_batches",
]

Item = TypeVar("Item")
Number = TypeVar("Number", np.int64, np.float64)


@dataclass(frozen=True)
class Batch:
    """One batch, or a rank's part of it.

    Attributes:
        images: (m, 3, S, S) uint8, channels last in memory; with `boxes` (m, 3, P, P), not cropped yet.
        labels: (m,) int64.
        failures: a line for each image that could not be decoded; such images are left out of the batch.
        boxes, flips: what `crop_squares` cuts out of `images`, where that is still to be done.
        rows: (m,) int64, of the training set.
    """

    images: Tensor
    labels: Tensor
    failures: tuple[str, ...] = ()
    boxes: Tensor | None = None
    flips: Tensor | None = None
    rows: Tensor | None = None

    def pin_memory(self) -> Batch:
        """Copies the batch to pinned memory, from which a GPU copies while the CPU continues."""

        def pinned(values: Tensor) -> Tensor:
            return values if values.is_cuda else values.pin_memory()

        boxes, flips = (None if part is None else pinned(part) for part in (self.boxes, self.flips))
        return replace(self, images=pinned(self.images), labels=pinned(self.labels), boxes=boxes, flips=flips)

    def pixels(self, device: torch.device, side: int) -> Tensor:
        """(m, 3, side, side) float32 from 0 to 255 on the device, cropped."""
        images = self.images.to(device, non_blocking=True)
        if self.boxes is None or self.flips is None:
            return images.float()
        boxes, flips = (part.to(device, non_blocking=True) for part in (self.boxes, self.flips))
        return crop_squares(images.permute(0, 2, 3, 1), boxes, flips, side)


class EpochPlan:
    """The images of an epoch's batches and their crops, determined by seed, epoch and number.

    Args:
        data: the images.
        batch_size: batch size over all ranks.
        replays: how many steps use each batch; an epoch is N / batch_size steps in any case, and so many epochs
            together show every image once.
        fixed_crops: where it is not 0, each image has so many crops, which follow from the seed and its row; epoch e
            shows crop e modulo their number.
        rank, world: this rank and the number of ranks, which share each batch.
    """

    def __init__(
        self,
        data: ImageSet,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        min_crop_area: float = 0.08,
        replays: int = 1,
        fixed_crops: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._length, self._fixed_crops = len(data), fixed_crops
        self._batch_size, self._seed, self._epoch = batch_size, seed, epoch
        self._min_crop_area, self._rank, self._world = min_crop_area, rank, world
        self.order = epoch_order(len(data), data.blocks, batch_size, seed=seed, epoch=epoch // replays)
        self.steps = len(self.order) // batch_size
        self.batches = math.ceil(self.steps / replays)
        self._first = epoch % replays * self.batches

    def rows(self, number: int) -> NDArray[np.int64]:
        """This rank's rows of the batch `number` of the epoch."""
        start = (self._first + number) % self.steps * self._batch_size
        return self._part(self.order[start : start + self._batch_size])

    def draws(self, number: int) -> NDArray[np.float64]:
        """(m, 5) from [0, 1) for the same rows: four for the box, one for the flip."""
        if self._fixed_crops:
            return _fixed_draws(self._length, self._seed, self._epoch % self._fixed_crops)[self.rows(number)]
        rng = np.random.default_rng([self._seed, self._epoch, number])
        return self._part(rng.random((self._batch_size, 5)))

    def seeds(self, number: int) -> NDArray[np.int64]:
        """(m,) seeds for the augmentations of the same rows."""
        rng = np.random.default_rng([self._seed, _AUGMENTED, self._epoch, number])
        return self._part(rng.integers(2**63, size=self._batch_size))

    def crops(
        self, draws: NDArray[np.float64], sizes: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """(m, 4) boxes in pixels and (m,) flips for images of these (m, 2) sizes."""
        return crop_boxes(draws[:, :4], sizes, self._min_crop_area), draws[:, 4] < 0.5

    def _part(self, values: NDArray[Number]) -> NDArray[Number]:
        size = self._batch_size // self._world
        return values[self._rank * size : (self._rank + 1) * size]


class OrderedPlan(EpochPlan):
    """All images in order, once for each fixed crop. The last batch of a crop may be smaller.

    Args:
        data, batch_size, seed, min_crop_area, fixed_crops: see `EpochPlan`.

    Attributes:
        steps, batches: for one crop, and for all.
    """

    def __init__(self, data: ImageSet, batch_size: int, *, seed: int, min_crop_area: float, fixed_crops: int) -> None:
        super().__init__(data, batch_size, seed=seed, epoch=0, min_crop_area=min_crop_area, fixed_crops=fixed_crops)
        self.order = np.arange(self._length)
        self.steps = math.ceil(self._length / batch_size)
        self.batches = self.steps * fixed_crops

    def draws(self, number: int) -> NDArray[np.float64]:
        """See `EpochPlan.draws`."""
        return _fixed_draws(self._length, self._seed, number // self.steps)[self.rows(number)]


_AUGMENTED = 0xA06
"""Tells the seeds of augmentations from the draws of crops."""

_FIXED = 0xC407
"""Distinguishes the random draws of fixed crops from an epoch's draws."""


@functools.lru_cache(maxsize=2)
def _fixed_draws(length: int, seed: int, crop: int) -> NDArray[np.float64]:
    """(N, 5) from [0, 1): what `EpochPlan.draws` gives for each row's fixed crop of this number."""
    return np.random.default_rng([seed, _FIXED, crop, 0]).random((length, 5))


def _collect(
    data: ImageSet,
    rows: NDArray[np.int64],
    view: Callable[[Image.Image, int], NDArray[np.uint8]],
    side: int,
) -> Batch:
    """These rows; `view` maps an image and its place in the batch to (side, side, 3)."""
    squares = np.empty((len(rows), side, side, 3), np.uint8)
    kept: list[int] = []
    failures: list[str] = []
    for place, row in enumerate(rows):
        try:
            squares[len(kept)] = view(data.image(int(row)), place)
            kept.append(int(row))
        except DecodeError as exc:
            failures.append(str(exc))
    images = torch.from_numpy(squares[: len(kept)]).permute(0, 3, 1, 2)
    indices = np.array(kept, np.int64)
    labels = torch.from_numpy(data.labels[indices])
    return Batch(images, labels, tuple(failures), rows=torch.from_numpy(indices))


class TrainingBatches(Dataset[Batch]):
    """The batches of one epoch: each is decoded, cropped and flipped when it is asked for.

    What an item holds follows from seed, epoch and its number alone, whatever the number of workers, so a resumed
    run sees the batches that the unbroken one saw. The last, smaller batch of an epoch is left out.

    Args:
        side: S, the side of the square crops in pixels.
        plan: the plan of the epoch, for the same data.
        augmentation: changes the crops.
    """

    def __init__(self, data: ImageSet, side: int, plan: EpochPlan, augmentation: Augmentation | None = None) -> None:
        self._data, self._side, self.plan, self._augmentation = data, side, plan, augmentation

    def __len__(self) -> int:
        return self.plan.batches

    def __getitem__(self, number: int) -> Batch:
        rows, draws = self.plan.rows(number), self.plan.draws(number)
        sizes = self._data.original_sizes(rows)
        boxes, flips = (None, None) if sizes is None else self.plan.crops(draws, sizes)

        def crop(image: Image.Image, place: int) -> NDArray[np.uint8]:
            if sizes is None or boxes is None or flips is None:
                own, flip = self.plan.crops(draws[place : place + 1], np.array([image.size]))
                return self._crop(image, own[0].tolist(), bool(flip[0]))
            x, y = (np.array(image.size) / sizes[place]).tolist()
            left, top, w, h = boxes[place].tolist()
            return self._crop(image, (left * x, top * y, w * x, h * y), bool(flips[place]))

        augmentation = self._augmentation
        if augmentation is None:
            return _collect(self._data, rows, crop, self._side)
        seeds = self.plan.seeds(number).tolist()
        return _collect(
            self._data, rows, lambda image, place: augmentation(crop(image, place), seeds[place]), self._side
        )

    def _crop(self, image: Image.Image, box: Sequence[float], flip: bool) -> NDArray[np.uint8]:
        left, top, w, h = box
        size = (self._side, self._side)
        square = np.asarray(image.resize(size, Image.Resampling.BILINEAR, box=(left, top, left + w, top + h)))
        return square[:, ::-1] if flip else square


class EvaluationBatches(Dataset[Batch]):
    """All images once, in order, through the preprocessing contract's resize and centre crop."""

    def __init__(self, data: ImageSet, batch_size: int, contract: Preprocessing) -> None:
        self._data, self._batch_size, self._contract = data.decoded_by(contract.version), batch_size, contract

    def __len__(self) -> int:
        return math.ceil(len(self._data) / self._batch_size)

    def __getitem__(self, number: int) -> Batch:
        stop = min((number + 1) * self._batch_size, len(self._data))
        rows = np.arange(number * self._batch_size, stop)
        contract = self._contract
        return _collect(self._data, rows, lambda image, _: resize_and_crop(image, contract), contract.image_size)


class _Guarded(Dataset[Item | RobustFeatError]):
    """The items of a dataset; an item that cannot be made is the error, of which PyTorch would pass on the text."""

    def __init__(self, batches: Dataset[Item]) -> None:
        self._batches = batches

    def __getitem__(self, number: int) -> Item | RobustFeatError:
        try:
            return self._batches[number]
        except RobustFeatError as exc:
            return exc


def load_batches(
    batches: Dataset[Item], workers: int, numbers: Sequence[int] | None = None, *, pin: bool = False
) -> Iterator[Item]:
    """The items of these numbers (all by default) in order, prepared by `workers` processes (0: in this one).

    Args:
        pin: hand them over in pinned memory, for a GPU.

    Raises:
        TrainingError: a worker died.
        RobustFeatError: what a worker raised.
    """
    raised: RobustFeatError | None = None
    loader = DataLoader(
        _Guarded(batches),
        batch_size=None,
        sampler=range(len(batches)) if numbers is None else numbers,  # type: ignore[arg-type]
        num_workers=workers,
        # Forked workers share the images in memory; other start methods would copy them into each.
        multiprocessing_context="fork" if workers else None,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_leave_signals_to_the_parent,
        pin_memory=pin,
    )
    try:
        for item in loader:
            if isinstance(item, RobustFeatError):
                # Raised outside the loop, where the iterator is gone, and with it the workers: the frames of an error
                # would keep them, and the process would wait for them at its end.
                raised = item
                break
            yield item
    except RuntimeError as exc:
        raise explain_worker(exc) from exc
    if raised:
        raise raised


def explain_worker(exc: RuntimeError) -> Exception:
    """What to raise for an error of PyTorch's: `exc` itself, if it is not that a decoding process died.

    PyTorch raises that wherever the program happens to be, such as within a step or while a file is written.
    """
    if "DataLoader worker" not in str(exc):
        return exc
    return TrainingError(
        "a process that decodes images died (out of memory?)",
        fix="pass fewer `workers`, then resume with `resume=True`",
    )


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ignores signals to the process group, since the parent still needs the workers to finish its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
