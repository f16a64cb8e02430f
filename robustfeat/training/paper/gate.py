"""The gate: methods are compared once ERM fits its images and longer training gains little."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from robustfeat.errors import TrainingError
from robustfeat.training.comparison.tables import spread
from robustfeat.training.paper.exhibit import TITLES, Exhibit
from robustfeat.training.paper.measures import Measures
from robustfeat.training.paper.scale import Gate

__all__ = ["GateResult", "gate", "measure_gate", "pass_gate"]


@dataclass(frozen=True)
class GateResult:
    """What the gate measured, in shares.

    Attributes:
        condition: the gate.
        training_accuracy: of ERM, mean over the seeds.
        gain: held-out accuracy of ERM for HRRL's time minus ERM's, mean over targets and seeds.
        epochs, longer: epochs of both.
    """

    condition: Gate
    training_accuracy: float
    gain: float
    epochs: int
    longer: int

    @property
    def fits(self) -> bool:
        """Whether ERM fits its training images."""
        return self.training_accuracy >= self.condition.training_accuracy

    @property
    def levels_off(self) -> bool:
        """Whether longer training gains little."""
        return self.gain < self.condition.gain

    @property
    def passed(self) -> bool:
        """Whether methods may be compared."""
        return self.fits and self.levels_off

    def __str__(self) -> str:
        wanted, gain = self.condition, 100 * self.gain
        return (
            f"ERM's training accuracy is {100 * self.training_accuracy:.2f} % (at least "
            f"{100 * wanted.training_accuracy:g} %), and {self.longer} epochs in place of {self.epochs} gain "
            f"{gain:+.2f} points held out (less than {100 * wanted.gain:g})"
        )

    def refusal(self) -> TrainingError | None:
        """The error that stops the comparison; None if the gate is passed."""
        if self.passed:
            return None
        fix = f"train longer with `epochs={self.longer}` and another `out`"
        return TrainingError(f"the gate is not passed, so no methods are compared: {self}", fix=fix)


def measure_gate(measures: Measures) -> GateResult:
    """The gate's result, from its cells."""
    scale = measures.scale
    assert scale.gate is not None  # without one there are no cells
    cells = _cells(measures)
    fitted = [cell.get("training_accuracy", 0.0) for own in cells["erm"].values() for cell in own]
    held_out = {method: np.mean([_mean(cell) for own in found.values() for cell in own])
                for method, found in cells.items()}  # fmt: skip
    gain = float(held_out["erm-long"] - held_out["erm"])
    return GateResult(scale.gate, float(np.mean(fitted)), gain, scale.recipe.epochs, scale.long_epochs)


def pass_gate(measures: Measures) -> TrainingError | None:
    """Computes the gate's cells; returns the error that stops the comparison, or None if the gate is passed."""
    measures.compute(["gate"])
    return measure_gate(measures).refusal()


def gate(measures: Measures) -> Exhibit:
    """The gate's figures."""
    result, cells = measure_gate(measures), _cells(measures)
    epochs = {"erm": result.epochs, "erm-long": result.longer}
    rows = []
    for method, found in cells.items():
        by_seed = list(zip(*found.values(), strict=True))
        row = {"method": TITLES[method], "epochs": epochs[method], "seeds": len(by_seed)}
        for key, title in (("training_accuracy", "training"), ("validation_accuracy", "validation")):
            row[title] = _spread([own[0][key] for own in by_seed if key in own[0]])
        for target, own in found.items():
            row[measures.study.target_title(target)] = _spread([_mean(cell) for cell in own])
        row["mean"] = _spread([float(np.mean([_mean(cell) for cell in own])) for own in by_seed])
        rows.append(row)
    return Exhibit(
        f"gate{measures.study.suffix}",
        f"Gate: accuracy of ERM in %, by its length; pre-trained on {measures.study.title}",
        rows,
        notes=[
            f"{'Passed' if result.passed else 'Not passed'}: {result}.",
            "Training: mean over the last epoch, on the cropped images of training. Targets: the SVM on five folds of "
            "the target's training images. No test image is seen.",
        ],
    )


def _cells(measures: Measures) -> dict[str, dict[str, list[Mapping[str, Any]]]]:
    """The gate's cells by method and target, one per seed."""
    found: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for method, seed, target in measures.gate_runs():
        found.setdefault(method, {}).setdefault(target, []).append(measures.main_folds(method, seed, target))
    return found


def _mean(cell: Mapping[str, Any]) -> float:
    return float(np.mean(cell["folds"]))


def _spread(shares: Sequence[float]) -> str:
    return spread([100 * share for share in shares]) if shares else ""
