"""A method for tests: HRRL that writes down what each rank sees at each step."""

from __future__ import annotations

import json
import os
from pathlib import Path

from torch import Tensor

from robustfeat.training.hrrl import ConceptAdversary
from robustfeat.training.objective import Objective, StepBatch

FOLDER = "ROBUSTFEAT_TESTS_RECORD"


class Recording(Objective):
    def training_loss(self, losses: Tensor, batch: StepBatch) -> Tensor:
        value = super().training_loss(losses, batch)
        assert isinstance(self.adversary, ConceptAdversary)
        line = {"q": [share.hex() for share in self.adversary.q.tolist()], "losses": losses.tolist()}
        file = Path(os.environ[FOLDER]) / f"rank{os.environ.get('RANK', '0')}.jsonl"
        with open(file, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")
        return value


def read(file: Path) -> tuple[list[list[str]], list[list[float]]]:
    """q as exact text, and the losses, of each step."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [line["q"] for line in lines], [line["losses"] for line in lines]
