"""Reports training: lines on stderr, and events for the journal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from robustfeat.progress import Progress, clock, remark
from robustfeat.training.loop.checkpoint import Position
from robustfeat.training.loop.journal import Journal
from robustfeat.training.loop.preparation import Run
from robustfeat.training.objective import Objective

__all__ = ["Report", "open_report"]

_NOTICEABLE_NOISE = 0.05
"""Change of an example's weight, which starts at 1, that is worth a line."""


class Report:
    """The progress of one run.

    Args:
        run: the run.
        objective: the objective whose numbers are reported.
        journal: for the events; None on all ranks but the first.

    Attributes:
        metrics: the numbers of the last window of steps.
    """

    def __init__(self, run: Run, objective: Objective, journal: Journal | None) -> None:
        self._run, self._objective, self._journal = run, objective, journal
        self._progress: Progress | None = None
        self._note = ""
        self._noise_told = False
        self.metrics: dict[str, Any] = {}

    def begin_epoch(self, position: Position, side: int, steps: int) -> None:
        """A new progress line, for an epoch of so many steps."""
        recipe = self._run.recipe
        self._progress = Progress(
            f"epoch {position.epoch + 1}/{recipe.epochs} at {side} px",
            steps * recipe.batch_size,
            start=position.step * recipe.batch_size,
            quiet=self._run.quiet,
        )

    def advance(self) -> None:
        """One more step of the epoch is made."""
        assert self._progress is not None
        self._progress.advance(self._run.recipe.batch_size, self._note)

    def finish_epoch(self, loss: float, accuracy: float, probed: float | None = None) -> None:
        """The epoch's closing line, with the accuracy of the probe where there was one."""
        assert self._progress is not None
        self._tell_noise()
        told = f"loss {loss:.4f}" if math.isnan(accuracy) else f"accuracy {accuracy:.2%}"
        self._progress.finish(f"validation {told}" + ("" if probed is None else f", probe {probed:.2%}"))

    def _tell_noise(self) -> None:
        """Says once that sampling moves the concepts' weights more than their losses do."""
        signal, noise = (self.metrics.get(f"weight_{name}", 0.0) for name in ("signal", "noise"))
        if self._noise_told or not noise > max(signal, _NOTICEABLE_NOISE):
            return
        self._noise_told = True
        baseline = "" if self._run.recipe.q_baseline else "`q_baseline=true`, "
        self.say(
            f"sampling noise moves the concepts' weights by {noise:.2f}, their losses by {signal:.2f}; less noise: "
            f"{baseline}a larger `lam` or `batch_size`, or a longer run"
        )

    def say(self, text: str) -> None:
        """A line on stderr, above the progress line of an epoch where there is one."""
        if self._progress is None:
            remark(text, quiet=self._run.quiet)
        else:
            self._progress.say(text)

    def write(self, event: str, position: Position, **numbers: Any) -> None:
        """One event for the journal."""
        if self._journal is not None:
            self._journal.write(event, position.global_step, numbers)

    def write_validation(self, event: str, position: Position, loss: float, accuracy: float) -> None:
        """One event with the loss and the accuracy on the validation images."""
        numbers = {"validation_loss": round(loss, 5)}
        if not math.isnan(accuracy):
            numbers["validation_accuracy"] = round(accuracy, 5)
        self.write(event, position, epoch=position.epoch, **numbers)

    def write_window(self, numbers: dict[str, float], position: Position, side: int, epoch: float, steps: int) -> None:
        """The numbers of a window of steps, for the journal and the progress line.

        Args:
            numbers: numbers from `Window.numbers`.
            position: after the window.
            side: side of the training images.
            epoch: epochs done, as a fraction.
            steps: number of steps in this epoch.
        """
        recipe, told = self._run.recipe, self._objective.metrics()
        self.metrics = {**numbers, **told}
        note = [f"loss {numbers['loss']:.3f}"]
        if "accuracy" in numbers:
            note.append(f"accuracy {numbers['accuracy']:.1%}")
        if "heaviest" in told:
            note.append(
                f"weights {told['weight_min']:.2f} {told['lightest']} to {told['weight_max']:.2f} {told['heaviest']}"
            )
        pixels = sum(recipe.image_size(later) ** 2 for later in range(position.epoch + 1, recipe.epochs)) * steps
        left = pixels / side**2 + steps - position.step
        note.append(f"run {clock(left * recipe.batch_size / max(numbers['images_per_s'], 1e-9))} left")
        self._note = ", ".join(note)
        self.write(
            "train",
            position,
            epoch=round(epoch, 5),
            image_size=side,
            lr=round(recipe.learning_rate(epoch), 8),
            tau=round(self._objective.tau(side, epoch), 6),
            **numbers,
            **told,
        )


@contextmanager
def open_report(run: Run, objective: Objective, position: Position) -> Iterator[Report]:
    """The report of a run from this position on. Its journal is closed at the end."""
    if run.ranks.rank > 0:
        yield Report(run, objective, None)
        return
    journal = Journal(run.folder, position.global_step, run.concepts.names)
    try:
        yield Report(run, objective, journal)
    finally:
        journal.close()
