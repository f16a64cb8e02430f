"""The loop over epochs and steps."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import numpy as np
import torch

from robustfeat.errors import DivergedError
from robustfeat.training.data.batches import Batch
from robustfeat.training.data.mixing import Examples
from robustfeat.training.evaluation.probes import Score
from robustfeat.training.loop.bad_images import BadImages
from robustfeat.training.loop.checkpoint import Position
from robustfeat.training.loop.distributed import fail_together, gather_objects, gather_tensors
from robustfeat.training.loop.divergence import explain_divergence
from robustfeat.training.loop.journal import Window
from robustfeat.training.loop.preparation import Run
from robustfeat.training.loop.probing import probe
from robustfeat.training.loop.report import Report
from robustfeat.training.loop.saving import Saver
from robustfeat.training.loop.signals import StopRequest
from robustfeat.training.loop.step import Group, Guidance, TrainingStep
from robustfeat.training.loop.validation import validate

__all__ = ["EpochLoop"]

_LOG_EVERY_STEPS = 50


@dataclass(frozen=True)
class _Agreement:
    """State that all ranks share before a step.

    Attributes:
        total, least: images of all ranks, and of the rank with the fewest.
        stopping: whether a rank was asked to stop.
        due: whether a checkpoint is due.
    """

    total: int
    least: int
    stopping: bool
    due: bool


class EpochLoop:
    """Trains epoch by epoch, and validates, logs and saves after each.

    Args:
        run: the run.
        step: makes the steps.
        position: where the run stands.
        report, saver, bad_images: the run's report, saver and bad images.
        stop: asks for the end after a step.
        checkpoint_every_s: seconds between checkpoints within an epoch.

    Attributes:
        probe_accuracy: accuracy of the recipe's probe after the last epoch; None before it, and without a probe.
    """

    def __init__(
        self,
        run: Run,
        step: TrainingStep,
        position: Position,
        report: Report,
        saver: Saver,
        bad_images: BadImages,
        stop: StopRequest,
        checkpoint_every_s: float,
    ) -> None:
        self._run, self._step, self._position = run, step, position
        self._report, self._saver, self._bad_images = report, saver, bad_images
        self._stop, self._checkpoint_every_s = stop, checkpoint_every_s
        self.probe_accuracy: float | None = None

    def train(self) -> float:
        """Trains to the end of the recipe, and returns the last validation accuracy.

        Raises:
            DivergedError: a loss is not finite.
            DataError: too many images are bad.
            StoppedError: a signal stopped the run, which is saved.
        """
        if self._position.epoch >= self._run.recipe.epochs:  # resumed after the last epoch
            self._probe()
            return self._validate()[1]
        accuracy = float("nan")
        while self._position.epoch < self._run.recipe.epochs:
            self._train_epoch()
            accuracy = self._end_epoch()
            if self._position.epoch < self._run.recipe.epochs and max(gather_objects(self._stop.requested)):
                self._saver.stop()
        return accuracy

    def _train_epoch(self) -> None:
        run, epoch, replays = self._run, self._position.epoch, self._step.objective.replays
        side = run.recipe.image_size(epoch)
        batches = run.epoch_batches(epoch, side, replays)
        steps = batches.plan.steps
        self._report.begin_epoch(self._position, side, steps)
        saved_at = time.monotonic()
        window = Window(run.device)
        self._step.train(epoch)
        first = self._position.step // replays
        for number, batch in enumerate(run.load(batches, range(first, len(batches))), first):
            due = time.monotonic() - saved_at > self._checkpoint_every_s
            agreed = self._agree(batch, due, window)
            times = min(replays, steps - self._position.step)
            examples = run.show(batch, side, epoch, number)
            guidance = run.guide(examples, epoch)
            for replay in range(times):
                at = epoch + self._position.step / steps
                group = self._group(steps)
                if agreed.least > 1:  # BatchNorm needs two
                    self._make_step(examples, at, replay, agreed.total, window, guidance, group)
                elif group.ends:
                    self._step.update(at)
                self._position = self._position.after_step()
                last = self._position.step == steps
                saving = replay + 1 == times and group.ends and (agreed.due or agreed.stopping)
                if last or saving or self._position.global_step % _LOG_EVERY_STEPS == 0:
                    self._log(window, side, at, steps)
                    window = Window(run.device)
                self._report.advance()
                if saving and not last:
                    self._saver.save(self._position)
                    saved_at = time.monotonic()
                    if agreed.stopping:
                        self._saver.stop()
        self._position = self._position.after_epoch()

    def _group(self, steps: int) -> Group:
        """The group of the batch at hand, of an epoch of so many steps: its last group may be smaller."""
        at, most = self._position.step, self._run.recipe.accumulate
        size = min(most, steps - at // most * most)
        return Group(size, at % most + 1 == size)

    def _agree(self, batch: Batch, due: bool, window: Window) -> _Agreement:
        """A collective call before each batch.

        Raises:
            DivergedError: a loss was not finite. On a GPU this is checked only when the window is logged.
            DataError: too many images are bad.
        """
        bad = window.first_bad_step() if self._run.device.type == "cpu" else None
        told = torch.tensor([
            len(batch.labels), self._stop.requested, due and self._run.ranks.rank == 0, len(batch.failures),
            bad is not None,
        ])  # fmt: skip
        sizes, stops, dues, failures, diverged = gather_tensors(told).T.tolist()
        if any(diverged):
            self._require_finite(window)
        if any(failures):
            self._report_failures("training", batch.failures, len(self._run.train_set))
        return _Agreement(sum(sizes), min(sizes), any(stops), any(dues))

    def _make_step(
        self,
        examples: Examples,
        epoch: float,
        replay: int,
        total: int,
        window: Window,
        guidance: Guidance,
        group: Group,
    ) -> None:
        number = self._position.global_step
        try:
            result = self._step(
                examples.pixels, examples.labels, epoch, number, replay=replay, total=total, guidance=guidance,
                group=group,
            )  # fmt: skip
        except DivergedError as exc:
            self._diverge(number, str(exc))
        window.add(result, number)

    def _end_epoch(self) -> float:
        """Validates, logs, recalibrates after the last epoch, probes and saves. Returns the validation accuracy."""
        recipe, position = self._run.recipe, self._position
        loss, accuracy = self._validate()
        self._report.write_validation("epoch", position, loss, accuracy)
        if position.epoch == recipe.epochs and recipe.recalibrate:
            before = accuracy
            self._recalibrate()
            loss, accuracy = self._validate()
            self._report.write_validation("recalibrated", position, loss, accuracy)
            if recipe.labels:
                self._report.say(f"BatchNorm recalibrated: validation accuracy {before:.2%} to {accuracy:.2%}")
        probed = self._probe()
        if probed is not None:
            numbers = {"accuracy": round(probed.accuracy, 5), "balanced_accuracy": round(probed.balanced_accuracy, 5)}
            self._report.write("probe", position, epoch=position.epoch, classifier=recipe.probe_classifier, **numbers)
        probe_accuracy = None if probed is None else probed.accuracy
        self._report.finish_epoch(loss, accuracy, probe_accuracy)
        known = accuracy if recipe.labels else -loss
        score = {"none": None, "validation": known, "probe": probe_accuracy}[recipe.best]
        if score is not None:
            self._saver.save_if_best(position, score)
        self._saver.save(position)
        return accuracy

    def _probe(self) -> Score | None:
        """The score of the recipe's probe, if it has one and it is due after this epoch."""
        recipe, position = self._run.recipe, self._position
        if not recipe.probe or (position.epoch % recipe.probe_every and position.epoch < recipe.epochs):
            return None
        score = probe(self._run, self._step, partial(self._report_failures, "probe"))
        self.probe_accuracy = score.accuracy if position.epoch >= recipe.epochs else None
        return score

    def _recalibrate(self) -> None:
        run, recipe = self._run, self._run.recipe
        side = recipe.image_size(recipe.epochs - 1)
        batches = run.epoch_batches(recipe.epochs, side, augmented=False)
        loaded = run.load(batches, range(min(recipe.recalibrate, len(batches))))
        self._step.recalibrate(batch.pixels(run.device, side) for batch in loaded if len(batch.labels))

    def _validate(self) -> tuple[float, float]:
        """Mean loss, which is finite, and accuracy; see `validate`."""
        images = len(self._run.validation_set)
        loss, accuracy = validate(
            self._run, self._step, lambda failures: self._report_failures("validation", failures, images)
        )
        if not np.isfinite(loss):
            self._diverge(self._position.global_step, f"the validation loss is {loss}")
        return loss, accuracy

    def _report_failures(self, split: str, failures: tuple[str, ...], images: int) -> None:
        """Names new bad images of any rank; a collective call."""
        for line in self._bad_images.add(split, failures):
            self._report.say(f"left out: {line}")
        self._bad_images.require_few(split, images)

    def _log(self, window: Window, side: int, epoch: float, steps: int) -> None:
        self._require_finite(window)
        numbers = window.numbers(self._run.ranks.world)
        if numbers is not None:
            self._report.write_window(numbers, self._position, side, epoch, steps)

    def _require_finite(self, window: Window) -> None:
        """Ends all ranks when one of them saw a loss that is not finite; a collective call."""
        steps = [step for step in gather_objects(window.first_bad_step()) if step is not None]
        if steps:
            self._diverge(min(steps), "the loss is not finite")

    def _diverge(self, step: int, reason: str) -> NoReturn:
        """Ends all ranks, which all are here."""
        fail_together(
            explain_divergence(
                self._run.recipe,
                step,
                reason,
                metrics=self._report.metrics,
                tau_at_224px=self._step.objective.tau_at_224px,
                folder=self._run.folder,
                saved_step=self._saver.saved_step,
            )
        )
