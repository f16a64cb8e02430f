"""Loss and accuracy on the validation images."""

from __future__ import annotations

from collections.abc import Callable

import torch

from robustfeat.errors import DataError
from robustfeat.training.data.batches import EvaluationBatches, load_batches
from robustfeat.training.loop.distributed import sum_over_ranks
from robustfeat.training.loop.preparation import Run
from robustfeat.training.loop.step import TrainingStep

__all__ = ["validate"]

_BATCH = 256


def validate(run: Run, step: TrainingStep, report_failures: Callable[[tuple[str, ...]], None]) -> tuple[float, float]:
    """Mean loss and accuracy; each rank counts its batches, and the sums are exact.

    Where labels are not learned, the loss is the distance to the teacher's features, and the accuracy is NaN.

    Args:
        run: with the images.
        step: with the network, `TrainingStep.result`, which is left in evaluation mode.
        report_failures: gets a line for each image of this rank that cannot be decoded, once all are counted.

    Raises:
        DataError: no image can be decoded.
    """
    contract = run.recipe.preprocessing()
    batches = EvaluationBatches(run.validation_set, _BATCH, contract)
    numbers = range(run.ranks.rank, len(batches), run.ranks.world)
    sums = torch.zeros(3, dtype=torch.float64, device=run.device)
    failures: list[str] = []
    step.result.eval()
    for batch in load_batches(batches, run.decoders, numbers, pin=run.device.type == "cuda"):
        failures.extend(batch.failures)
        if len(batch.labels):
            pixels = batch.pixels(run.device, contract.image_size)
            target = run.teacher.features(pixels) if run.teacher and not run.recipe.labels else None
            loss, correct = step.evaluate(pixels, batch.labels, target)
            sums += torch.stack([loss, correct.double(), torch.full_like(loss, len(batch.labels))])
    report_failures(tuple(failures))
    loss_sum, correct_sum, count = sum_over_ranks(sums).tolist()
    if not count:
        raise DataError(f"{run.data_identity['root']}: none of the validation images can be decoded")
    return loss_sum / count, correct_sum / count
