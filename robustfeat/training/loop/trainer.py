"""Training on a CPU, a GPU or several: epochs, checkpoints, exact resume, what is said on the way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import distributed

from robustfeat.errors import (
    CheckpointError,
    DataError,
    DivergedError,
    InputError,
    RobustFeatError,
    StoppedError,
    TrainingError,
)
from robustfeat.files import new_file
from robustfeat.progress import Progress, clock, remark
from robustfeat.system import available_cpus
from robustfeat.training.concepts import assign_concepts
from robustfeat.training.data.batches import Batch, EpochPlan, EvaluationBatches, TrainingBatches, load_batches
from robustfeat.training.data.cache import CachedSet, build_cache, cached_batches, require_room
from robustfeat.training.data.hub_dataset import is_hub_dataset
from robustfeat.training.data.opening import are_class_folders, open_training_data
from robustfeat.training.loop.checkpoint import (
    CHECKPOINT_NAME,
    Checkpoint,
    load_checkpoint,
    require_same_run,
    save_checkpoint,
)
from robustfeat.training.loop.curves import CURVES_NAME, draw_curves
from robustfeat.training.loop.device import torch_device
from robustfeat.training.loop.distributed import Ranks, gather_objects, join_group, raise_together, sum_over_ranks
from robustfeat.training.loop.journal import METRICS_NAME, Journal, Window
from robustfeat.training.loop.signals import StopRequest, stop_on_signal
from robustfeat.training.loop.step import TrainingStep
from robustfeat.training.recipe import RECIPE_NAME, Recipe
from robustfeat.training.target import estimate_reference

__all__ = ["TrainingResult", "train"]

_LOG_EVERY_STEPS = 50
_MAX_BAD_SHARE = 0.01
_HEAVY_WEIGHT = 10.0


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended.

    Attributes:
        run: its folder.
        validation_accuracy: share of validation images classified correctly by the last epoch's parameters.
        bad_images: the images that could not be decoded and were left out.
        stopped: a signal came when nothing was left to train.
    """

    run: Path
    validation_accuracy: float
    bad_images: tuple[str, ...]
    stopped: bool = False


