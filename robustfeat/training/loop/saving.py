"""Saving and restoring a run."""

from __future__ import annotations

from typing import Any, NoReturn

from robustfeat.errors import StoppedError
from robustfeat.progress import remark
from robustfeat.training.loop.bad_images import BadImages
from robustfeat.training.loop.checkpoint import Checkpoint, Position, fitting, save_checkpoint
from robustfeat.training.loop.distributed import fail_together, gather_objects
from robustfeat.training.loop.preparation import Run
from robustfeat.training.loop.run_folder import BEST_NAME, CHECKPOINT_NAME
from robustfeat.training.loop.step import TrainingStep

__all__ = ["Saver", "restore"]

_STATES = ("model", "heads", "start", "optimizer", "objective", "scaler", "average")


class Saver:
    """Writes a run's checkpoints.

    Args:
        run: what they are of.
        step: with the network, the optimiser and the objective.
        bad_images: found so far.
        saved: the checkpoint that is there, if any.

    Attributes:
        saved_step: the steps made at the last checkpoint.
        best: `epoch` and `score` of best.pt; empty where there is none.
    """

    def __init__(self, run: Run, step: TrainingStep, bad_images: BadImages, saved: Checkpoint | None = None) -> None:
        self._run, self._step, self._bad_images = run, step, bad_images
        self.saved_step = saved.global_step if saved else 0
        self.best: dict[str, Any] = dict(saved.best) if saved else {}

    def save(self, position: Position) -> None:
        """Writes the checkpoint on the first rank; a collective call."""
        self._write(position, CHECKPOINT_NAME)
        self.saved_step = position.global_step

    def save_if_best(self, position: Position, score: float) -> None:
        """Writes best.pt on the first rank where the score is above all before; a collective call.

        Call `save` afterwards. A run that is killed between the two repeats the epoch, and writes best.pt again.
        """
        if not self.best or score > self.best["score"]:
            self.best = {"epoch": position.epoch, "score": score}
            self._write(position, BEST_NAME)

    def _write(self, position: Position, name: str) -> None:
        run = self._run
        if run.ranks.rank == 0:
            save_checkpoint(
                Checkpoint(
                    recipe=run.recipe.to_dict(),
                    data=run.data_identity,
                    classes=list(run.train_set.classes),
                    concepts=list(run.concepts.names),
                    concept_of_class=run.concepts.of_class.tolist(),
                    epoch=position.epoch,
                    step=position.step,
                    global_step=position.global_step,
                    bad_images=self._bad_images.by_split(),
                    clusters=run.clusters.state_dict() if run.clusters else {},
                    best=self.best,
                    **self._step.state_dict(),
                ),
                run.folder,
                name,
            )
        gather_objects(None)  # no rank may continue, or even end, before the file is complete

    def stop(self) -> NoReturn:
        """Ends all ranks after a checkpoint; a collective call.

        Raises:
            StoppedError: always.
        """
        file = self._run.folder / CHECKPOINT_NAME
        fail_together(StoppedError(f"stopped; {file} is up to date", fix="pass `resume=True` to resume it"))


def restore(saved: Checkpoint, run: Run, step: TrainingStep) -> Position:
    """Gives the network, the optimiser and the objective their saved state; returns where the run stands."""
    with fitting():
        step.load_state_dict({name: getattr(saved, name) for name in _STATES})
    before = saved.data.get("ranks", 1)
    if before != run.ranks.world:
        remark(
            f"was trained on {before} ranks, goes on with {run.ranks.world}: BatchNorm's statistics and random "
            "directions differ from those of an unbroken run",
            quiet=run.quiet,
        )
    return saved.position
