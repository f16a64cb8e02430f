"""The paper's tables and figures as data: what each needs, and what comes out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from robustfeat.training.checkpoint import load_checkpoint
from robustfeat.training.concepts import load_concepts
from robustfeat.training.evaluation.finetuning import finetune
from robustfeat.training.evaluation.robustness import accuracy_by_step, class_accuracy
from robustfeat.training.evaluation.subject import network_of
from robustfeat.training.paper.cells import unpack
from robustfeat.training.paper.scale import CONTROLS, METHODS, PAPER_NUMBERS, TABLES
from robustfeat.training.paper.statistics import Comparison, compare
from robustfeat.training.paper.study import Study
from robustfeat.training.recipe import Recipe

__all__ = ["EXHIBITS", "Curve", "Exhibit"]

_TABLE1 = {
    "Animal": 121, "Artifact": 107, "Bird": 59, "Container": 56, "Device": 129, "Dog": 118, "Instrumentality": 106,
    "Mammal": 100, "Structure": 57, "Vehicle": 67, "Others": 80,
}  # fmt: skip
_FIGURE2_PEAKS = {100: 755, 150: 1534, 200: 2550, 300: 5253}
"""By mu; read from the derivative of h, since the figure has no numbers."""

_TITLES = {"erm": "ERM", "el": "EL", "cl": "CL", "hrrl": "HRRL", "erm-long": "ERM for HRRL's time",
           "random": "random directions", "balanced": "class-balanced ERM", "groupdro": "GroupDRO"}  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """A line of a figure; `points` are (x, y)."""

    label: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Exhibit:
    """A table or a figure.

    Attributes:
        name: such as table2.
        title: with the scale.
        rows: of the table, or the figure's numbers; all with the same keys.
        panels: of a figure: title, label of the x axis, label of the y axis, curves.
        notes: lines to be read with it.
    """

    name: str
    title: str
    rows: Sequence[Mapping[str, Any]]
    panels: Sequence[tuple[str, str, str, Sequence[Curve]]] = ()
    notes: Sequence[str] = field(default_factory=tuple)


def _table1(study: Study) -> Exhibit:
    ours = list(load_concepts("imagenet11").values())
    rows = [
        {"concept": name, "classes in the paper": count, "classes here": ours.count(name)}
        for name, count in _TABLE1.items()
    ]
    agree = sum(row["classes in the paper"] == row["classes here"] for row in rows)
    return Exhibit("table1", "Table 1: the concepts of ImageNet", rows, notes=[f"{agree} of {len(rows)} counts agree."])


def _figure2(study: Study) -> Exhibit:
    s = np.arange(2, 10_001)
    rows, curves = [], []
    for mu, expected in _FIGURE2_PEAKS.items():
        h = mu * np.sqrt(np.log(s) / 2) - np.sqrt(s)
        rows.append({"mu": mu, "expected maximum at s": expected, "maximum at s": int(s[h.argmax()])})
        shown = slice(None, None, 20)
        curves.append(Curve(f"mu = {mu}", list(zip(s[shown].tolist(), h[shown].tolist(), strict=True))))
    return Exhibit(
        "fig2", "Figure 2: h(s) at lambda = 1", rows, [("", "s", "h(s)", curves)],
        ["Theorem 3's gain is h(s)^2. The paper takes s = 1000."],
    )  # fmt: skip


def _accuracies(study: Study, table: str) -> Exhibit:
    target = TABLES[table]
    cells = study.scores(METHODS + (CONTROLS if study.controls else ()), target)
    answers = {method: [unpack(cell["right"]) for cell in found] for method, found in cells.items()}
    paper = PAPER_NUMBERS[target]
    rows = []
    for method, found in cells.items():
        values = [100 * cell["accuracy"] for cell in found]
        row = {
            "method": _TITLES[method],
            "paper": f"{paper[method][0]:.2f} ± {paper[method][1]:.2f}" if method in paper else "",
            "here": f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else f"{values[0]:.2f}",
            "seeds": len(values),
            "paper, minus ERM": f"{paper[method][0] - paper['erm'][0]:+.2f}" if method in paper else "",
        }
        against = None if method == "erm" else compare(answers[method], answers["erm"])
        rows.append({**row, **_compared(against)})
    tau, lam = study.chosen
    suffix, biased = _biased(study)
    return Exhibit(
        f"{table}{suffix}",
        f"Table {table[-1]}: SVM accuracy in % on {study.scale.targets[target].title}; pre-trained on "
        f"{study.scale.title}{biased}",
        rows,
        notes=[
            f"tau = {tau:g} and lambda = {lam:g}, chosen on held-out training images. "
            "Deviations are over seeds (n - 1). Rules and intervals: docs/protocol.md."
        ],
    )


def _biased(study: Study) -> tuple[str, str]:
    """What names and titles of models of the biased benchmark end with."""
    return ("-biased", ", with ImageNet's shares of concepts") if study.biased else ("", "")


def _compared(result: Comparison | None) -> dict[str, str]:
    def interval(ends: tuple[float, float] | None) -> str:
        return "" if ends is None else f"{100 * ends[0]:+.2f} to {100 * ends[1]:+.2f}"

    if result is None:
        return dict.fromkeys(("here, minus ERM", "95 % over seeds", "95 % over images", "verdict"), "")
    return {
        "here, minus ERM": f"{100 * result.difference:+.2f}",
        "95 % over seeds": interval(result.over_seeds),
        "95 % over images": interval(result.over_images),
        "verdict": result.mark,
    }


def _network(study: Study, name: str, recipe: Recipe) -> nn.Module:
    return network_of(load_checkpoint(study.run(name, recipe)))


def _figure3(study: Study) -> Exhibit:
    tau, lam = study.chosen
    scale, seed = study.scale, study.scale.seeds[0]
    rows, panels = [], []
    for target in scale.targets:
        task = study.task(target)
        if scale.finetune_rows is not None and scale.finetune_rows < len(task.train):
            rows_used = np.sort(np.random.default_rng(0).permutation(len(task.train))[: scale.finetune_rows])
            task = type(task)(task.name, task.train.subset(rows_used), task.test)
        curves = []
        for method in ("erm", "hrrl"):
            recipe = study.recipe(study.stage, method, seed, tau, lam)
            name = f"{study.stage}-{method}-s{seed}"
            settings: dict[str, Any] = {"epochs": scale.finetune_epochs, "milestone": scale.finetune_milestone}
            settings["batch_size"] = min(128, len(task.train))

            def compute(
                name: str = name, recipe: Recipe = recipe, settings: dict[str, Any] = settings, task: Any = task
            ) -> dict[str, Any]:
                network = _network(study, name, recipe)
                classifier = network.get_submodule("fc")
                assert isinstance(classifier, nn.Linear)
                network.fc = nn.Identity()
                contract = recipe.preprocessing()
                errors = finetune(
                    network,
                    classifier.in_features,
                    contract,
                    task,
                    device=study.device,
                    quiet=study.machine.quiet,
                    **settings,
                )
                return {"test_error": errors}

            inputs = {**study.inputs(study.stage, recipe), **settings, "task": study.identity(task)}
            errors = study.cells.get(f"finetune-{target}-{name}", inputs, compute)["test_error"]
            rows.append({"target": scale.targets[target].title, "from": _TITLES[method],
                         "test error in %, last epoch": f"{100 * errors[-1]:.2f}"})  # fmt: skip
            curves.append(Curve(_TITLES[method], [(place + 1, 100 * error) for place, error in enumerate(errors)]))
        panels.append((scale.targets[target].title, "epoch", "test error in %", curves))
    suffix, biased = _biased(study)
    return Exhibit(f"fig3{suffix}", f"Figure 3: fine-tuning from {scale.title}{biased}, one seed", rows, panels)


def _figure4(study: Study) -> Exhibit:
    models: list[tuple[str, dict[str, Any]]] = [("ERM", {"method": "erm"})]
    models += [(f"EL, tau {tau:g}", {"method": "el", "tau": tau}) for tau in study.scale.taus]
    rows, curves = [], []
    for label, wanted in models:
        name, recipe = study.selection_run(**wanted)

        def compute(name: str = name, recipe: Recipe = recipe) -> dict[str, Any]:
            network = _network(study, name, recipe)
            images = study.benchmark[1]
            steps = study.scale.steps
            found = accuracy_by_step(network.to(study.device), recipe.preprocessing(), images, steps, study.device)
            return {"accuracy": found}

        inputs = {**study.validation_inputs("selection", recipe), "steps": study.scale.steps}
        shares = study.cells.get(f"steps-{name}", inputs, compute)["accuracy"]
        points = [(step, 100 * share) for step, share in zip(study.scale.steps, shares, strict=True)]
        rows.append({"model": label, **{f"step {step:g}": f"{value:.2f}" for step, value in points}})
        curves.append(Curve(label, points))
    return Exhibit(
        "fig4", f"Figure 4: accuracy in % on moved validation images, by step (at 224 px); {_selection_title(study)}",
        rows, [("", "length of the step at 224 px", "accuracy in %", curves)],
    )  # fmt: skip


def _figure5(study: Study) -> Exhibit:
    models: list[tuple[str, dict[str, Any]]] = [("ERM", {"method": "erm"})]
    models += [(f"CL, lambda {lam:g}", {"method": "cl", "lam": lam}) for lam in study.scale.lams]
    rows, curves = [], []
    for label, wanted in models:
        name, recipe = study.selection_run(**wanted)

        def compute(name: str = name, recipe: Recipe = recipe) -> dict[str, Any]:
            checkpoint = load_checkpoint(study.run(name, recipe))
            groups = np.array(checkpoint.concept_of_class)
            # Classes without training images have no concept: a group of their own, which is left out.
            seen = np.bincount(study.benchmark[0].labels, minlength=len(groups)) > 0
            groups[~seen] = len(checkpoint.concepts)
            found = class_accuracy(
                network_of(checkpoint).to(study.device), recipe.preprocessing(), study.benchmark[1], groups,
                len(checkpoint.concepts) + 1, study.device,
            )  # fmt: skip
            told = zip(checkpoint.concepts, found[:-1].tolist(), strict=True)
            return {"accuracy": {concept: share for concept, share in told if not math.isnan(share)}}

        by_concept = study.cells.get(f"concepts-{name}", study.validation_inputs("selection", recipe), compute)[
            "accuracy"
        ]
        ordered = sorted(by_concept.items(), key=lambda item: item[1])
        low, high = ordered[0], ordered[-1]
        spread = 100 * float(np.std(list(by_concept.values())))
        rows.append({"model": label, "worst concept": f"{low[0]} {100 * low[1]:.2f}",
                     "best concept": f"{high[0]} {100 * high[1]:.2f}", "deviation over concepts": f"{spread:.2f}",
                     **{concept: f"{100 * share:.2f}" for concept, share in sorted(by_concept.items())}})  # fmt: skip
        curves.append(Curve(label, [(place + 1, 100 * share) for place, (_, share) in enumerate(ordered)]))
    return Exhibit(
        "fig5", f"Figure 5: accuracy in % by concept, sorted; {_selection_title(study)}", rows,
        [("", "concepts, from worst to best", "accuracy in %", curves)],
    )  # fmt: skip


def _selection_title(study: Study) -> str:
    rows = study.scale.selection_rows
    return study.scale.title if rows is None else f"{rows:,} images, {study.scale.selection.epochs} epochs, one seed"


EXHIBITS: dict[str, Callable[[Study], Exhibit]] = {
    "table1": _table1,
    **{table: partial(_accuracies, table=table) for table in TABLES},
    "fig2": _figure2,
    "fig3": _figure3,
    "fig4": _figure4,
    "fig5": _figure5,
}
"""By name: called with a study."""
