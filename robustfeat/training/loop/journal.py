"""Writes a run's metrics to metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustfeat.errors import InputError
from robustfeat.files import new_file
from robustfeat.training.loop.distributed import sum_over_ranks
from robustfeat.training.loop.run_folder import METRICS_NAME, TENSORBOARD_NAME
from robustfeat.training.loop.step import StepResult

__all__ = ["Journal", "Window", "final_accuracies", "read_metrics"]


class Journal:
    """Writes each event as a line of metrics.jsonl and as TensorBoard's scalars.

    Args:
        run: the run's folder; lines that a killed run wrote after its last checkpoint are dropped.
        step: step of the checkpoint. Later steps are repeated.
        concepts: names, for the weights' scalars.
    """

    def __init__(self, run: Path, step: int, concepts: Sequence[str]) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._file, self._concepts = run / METRICS_NAME, concepts
        if self._file.exists():
            kept = [line for line in read_metrics(run) if line["step"] <= step]
            with new_file(self._file) as partial:
                partial.write_text("".join(json.dumps(line) + "\n" for line in kept), "utf-8")
        try:
            self._board = SummaryWriter(str(run / TENSORBOARD_NAME), purge_step=step + 1)
        except OSError as exc:
            raise InputError(
                f"{run / TENSORBOARD_NAME}: cannot be written ({exc.strerror})",
                fix="remove what is there, or free space",
            ) from exc

    def write(self, event: str, step: int, numbers: dict[str, Any]) -> None:
        """One event (`train`, `epoch`, `recalibrated` or `probe`) at this step.

        Raises:
            InputError: the file cannot be written.
        """
        line = json.dumps({"event": event, "step": step, **numbers})
        try:
            with open(self._file, "a", encoding="utf-8") as handle:
                handle.write(line + "\n")
            for name, value in numbers.items():
                if name == "q":
                    for concept, share in zip(self._concepts, value, strict=True):
                        self._board.add_scalar(f"q/{concept}", share, step)
                elif isinstance(value, int | float):
                    self._board.add_scalar(f"{event}/{name}", value, step)
            self._board.flush()
        except OSError as exc:
            raise InputError(
                f"{self._file}: cannot be written ({exc.strerror})",
                fix="free space, then pass `resume=True` to resume the run",
            ) from exc

    def close(self) -> None:
        """Ends TensorBoard's file."""
        self._board.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The events of a run, up to a line that a kill cut short."""
    events: list[dict[str, Any]] = []
    file = run / METRICS_NAME
    if file.exists():
        for line in file.read_text("utf-8", errors="replace").splitlines():
            try:
                event = json.loads(line)
                event["step"] = int(event["step"])
            except (ValueError, KeyError, TypeError):
                break
            events.append(event)
    return events


def final_accuracies(run: Path) -> dict[str, float]:
    """The accuracies that a run logged at its end, as far as it logged them.

    Returns:
        `training_accuracy`: the mean over the steps of the last epoch, on the images that the network was trained on,
        so cropped and, by EL and HRRL, moved. `validation_accuracy`: after the last epoch.
    """
    events, found = read_metrics(run), {}
    ends = [line["step"] for line in events if line["event"] == "epoch"]
    begins = [0, *ends][-2] if ends else 0
    windows = [line for line in events if line["event"] == "train" and begins < line["step"] and "accuracy" in line]
    if windows:
        steps = np.diff([begins, *(line["step"] for line in windows)])
        accuracies = [line["accuracy"] for line in windows]
        found["training_accuracy"] = round(float(np.average(accuracies, weights=steps)), 5)
    validated = [line["validation_accuracy"] for line in events if "validation_accuracy" in line]
    return found | ({"validation_accuracy": validated[-1]} if validated else {})


class Window:
    """Sums over the steps between two log lines, kept on the device so that no step waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(4, device=device, dtype=torch.float64)
        # Of gradients, the same on each rank: the sum of the finite norms, and how many they are.
        self._norms: Tensor | None = None
        self._first_bad = torch.full((), torch.inf, device=device, dtype=torch.float64)
        self._steps = 0
        self._began = time.monotonic()

    def add(self, result: StepResult, step: int) -> None:
        """The step with this number, counted from 0."""
        loss = result.losses.sum().double()
        self._sums += torch.stack([
            loss, result.objective.double(), result.correct.double(), torch.ones_like(loss) * len(result.losses)
        ])  # fmt: skip
        if result.gradient_norm is not None:
            norm = result.gradient_norm.double()
            counted = torch.stack([torch.where(norm.isfinite(), norm, 0), norm.isfinite().double()])
            self._norms = counted if self._norms is None else self._norms + counted
        bad = ~(torch.isfinite(loss) & torch.isfinite(result.objective))
        self._first_bad = torch.where(bad, self._first_bad.clamp_max(step), self._first_bad)
        self._steps += 1

    def first_bad_step(self) -> int | None:
        """The first step whose loss was not finite, on this rank."""
        step = float(self._first_bad)
        return None if step == torch.inf else int(step)

    def numbers(self, world: int) -> dict[str, float] | None:
        """Means over the window and all ranks: unweighted loss, training loss, speed.

        The accuracy and the gradients' norm are there where they are known.
        """
        if not self._steps:
            return None
        sums: Tensor = sum_over_ranks(self._sums)
        loss, objective, correct, images = sums.tolist()
        norm, norms = (0.0, 0.0) if self._norms is None else self._norms.tolist()
        return {
            "loss": round(loss / images, 5),
            "objective": round(objective / self._steps / world, 5),
            **({} if math.isnan(correct) else {"accuracy": round(correct / images, 5)}),
            **({"gradient_norm": round(norm / norms, 5)} if norms else {}),
            "images_per_s": round(images / max(time.monotonic() - self._began, 1e-9), 1),
        }