def train(
    data: str | Path,
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    device: str = "auto",
    workers: int | None = None,
    threads: int | None = None,
    cache: str = "auto",
    stream: bool = False,
    target: str | None = None,
    target_model: str = "builtin",
    checkpoint_every_s: float = 300.0,
    quiet: bool = False,
) -> TrainingResult:
    """Trains by `recipe` on `data` into the folder `out`; started by torchrun, together with the other ranks.

    Args:
        data: see `open_training_data`.
        out: gets `checkpoint.pt`, `metrics.jsonl`, `recipe.toml`, `curves.png` and `tensorboard/`.
        resume: go on from the checkpoint in `out`; the recipe and the data must be the same.
        device: auto, cpu or cuda.
        workers: processes that decode images; by default one for each processor, at most 16, and 1 for images that a
            cache has decoded.
        threads: processors for the network; by default all that the cgroup grants. Ranks on one machine share both.
        cache: where the squares of `recipe.cache_px` are kept: ram, device (the GPU), a folder, or auto (device or
            ram). Nothing is cached where that is 0.
        target, target_model: images from which this model estimates the recipe's `reference`; see `estimate_reference`.
        stream: read the Parquet files of a dataset of the Hub over the network, each epoch anew.
        checkpoint_every_s: also within an epoch; one is written after each epoch in any case.

    Raises:
        DataError, CheckpointError, InputError: see the messages.
        DivergedError: the loss is no longer finite.
        StoppedError: a signal stopped the run (its state is saved).
    """
    ranks = Ranks.from_environment()
    chosen = _choose_device(device, ranks)
    torch.set_num_threads(threads or max(1, available_cpus() // ranks.local_world))
    if not checkpoint_every_s >= 0:
        raise InputError(f"--checkpoint-every-s {checkpoint_every_s}: expected seconds, 0 or more")
    with join_group(ranks, chosen):
        if target is not None:
            recipe = recipe.replace(reference=_agree_on_reference(target, target_model, recipe, ranks, quiet))
        trainer = _Trainer(data, recipe, Path(out), ranks, chosen, workers, cache, quiet or ranks.rank > 0)
        try:
            with _together():
                saved = trainer.prepare(resume, stream)
            with _together():
                trainer.fill_cache()
            return trainer.run(saved, checkpoint_every_s)
        except torch.OutOfMemoryError as exc:
            raise TrainingError(
                "the GPU's memory does not suffice; pass a smaller --batch-size, --precision bf16, or another --cache"
            ) from exc


def _agree_on_reference(target: str, model: str, recipe: Recipe, ranks: Ranks, quiet: bool) -> dict[str, float]:
    """One rank looks at the target's images; all take its numbers."""
    shares: dict[str, float] = {}
    with _together():
        if ranks.rank == 0:
            shares = estimate_reference(target, recipe.concepts, model)
            told = ", ".join(f"{name} {share:.3f}" for name, share in shares.items())
            remark(f"q0 of {target}: {told}", quiet=quiet)
    first: dict[str, float] = gather_objects(shares)[0]
    return first


@contextmanager
def _together() -> Iterator[None]:
    """An error within the block ends all ranks, and one of them says it."""
    error: RobustFeatError | None = None
    try:
        yield
    except RobustFeatError as exc:
        error = exc
    raise_together(error)


class _Trainer:
    def __init__(
        self,
        data: str | Path,
        recipe: Recipe,
        out: Path,
        ranks: Ranks,
        device: torch.device,
        workers: int | None,
        cache: str,
        quiet: bool,
    ) -> None:
        self.data, self.recipe, self.out, self.ranks, self.device, self.quiet = data, recipe, out, ranks, device, quiet
        self.decoders = max(1, min(16, available_cpus() // ranks.local_world)) if workers is None else workers
        self.loaders = 1 if recipe.cache_px and workers is None else self.decoders
        self.cache_asked = cache != "auto"
        self.cache = ("device" if device.type == "cuda" else "ram") if cache == "auto" else cache
        self.progress = Progress("", 0, quiet=quiet)
        self.epoch = self.step = self.global_step = self.saved_step = 0
        self.bad_images: dict[str, set[str]] = {"training": set(), "validation": set()}
        self._note = ""
        self._last_metrics: dict[str, Any] = {}

    def prepare(self, resume: bool, stream: bool) -> Checkpoint | None:
        """All that can be wrong without the other ranks, before anything that takes long; the checkpoint, if any."""
        recipe, world = self.recipe, self.ranks.world
        if recipe.batch_size % world or recipe.batch_size < 2 * world:
            raise InputError(
                f"--batch-size {recipe.batch_size}: is shared by {world} processes and must be a multiple of that, "
                "at least 2 for each"
            )
        if stream and not is_hub_dataset(self.data):
            raise InputError(f"--stream: {self.data} is not on the Hub; expected hf://datasets/ORG/NAME")
        self.train_set, self.validation_set = open_training_data(
            self.data, val_fraction=recipe.val_fraction, seed=recipe.seed, parts=recipe.parts, stream=stream
        )
        if Path(self.data).resolve() in self.out.resolve().parents and are_class_folders(self.data):
            raise InputError(
                f"--out {self.out}: lies in DATA, where it would be taken for a class; choose another folder"
            )
        if self.cache_asked and not recipe.cache_px:
            raise InputError(f"--cache {self.cache}: caches squares of --cache-px, which is 0; pass both or neither")
        if 0 < recipe.cache_px < max(side for _, side in recipe.image_sizes):
            self.progress.say(
                f"--cache-px {recipe.cache_px} is less than the largest training size: crops are magnified from it"
            )
        if len(self.train_set) < recipe.batch_size:
            raise DataError(
                f"{self.data}: {len(self.train_set)} training images, fewer than one batch of {recipe.batch_size}; "
                "pass a smaller --batch-size"
            )
        classes = self.train_set.classes
        class_counts = np.bincount(self.train_set.labels, minlength=len(classes))
        self.concepts = assign_concepts(recipe.concepts, classes, class_counts)
        self.data_identity: dict[str, Any] = {
            "root": str(self.data if is_hub_dataset(self.data) else Path(self.data).resolve()),
            "fingerprint": self.train_set.fingerprint,
            "images": len(self.train_set),
            "validation_images": len(self.validation_set),
            "ranks": self.ranks.world,
        }
        self.train_step = TrainingStep(recipe, self.concepts, self.device, self.ranks)
        if recipe.cache_px:
            processes = self.ranks.local_world
            require_room(self.train_set, recipe.cache_px, self.cache, device=self.device, processes=processes)
        saved = self._find_checkpoint(resume)
        self._introduce()
        return saved

    def fill_cache(self) -> None:
        """Decodes, where the recipe says so."""
        if self.recipe.cache_px:
            # A folder is filled by one process of the machine while the others wait.
            helpers = self.ranks.local_world if self.cache not in {"ram", "device"} else 1
            self.train_set = build_cache(
                self.train_set,
                self.recipe.cache_px,
                self.cache,
                device=self.device,
                workers=self.decoders * helpers,
                quiet=self.quiet,
            )

    def run(self, saved: Checkpoint | None, checkpoint_every_s: float) -> TrainingResult:
        """Trains to the end of the recipe, from a checkpoint or from the beginning."""
        self.train_step.distribute()
        if saved is not None:
            self._restore(saved)
        else:
            # At once: a run that is killed before its first epoch ends can then be resumed, too.
            self._save()
        self.journal = None
        if self.ranks.rank == 0:
            with new_file(self.out / RECIPE_NAME) as partial:
                partial.write_text(self.recipe.to_toml(), "utf-8")
            self.journal = Journal(self.out, self.global_step, self.concepts.names)
        accuracy = float("nan")
        try:
            with stop_on_signal() as stop:
                while self.epoch < self.recipe.epochs:
                    accuracy = self._run_epoch(stop, checkpoint_every_s)
            if np.isnan(accuracy):  # resumed after the last epoch
                accuracy = self._validate()[1]
        finally:
            if self.journal is not None:
                self.journal.close()
        if self.ranks.rank == 0:
            draw_curves(self.out, self.concepts.names)
            self.progress.say(f"{self.out / CURVES_NAME} shows loss, accuracy and the path of q")
        bad_images = tuple(sorted(set().union(*self.bad_images.values())))
        return TrainingResult(self.out, accuracy, bad_images, stop.requested)

    def _restore(self, saved: Checkpoint) -> None:
        parts = ("model", "optimizer", "objective", "scaler")
        self.train_step.load_state_dict({name: getattr(saved, name) for name in parts})
        self.epoch, self.step, self.global_step = saved.epoch, saved.step, saved.global_step
        self.saved_step = saved.global_step
        for split, lines in saved.bad_images.items():
            self.bad_images[split].update(lines)
        before = saved.data.get("ranks", 1)
        if before != self.ranks.world:
            self.progress.say(
                f"was trained on {before} ranks, goes on with {self.ranks.world}: BatchNorm's statistics and random "
                "directions differ from those of an unbroken run"
            )

    def _introduce(self) -> None:
        recipe, say = self.recipe, self.progress.say
        ranks = f" on {self.ranks.world} ranks" if self.ranks.world > 1 else ""
        inner = f", inner pass {recipe.inner}" if recipe.inner != "full" else ""
        say(
            f"{len(self.train_set):,} training and {len(self.validation_set):,} validation images, "
            f"{len(self.train_set.classes)} classes, {len(self.concepts.names)} concepts; "
            f"{recipe.method} on {self.device.type}{ranks}, {recipe.precision}{inner}, {recipe.epochs} epochs"
        )
        for line in dict.fromkeys(self.train_set.remarks + self.validation_set.remarks):
            say(line)
        if recipe.parts and not is_hub_dataset(self.data) and not any(Path(self.data).glob("train-*")):
            say(f"parts = {recipe.parts}: {self.data} is not in Parquet files or shards, all of its images are used")
        if self.concepts.empty:
            say(f"concepts without examples here, left out: {', '.join(self.concepts.empty)}")

    def _run_epoch(self, stop: StopRequest, checkpoint_every_s: float) -> float:
        recipe, side, replays = self.recipe, self.recipe.image_size(self.epoch), self.train_step.objective.replays
        batches = self._batches(self.epoch, side, replays)
        steps = batches.plan.steps
        self.progress = Progress(
            f"epoch {self.epoch + 1}/{recipe.epochs} at {side} px",
            steps * recipe.batch_size,
            start=self.step * recipe.batch_size,
            quiet=self.quiet,
        )
        saved_at = time.monotonic()
        window = Window(self.device)
        self.train_step.train()
        for batch in self._load(batches, range(self.step // replays, len(batches))):
            due = time.monotonic() - saved_at > checkpoint_every_s
            total, least, stopping, due = self._agree(batch, stop.requested, due, window)
            times = min(replays, steps - self.step)
            pixels = batch.pixels(self.device, side)
            for replay in range(times):
                at = self.epoch + self.step / steps
                if least > 1:  # BatchNorm needs two
                    self._train_step(batch, pixels, at, replay, total, window)
                self.step += 1
                self.global_step += 1
                last = self.step == steps
                saving = replay + 1 == times and (due or stopping)
                if last or saving or self.global_step % _LOG_EVERY_STEPS == 0:
                    self._log_window(window, side, at, steps)
                    window = Window(self.device)
                self.progress.advance(recipe.batch_size, self._note)
                if saving and not last:
                    self._save()
                    saved_at = time.monotonic()
                    if stopping:
                        self._end_early()
        self.epoch, self.step = self.epoch + 1, 0
        accuracy = self._end_epoch()
        if self.epoch < recipe.epochs and max(gather_objects(stop.requested)):
            self._end_early()
        return accuracy

    def _batches(self, epoch: int, side: int, replays: int = 1) -> TrainingBatches:
        recipe = self.recipe
        plan = EpochPlan(
            self.train_set,
            recipe.batch_size,
            seed=recipe.seed,
            epoch=epoch,
            min_crop_area=recipe.min_crop_area,
            replays=replays,
            rank=self.ranks.rank,
            world=self.ranks.world,
        )
        return TrainingBatches(self.train_set, side, plan)

    def _load(self, batches: TrainingBatches, numbers: range) -> Iterator[Batch]:
        """Batches from decoding processes; on a GPU with a cache, whole squares that it crops itself."""
        if isinstance(self.train_set, CachedSet) and self.device.type == "cuda":
            return cached_batches(self.train_set, batches.plan, numbers, self.device)
        return load_batches(batches, self.loaders, numbers, pin=self.device.type == "cuda")

    def _agree(self, batch: Batch, stop: bool, due: bool, window: Window) -> tuple[int, int, bool, bool]:
        """What all ranks must know before a step: total and least size, whether to stop, whether to save.

        Raises:
            DivergedError: a loss was not finite. On a GPU that is looked at only when the window is logged.
            DataError: too many images are bad.
        """
        bad = window.first_bad_step() if self.device.type == "cpu" else None
        told = torch.tensor([
            len(batch.labels), stop, due and self.ranks.rank == 0, len(batch.failures), bad is not None
        ])  # fmt: skip
        if self.ranks.world > 1:
            parts = [torch.empty_like(told) for _ in range(self.ranks.world)]
            distributed.all_gather(parts, told)
        else:
            parts = [told]
        sizes, stops, dues, failures, diverged = torch.stack(parts).T.tolist()
        if any(diverged):
            self._check_finite(window)
        if any(failures):
            self._note_failures(batch.failures, "training", len(self.train_set))
        return sum(sizes), min(sizes), any(stops), any(dues)

    def _train_step(
        self, batch: Batch, pixels: torch.Tensor, epoch: float, replay: int, total: int, window: Window
    ) -> None:
        try:
            result = self.train_step(pixels, batch.labels, epoch, self.global_step, replay=replay, total=total)
        except DivergedError as exc:
            self._diverged(self.global_step, str(exc))
        window.add(result, self.global_step)

    def _end_epoch(self) -> float:
        """Validates, logs, recalibrates after the last epoch, saves."""
        loss, accuracy = self._validate()
        self._check_validation(loss)
        self._write("epoch", epoch=self.epoch, validation_loss=round(loss, 5), validation_accuracy=round(accuracy, 5))
        if self.epoch == self.recipe.epochs and self.recipe.recalibrate:
            before = accuracy
            self._recalibrate()
            loss, accuracy = self._validate()
            self._check_validation(loss)
            numbers = {"validation_loss": round(loss, 5), "validation_accuracy": round(accuracy, 5)}
            self._write("recalibrated", epoch=self.epoch, **numbers)
            self.progress.say(f"BatchNorm recalibrated: validation accuracy {before:.2%} to {accuracy:.2%}")
        self.progress.finish(f"validation accuracy {accuracy:.2%}")
        self._save()
        return accuracy

    def _recalibrate(self) -> None:
        recipe, side = self.recipe, self.recipe.image_size(self.recipe.epochs - 1)
        batches = self._batches(recipe.epochs, side)
        loaded = self._load(batches, range(min(recipe.recalibrate, len(batches))))
        self.train_step.recalibrate(batch.pixels(self.device, side) for batch in loaded if len(batch.labels))

    def _validate(self) -> tuple[float, float]:
        """Mean loss and accuracy on the validation images; each rank counts its batches, and the sums are exact."""
        contract = self.recipe.preprocessing()
        batches = EvaluationBatches(self.validation_set, 256, contract)
        numbers = range(self.ranks.rank, len(batches), self.ranks.world)
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        failures: list[str] = []
        self.train_step.network.eval()
        for batch in load_batches(batches, self.decoders, numbers, pin=self.device.type == "cuda"):
            failures.extend(batch.failures)
            if len(batch.labels):
                loss, correct = self.train_step.evaluate(batch.pixels(self.device, contract.image_size), batch.labels)
                sums += torch.stack([loss, correct.double(), torch.full_like(loss, len(batch.labels))])
        self._note_failures(tuple(failures), "validation", len(self.validation_set))
        loss_sum, correct_sum, count = sum_over_ranks(sums).tolist()
        if not count:
            raise DataError(f"{self.data_identity['root']}: none of the validation images can be decoded")
        return loss_sum / count, correct_sum / count

    def _note_failures(self, failures: tuple[str, ...], split: str, total: int) -> None:
        """Names new bad images of any rank; a collective call."""
        bad = self.bad_images[split]
        for line in (line for lines in gather_objects(failures) for line in lines):
            if line not in bad:
                bad.add(line)
                self.progress.say(f"left out: {line}")
        if len(bad) > max(10, _MAX_BAD_SHARE * total):
            self._fail(
                DataError(
                    f"{len(bad)} {split} images cannot be decoded, over 1 % of {total}; "
                    f"first {min(bad)}; repair or remove them, then train again"
                )
            )

    def _log_window(self, window: Window, side: int, epoch: float, steps: int) -> None:
        self._check_finite(window)
        numbers = window.numbers(self.ranks.world)
        if numbers is None:
            return
        objective = self.train_step.objective
        told = objective.metrics()
        self._last_metrics = {**numbers, **told}
        note = [f"loss {numbers['loss']:.3f}", f"accuracy {numbers['accuracy']:.1%}"]
        if "heaviest" in told:
            note.append(
                f"weights {told['weight_min']:.2f} {told['lightest']} to {told['weight_max']:.2f} {told['heaviest']}"
            )
        pixels = sum(self.recipe.image_size(later) ** 2 for later in range(self.epoch + 1, self.recipe.epochs)) * steps
        left = pixels / side**2 + steps - self.step
        note.append(f"run {clock(left * self.recipe.batch_size / max(numbers['images_per_s'], 1e-9))} left")
        self._note = ", ".join(note)
        self._write(
            "train",
            epoch=round(epoch, 5),
            image_size=side,
            lr=round(self.recipe.learning_rate(epoch), 8),
            tau=round(objective.tau(side, epoch), 6),
            **numbers,
            **told,
        )

    def _write(self, event: str, **numbers: Any) -> None:
        if self.journal is not None:
            self.journal.write(event, self.global_step, numbers)

    def _check_finite(self, window: Window) -> None:
        """Ends all ranks when one saw a loss that is not finite; a collective call."""
        steps = [step for step in gather_objects(window.first_bad_step()) if step is not None]
        if steps:
            self._diverged(min(steps), "the loss is not finite")

    def _check_validation(self, loss: float) -> None:
        if not np.isfinite(loss):
            self._diverged(self.global_step, f"the validation loss is {loss}")

    def _diverged(self, step: int, reason: str) -> NoReturn:
        self._fail(
            DivergedError(
                f"training diverged at step {step} ({reason}); likely cause: {self._likely_cause()}. "
                f"{self.out / CHECKPOINT_NAME} is intact, of step {self.saved_step}; start anew with the change, "
                "in another --out"
            )
        )

    def _likely_cause(self) -> str:
        recipe, last = self.recipe, self._last_metrics
        if last.get("weight_max", 0) >= _HEAVY_WEIGHT:
            return (
                f"an example of concept {last.get('heaviest')} weighed {last['weight_max']:.1f} times as much as at "
                "the start; try a larger --lambda or a smaller --lr"
            )
        if recipe.precision == "fp16":
            return "numbers beyond fp16's range; try --precision bf16"
        tau = self.train_step.objective.tau_at_224px
        strong = f", or a smaller --tau than {tau:g}" if tau > 3 else ""
        return f"a learning rate of {recipe.lr:g} is too high; try a smaller --lr{strong}"

    def _fail(self, error: RobustFeatError) -> NoReturn:
        """All ranks are here with the same error: rank 0 says it."""
        raise_together(error)
        raise error

    def _end_early(self) -> NoReturn:
        self._fail(StoppedError(f"stopped; {self.out / CHECKPOINT_NAME} is up to date: go on with --resume"))

    def _save(self) -> None:
        if self.ranks.rank == 0:
            save_checkpoint(
                Checkpoint(
                    recipe=self.recipe.to_dict(),
                    data=self.data_identity,
                    classes=list(self.train_set.classes),
                    concepts=list(self.concepts.names),
                    concept_of_class=self.concepts.of_class.tolist(),
                    epoch=self.epoch,
                    step=self.step,
                    global_step=self.global_step,
                    bad_images={split: sorted(lines) for split, lines in self.bad_images.items()},
                    **self.train_step.state_dict(),
                ),
                self.out,
            )
        self.saved_step = self.global_step
        gather_objects(None)  # none goes on, and above all none ends, before the file is whole

    def _find_checkpoint(self, resume: bool) -> Checkpoint | None:
        """The checkpoint to go on from, if any; makes the run's folder."""
        if resume:
            saved = load_checkpoint(self.out)
            require_same_run(saved, self.out, self.recipe, self.data_identity, self.concepts)
            return saved
        if self.ranks.rank == 0:
            try:
                taken = (self.out / CHECKPOINT_NAME).exists() or (self.out / METRICS_NAME).exists()
                if not taken:
                    self.out.mkdir(parents=True, exist_ok=True)
            except OSError as exc:
                raise InputError(f"--out {self.out}: cannot be made ({exc.strerror}); choose another folder") from exc
            if taken:
                raise CheckpointError(
                    f"{self.out}: holds a run already; pass --resume to go on with it or choose another --out"
                )
        return None


def _choose_device(name: str, ranks: Ranks) -> torch.device:
    device = torch_device(name)
    if device.type == "cpu":
        return device
    if ranks.local_rank >= torch.cuda.device_count():
        raise InputError(
            f"--nproc-per-node {ranks.local_world}: this machine has {torch.cuda.device_count()} GPUs; start one "
            "process for each, or pass --device cpu"
        )
    device = torch.device("cuda", ranks.local_rank)
    torch.cuda.set_device(device)
    return device
