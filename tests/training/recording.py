"""A method for tests: HRRL that writes down what each rank sees at each step."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from robustfeat.training.hrrl import ConceptAdversary
from robustfeat.training.objective import Objective, StepBatch

FOLDER = "ROBUSTFEAT_TESTS_RECORD"


class Recording(Objective):
    def training_images(self, model: nn.Module, batch: StepBatch) -> Tensor:
        self.running = float(sum(float(buffer.double().sum()) for buffer in model.buffers())).hex()
        return super().training_images(model, batch)

    def training_loss(self, losses: Tensor, batch: StepBatch) -> Tensor:
        value = super().training_loss(losses, batch)
        assert isinstance(self.adversary, ConceptAdversary)
        line = {
            "q": [share.hex() for share in self.adversary.q.tolist()],
            "losses": losses.tolist(),
            "running": self.running,
        }
        file = Path(os.environ[FOLDER]) / f"rank{os.environ.get('RANK', '0')}.jsonl"
        with open(file, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")
        return value


class Frozen(Recording):
    """Keeps BatchNorm's running statistics, in the inner pass and in the step."""

    def training_images(self, model: nn.Module, batch: StepBatch) -> Tensor:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return super().training_images(model, batch)


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def read(file: Path) -> tuple[list[list[str]], list[list[float]]]:
    """q as exact text, and the losses, of each step."""
    lines = read_lines(file)
    return [line["q"] for line in lines], [line["losses"] for line in lines]
