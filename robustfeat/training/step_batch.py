"""The data of a step for the levels of an objective."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, distributed

__all__ = ["StepBatch"]


@dataclass(frozen=True)
class StepBatch:
    """The batch of one step, under data parallelism this rank's part.

    Attributes:
        images: (m, 3, S, S) float, in the network's normalised input space.
        labels: (m,) int64, each example's class; of a mixture the larger part's.
        concepts: (m,) int64, each example's concept.
        epoch: epochs done so far, as a fraction.
        replay: how often this batch was trained on just before (`Objective.replays`).
        total: the examples of all ranks together.
        shares: (m, C) float, each example's shares of classes, where it is a mixture.
        teacher: (m, D) float32 of length 1, the teacher's features of the images as they were before any move.
        anchors: (m, D) float32, what the network gave for the same images before training, where that is learned.
    """

    images: Tensor
    labels: Tensor
    concepts: Tensor
    epoch: float
    total: int
    replay: int = 0
    shares: Tensor | None = None
    teacher: Tensor | None = None
    anchors: Tensor | None = None

    @property
    def targets(self) -> Tensor:
        """The classifier's targets: shares of classes, or labels."""
        return self.labels if self.shares is None else self.shares

    def mean(self, values: Tensor) -> Tensor:
        """The scalar to descend so that the step follows the mean of all ranks' `values`, (m,).

        The gradients of the ranks are averaged, also where a bad image made their parts unequal.
        """
        if not distributed.is_initialized():
            return values.mean()
        return values.sum() * (distributed.get_world_size() / self.total)
