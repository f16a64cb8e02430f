"""Before the first step: data, concepts, ranks, device and cache become one value that stays as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from robustfeat.counts import format_count
from robustfeat.errors import DataError, InputError
from robustfeat.files import FileLock
from robustfeat.progress import remark
from robustfeat.system import available_cpus
from robustfeat.training.clusters import Clusters
from robustfeat.training.concepts import ConceptMap, assign_concepts, cluster_count
from robustfeat.training.data.augmentation import Augmentation
from robustfeat.training.data.batches import Batch, EpochPlan, TrainingBatches, load_batches
from robustfeat.training.data.cache import CachedSet, build_cache, cached_batches, require_room
from robustfeat.training.data.folders import UNLABELLED
from robustfeat.training.data.hub_dataset import is_hub_dataset
from robustfeat.training.data.image_set import ImageSet
from robustfeat.training.data.mixing import Examples, mix
from robustfeat.training.data.opening import open_training_data
from robustfeat.training.evaluation.tasks import Task, open_task
from robustfeat.training.loop.device import torch_device
from robustfeat.training.loop.distributed import together
from robustfeat.training.loop.ranks import Ranks
from robustfeat.training.loop.run_folder import require_unused
from robustfeat.training.loop.step import Guidance
from robustfeat.training.recipe import Recipe
from robustfeat.training.teacher import Teacher, open_teacher

__all__ = ["Run", "choose_device", "claim_folder", "fill_cache", "introduce", "prepare_run", "require_cache_room"]

_MOST_DECODERS = 16
_MIXING = 0x313C
"""Distinguishes the random draws of mixtures from the draws of crops."""


class Kept(Protocol):
    """Features of a teacher that were computed beforehand."""

    def features(self, rows: Tensor, epoch: int) -> Tensor:
        """(m, D) float32 of the crops that this epoch shows of these (m,) rows."""


@dataclass(frozen=True)
class Run:
    """A run that can begin: everything that stays the same until it ends.

    Attributes:
        recipe: how it is trained.
        folder: folder of its files.
        ranks, device: where this process runs.
        train_set, validation_set: the images.
        concepts: concepts of the training set's classes.
        data_identity: what a checkpoint keeps of the data: `root`, `fingerprint`, `images`, `validation_images`, and
            the `ranks` that share a batch.
        decoders: processes that decode images.
        loaders: processes that load training batches.
        cache: where squares of `recipe.cache_px` are kept: ram, device or a folder.
        quiet: whether this process prints nothing.
        teacher: the recipe's teacher, if there is one.
        clusters: where they are the concepts.
        kept: the teacher's features, where they are computed once.
        probe: the recipe's, where it has one.
    """

    recipe: Recipe
    folder: Path
    ranks: Ranks
    device: torch.device
    train_set: ImageSet
    validation_set: ImageSet
    concepts: ConceptMap
    data_identity: dict[str, Any]
    decoders: int
    loaders: int
    cache: str
    quiet: bool
    teacher: Teacher | None = None
    clusters: Clusters | None = None
    kept: Kept | None = None
    probe: Task | None = None

    def show(self, batch: Batch, side: int, epoch: int, number: int) -> Examples:
        """The crops of batch `number` of an epoch, for the step and the teacher, mixed if the recipe says so.

        Mixtures are of this rank's part of the batch.
        """
        recipe, examples = self.recipe, Examples(batch.pixels(self.device, side), batch.labels, batch.rows)
        if not (recipe.mixup or recipe.cutmix):
            return examples
        rng = np.random.default_rng([recipe.seed, _MIXING, epoch, number, self.ranks.rank])
        return mix(examples, len(self.train_set.classes), mixup=recipe.mixup, cutmix=recipe.cutmix, rng=rng)

    def guide(self, examples: Examples, epoch: int) -> Guidance:
        """The teacher's features and the clusters of a step's images."""
        of_image, pixels, rows = self.concepts.of_image, examples.pixels, examples.rows
        taught = None
        if self.kept is not None and rows is not None:
            taught = self.kept.features(rows, epoch).to(pixels.device, non_blocking=True)
        elif self.teacher is not None:
            taught = self.teacher.features(pixels)
        return Guidance(
            teacher=taught,
            concepts=None if of_image is None else torch.from_numpy(of_image)[rows],
            shares=examples.shares,
        )

    def epoch_batches(self, epoch: int, side: int, replays: int = 1, *, augmented: bool = True) -> TrainingBatches:
        """This rank's part of an epoch's batches, of crops with this side, `augmented` where the recipe says so."""
        recipe = self.recipe
        plan = EpochPlan(
            self.train_set,
            recipe.batch_size,
            seed=recipe.seed,
            epoch=epoch,
            min_crop_area=recipe.min_crop_area,
            replays=replays,
            fixed_crops=recipe.teacher_crops,
            rank=self.ranks.rank,
            world=self.ranks.world,
        )
        augmentation = None
        if augmented and recipe.augments:
            augmentation = Augmentation(
                trivial_augment=recipe.trivial_augment, erasing=recipe.erasing, fill=recipe.preprocessing().mean
            )
        return TrainingBatches(self.train_set, side, plan, augmentation)

    def load(self, batches: TrainingBatches, numbers: range) -> Iterator[Batch]:
        """Batches from decoding processes; on a GPU with a cache, whole squares that it crops itself.

        It does not augment them.
        """
        on_gpu = self.device.type == "cuda"
        if isinstance(self.train_set, CachedSet) and on_gpu and not self.recipe.augments:
            return cached_batches(self.train_set, batches.plan, numbers, self.device)
        return load_batches(batches, self.loaders, numbers, pin=on_gpu)


def prepare_run(
    data: str | Path,
    recipe: Recipe,
    folder: Path,
    ranks: Ranks,
    device: torch.device,
    *,
    workers: int | None,
    cache: str,
    stream: bool,
    quiet: bool,
) -> Run:
    """Opens the data; see `train` for the arguments, which `check_arguments` has accepted.

    Raises:
        DataError, HubError: the data or the concepts cannot be used.
    """
    train_set, validation_set = open_training_data(
        data,
        val_fraction=recipe.val_fraction,
        seed=recipe.seed,
        parts=recipe.parts,
        stream=stream,
        labels=recipe.labels,
    )
    train_set, validation_set = (
        images.decoded_by(recipe.preprocessing_version) for images in (train_set, validation_set)
    )
    clustered = cluster_count(recipe.concepts) is not None
    if train_set.classes is UNLABELLED and recipe.concepts != "classes" and not clustered:
        raise InputError(
            "names classes, and the images have none",
            argument="concepts",
            value=recipe.concepts,
            fix="pass `concepts=clusters:K`, or `concepts=classes` for a single one",
        )
    largest = max(side for _, side in recipe.image_sizes)
    if 0 < recipe.cache_px < largest:
        remark(
            f"cache_px {recipe.cache_px} is less than the largest training size, {largest}: crops are magnified from "
            "the cache",
            quiet=quiet,
        )
    if len(train_set) < recipe.batch_size:
        raise DataError(
            f"{data}: {len(train_set)} training images, fewer than one batch of {recipe.batch_size}",
            fix="pass a smaller `batch_size`",
        )
    probe = open_task("probe", recipe.probe) if recipe.probe else None
    class_counts = np.bincount(train_set.labels, minlength=len(train_set.classes))
    decoders = max(1, min(_MOST_DECODERS, available_cpus() // ranks.local_world)) if workers is None else workers
    automatic = "device" if device.type == "cuda" and not recipe.augments else "ram"
    return Run(
        recipe=recipe,
        folder=folder,
        ranks=ranks,
        device=device,
        train_set=train_set,
        validation_set=validation_set,
        # Clusters are found later, by `cluster_images`.
        concepts=assign_concepts("classes" if clustered else recipe.concepts, train_set.classes, class_counts),
        data_identity={
            "root": str(data if is_hub_dataset(data) else Path(data).resolve()),
            "fingerprint": train_set.fingerprint,
            "images": len(train_set),
            "validation_images": len(validation_set),
            "ranks": ranks.world,
            **({"probe": f"{probe.train.fingerprint} {probe.test.fingerprint}"} if probe else {}),
        },
        decoders=decoders,
        loaders=1 if recipe.cache_px and workers is None and not recipe.augments else decoders,
        cache=automatic if cache == "auto" else cache,
        quiet=quiet,
        teacher=open_teacher(recipe, device.type) if recipe.teacher else None,
        probe=probe,
    )


@contextmanager
def claim_folder(run: Run, *, resume: bool) -> Iterator[None]:
    """The run's folder, made and locked by the first rank until the block ends; a collective call.

    Raises:
        InputError: it cannot be made or locked, or another process trains there.
        CheckpointError: another process has trained there meanwhile.
    """
    lock = FileLock(run.folder)
    with together():
        if run.ranks.rank == 0:
            try:
                run.folder.mkdir(parents=True, exist_ok=True)
                taken = lock.take()
            except OSError as exc:
                raise InputError(
                    f"cannot be made or locked ({exc.strerror})",
                    argument="out",
                    value=run.folder,
                    fix="choose another folder",
                ) from exc
            if not taken:
                raise InputError(
                    f"{run.folder}: another process is training there{lock.holder_note()}",
                    fix="wait for it, stop it, or choose another `out`",
                )
            if not resume:
                require_unused(run.folder)
    try:
        yield
    finally:
        lock.release()


def introduce(run: Run, data: str | Path) -> None:
    """Prints the data and the network, and the skipped images."""
    recipe = run.recipe
    ranks = f" on {run.ranks.world} ranks" if run.ranks.world > 1 else ""
    inner = f", inner pass {recipe.inner}" if recipe.inner != "full" else ""
    taught = recipe.teacher or (recipe.init if recipe.stable_anchor == "start" else "")
    lines = [f"learns the features of {taught}" + ("" if recipe.labels else ", without labels")]
    lines = [
        *(lines if taught else ()),
        f"{len(run.train_set):,} training and {len(run.validation_set):,} validation images, "
        f"{format_count(len(run.train_set.classes), 'class')}, {format_count(len(run.concepts.names), 'concept')}; "
        f"{recipe.method} on {run.device.type}{ranks}, {recipe.precision}{inner}, "
        f"{format_count(recipe.epochs, 'epoch')}",
        *dict.fromkeys(run.train_set.remarks + run.validation_set.remarks),
    ]
    if run.probe:
        lines.append(
            f"probe: {recipe.probe_classifier} on {len(run.probe.train):,} training and {len(run.probe.test):,} test "
            f"images in {format_count(len(run.probe.train.classes), 'class')}"
        )
        lines += run.probe.remarks
    if recipe.parts and not is_hub_dataset(data) and not any(Path(data).glob("train-*")):
        lines.append(f"parts = {recipe.parts}: {data} is not in Parquet files or shards, all of its images are used")
    if run.concepts.empty:
        lines.append(f"concepts without examples here, left out: {', '.join(run.concepts.empty)}")
    for line in lines:
        remark(line, quiet=run.quiet)


def require_cache_room(run: Run) -> None:
    """The decoded cache, where the recipe has one, fits its place.

    Raises:
        DataError, InputError: it does not.
    """
    if run.recipe.cache_px:
        processes = run.ranks.local_world
        require_room(run.train_set, run.recipe.cache_px, run.cache, device=run.device, processes=processes)


def fill_cache(run: Run) -> Run:
    """The run with its training images decoded, where the recipe says so."""
    if not run.recipe.cache_px:
        return run
    # A folder is filled by one process of the machine while the others wait.
    helpers = run.ranks.local_world if run.cache not in {"ram", "device"} else 1
    cached = build_cache(
        run.train_set,
        run.recipe.cache_px,
        run.cache,
        device=run.device,
        workers=run.decoders * helpers,
        quiet=run.quiet,
    )
    return replace(run, train_set=cached)


def choose_device(name: str, ranks: Ranks) -> torch.device:
    """The device of this process: on a machine with several GPUs, each process has its own.

    Raises:
        InputError: there is no such device, or there are fewer GPUs than processes.
    """
    device = torch_device(name)
    if device.type == "cpu":
        return device
    if ranks.local_rank >= torch.cuda.device_count():
        raise InputError(
            f"torchrun started {ranks.local_world} processes here and this machine has {torch.cuda.device_count()} "
            "GPUs",
            fix="start one process per GPU, or pass `device=cpu`",
        )
    device = torch.device("cuda", ranks.local_rank)
    torch.cuda.set_device(device)
    return device
