"""The paper's tables and figures as data: what each needs, and what comes out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from robustfeat.training.checkpoint import load_checkpoint
from robustfeat.training.concepts import load_concepts
from robustfeat.training.evaluation.corruptions import CORRUPTIONS, SEVERITIES
from robustfeat.training.evaluation.finetuning import finetune
from robustfeat.training.evaluation.probes import FEW_SHOTS
from robustfeat.training.evaluation.robustness import accuracy_by_step, class_hits
from robustfeat.training.evaluation.subject import network_of
from robustfeat.training.evaluation.tasks import draw_images
from robustfeat.training.paper.cells import unpack
from robustfeat.training.paper.scale import CORRUPTED, PAPER_NUMBERS, TABLES
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

_CORRUPTIONS = len(CORRUPTIONS) * len(SEVERITIES)


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
    cells = {name: [study.score(name, seed, target) for seed in study.scale.seeds] for name in study.methods}
    answers = {method: [unpack(cell["right"]) for cell in found] for method, found in cells.items()}
    paper = PAPER_NUMBERS[target]
    rows = []
    for method, found in cells.items():
        values = [100 * cell["accuracy"] for cell in found]
        row = {
            "method": _TITLES[method],
            "paper": f"{paper[method][0]:.2f} ± {paper[method][1]:.2f}" if method in paper else "",
            "here": _spread(values),
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


def _spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and deviation over seeds."""
    mean = f"{np.mean(values):.{digits}f}"
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else mean


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
    scale = study.scale
    rows, panels = [], []
    for target in scale.targets:
        task = study.task(target)
        task = dataclasses.replace(task, train=draw_images(task.train, scale.finetune_rows))
        curves = []
        for method in ("erm", "hrrl"):
            name, recipe = study.main_run(method, scale.seeds[0])
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
            trained, images = study.benchmark
            network = network_of(checkpoint).to(study.device)
            right, count = class_hits(network, recipe.preprocessing(), images, study.device)
            # Classes without training images have no concept.
            shown = (count > 0) & (np.bincount(trained.labels, minlength=len(count)) > 0)
            of_class = np.array(checkpoint.concept_of_class)
            by_concept = {}
            for place, concept in enumerate(checkpoint.concepts):
                if (own := shown & (of_class == place)).any():
                    by_concept[concept] = right[own].sum() / count[own].sum()
            by_class = {images.classes[place]: right[place] / count[place] for place in np.flatnonzero(shown)}
            return {"accuracy": by_concept, "by_class": by_class}

        cell = study.cells.get(f"concepts-{name}", study.validation_inputs("selection", recipe), compute)
        by_concept, by_class = cell["accuracy"], sorted(cell["by_class"].items(), key=lambda item: item[1])
        ordered = sorted(by_concept.items(), key=lambda item: item[1])
        low, high = ordered[0], ordered[-1]
        spread = 100 * float(np.std(list(by_concept.values())))
        tenth = 100 * float(np.mean([share for _, share in by_class[: max(1, len(by_class) // 10)]]))
        rows.append({"model": label, "worst concept": f"{low[0]} {100 * low[1]:.2f}",
                     "best concept": f"{high[0]} {100 * high[1]:.2f}", "deviation over concepts": f"{spread:.2f}",
                     "worst class": f"{by_class[0][0]} {100 * by_class[0][1]:.2f}",
                     "worst tenth of classes": f"{tenth:.2f}",
                     **{concept: f"{100 * share:.2f}" for concept, share in sorted(by_concept.items())}})  # fmt: skip
        curves.append(Curve(label, [(place + 1, 100 * share) for place, (_, share) in enumerate(ordered)]))
    return Exhibit(
        "fig5", f"Figure 5: accuracy in % by concept, sorted; {_selection_title(study)}", rows,
        [("", "concepts, from worst to best", "accuracy in %", curves)],
    )  # fmt: skip


def _selection_title(study: Study) -> str:
    rows = study.scale.selection_rows
    return study.scale.title if rows is None else f"{rows:,} images, {study.scale.selection.epochs} epochs, one seed"


def _selection(study: Study) -> Exhibit:
    chosen = dict(zip(("el", "cl"), study.chosen, strict=True))
    shares: dict[tuple[str, float], dict[str, float]] = {}
    for method, value, target, share in study.selection():
        shares.setdefault((method, value), {})[study.scale.targets[target].title] = 100 * share
    rows = [
        {
            "model": f"{_TITLES[method]}, {'tau' if method == 'el' else 'lambda'} {value:g}",
            **{title: f"{share:.2f}" for title, share in found.items()},
            "mean": f"{np.mean(list(found.values())):.2f}",
            "chosen": "yes" if value == chosen[method] else "",
        }
        for (method, value), found in shares.items()
    ]
    return Exhibit(
        "selection", f"Selection: SVM accuracy in % on held-out training images; {_selection_title(study)}", rows
    )


def _opinions(study: Study) -> Exhibit:
    rows = []
    for target in study.scale.targets:
        for method in study.methods:
            cells = [study.opinions(method, seed, target) for seed in study.scale.seeds]
            balanced = [study.score(method, seed, target)["balanced_accuracy"] for seed in study.scale.seeds]
            row = {"target": study.scale.targets[target].title, "method": _TITLES[method]}
            row["SVM, balanced"] = _spread([100 * share for share in balanced])
            for key, title in (("naive_bayes", "naive Bayes"), ("neighbours", "neighbours")):
                row[title] = _spread([100 * cell[key]["accuracy"] for cell in cells])
            for count in FEW_SHOTS:
                few = [cell["few_shot"].get(str(count)) for cell in cells]
                row[f"{count}-shot"] = _spread([100 * curve["accuracy"] for curve in few]) if all(few) else ""
            both = cells[0]["libsvm"].values()
            row["LIBSVM / LinearSVC"] = " / ".join(f"{100 * score['accuracy']:.2f}" for score in both)
            rows.append(row)
    suffix, biased = _biased(study)
    return Exhibit(
        f"opinions{suffix}", f"Second opinions, accuracy in %; pre-trained on {study.scale.title}{biased}", rows,
        notes=["LIBSVM is one against one with the hinge loss, on at most 5,000 training rows, first seed."],
    )  # fmt: skip


def _corruptions(study: Study) -> Exhibit:
    rows, panels, scale = [], [], study.scale
    for target in scale.targets:
        told, curves = {}, []
        for method in CORRUPTED:
            cells = [study.corrupted(method, seed, target) for seed in scale.seeds]
            told[method] = [np.frombuffer(bytes.fromhex(cell["told"]), np.uint8) / _CORRUPTIONS for cell in cells]
            row = {"target": scale.targets[target].title, "method": _TITLES[method]}
            row |= {key: _spread([100 * cell[key] for cell in cells]) for key in ("clean", "corrupted")}
            row |= {key: _spread([cell[key] for cell in cells], 4) for key in ("kept", "drift")}
            against = None if method == "erm" else compare(told[method], told["erm"])
            compared = _compared(against)
            compared["corrupted, minus ERM"] = compared.pop("here, minus ERM")
            rows.append({**row, **compared})
            by_kind = [cell["by_corruption"].values() for cell in cells]
            points = [(0.0, 100 * float(np.mean([cell["clean"] for cell in cells])))]
            for severity in SEVERITIES:
                shares = [kind[str(severity)]["accuracy"] for kinds in by_kind for kind in kinds]
                points.append((severity, 100 * float(np.mean(shares))))
            curves.append(Curve(_TITLES[method], points))
        panels.append((scale.targets[target].title, "severity", "SVM accuracy in %", curves))
    suffix, biased = _biased(study)
    limit = "all" if scale.corrupted_rows is None else f"at most {scale.corrupted_rows:,}"
    return Exhibit(
        f"corruptions{suffix}",
        f"Common corruptions: SVM accuracy in %; pre-trained on {scale.title}{biased}",
        rows,
        panels,
        [
            f"Of {limit} test images of each target. Kept: corrupted / clean. Drift: 1 - cosine of an image's features "
            "before and after. docs/evaluation.md tells more."
        ],
    )


EXHIBITS: dict[str, Callable[[Study], Exhibit]] = {
    "table1": _table1,
    **{table: partial(_accuracies, table=table) for table in TABLES},
    "fig2": _figure2,
    "fig3": _figure3,
    "fig4": _figure4,
    "fig5": _figure5,
    "selection": _selection,
    "opinions": _opinions,
    "corruptions": _corruptions,
}
"""By name: called with a study."""
