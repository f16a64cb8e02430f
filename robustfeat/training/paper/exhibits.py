"""The paper's tables and figures as data: what each needs, and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.hub.markdown import columns
from robustfeat.training.concepts import load_concepts
from robustfeat.training.evaluation.corruptions import CORRUPTIONS, SEVERITIES
from robustfeat.training.evaluation.figures import Curve, Panel, draw
from robustfeat.training.evaluation.probes import FEW_SHOTS
from robustfeat.training.evaluation.report import libsvm_cell
from robustfeat.training.paper.cells import unpack
from robustfeat.training.paper.measures import Measures
from robustfeat.training.paper.scale import CORRUPTED, METHODS, PAPER_NUMBERS, TABLES
from robustfeat.training.paper.statistics import Comparison, compare

__all__ = ["EXHIBITS", "Exhibit"]

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
class Exhibit:
    """A table or a figure.

    Attributes:
        name: such as table2.
        title: with the scale.
        rows: of the table, or the figure's numbers; cells by column, those that are missing are empty.
        panels: of a figure.
        notes: lines to be read with it.
    """

    name: str
    title: str
    rows: Sequence[Mapping[str, Any]]
    panels: Sequence[Panel] = ()
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def columns(self) -> list[str]:
        """Of the rows together."""
        return columns(self.rows)

    @cached_property
    def svg(self) -> bytes:
        """The panels as one picture, drawn once for its own file and for the page."""
        return draw(self.panels, "svg", self.name)


def _table1(measures: Measures) -> Exhibit:
    ours = list(load_concepts("imagenet11").values())
    rows = [
        {"concept": name, "classes in the paper": count, "classes here": ours.count(name)}
        for name, count in _TABLE1.items()
    ]
    agree = sum(row["classes in the paper"] == row["classes here"] for row in rows)
    return Exhibit("table1", "Table 1: the concepts of ImageNet", rows, notes=[f"{agree} of {len(rows)} counts agree."])


def _figure2(measures: Measures) -> Exhibit:
    s = np.arange(2, 10_001)
    rows, curves, maxima = [], [], []
    for mu, expected in _FIGURE2_PEAKS.items():
        h = mu * np.sqrt(np.log(s) / 2) - np.sqrt(s)
        highest = int(h.argmax())
        rows.append({"mu": mu, "expected maximum at s": expected, "maximum at s": int(s[highest])})
        maxima.append((float(s[highest]), float(h[highest])))
        shown = slice(None, None, 20)
        curves.append(Curve(f"mu = {mu}", list(zip(s[shown].tolist(), h[shown].tolist(), strict=True))))
    curves.append(Curve("maxima", maxima, joined=False))
    return Exhibit(
        "fig2", "Figure 2: h(s) at lambda = 1", rows, [Panel("", "s", "h(s)", curves)],
        [
            "h(s) = mu sqrt(log(s) / 2) - lambda sqrt(s), where mu bounds the norm of q's gradient. Theorem 3's gain "
            "is its square. The paper uses s = 1000.",
            "The paper's figure has no numbers. Expected is the s where the derivative of h is 0.",
        ],
    )  # fmt: skip


def _answers(measures: Measures, target: str) -> dict[str, list[NDArray[np.bool_]]]:
    """By method and seed which test images the SVM tells."""
    seeds = measures.scale.seeds
    return {
        method: [unpack(measures.score(method, seed, target)["right"]) for seed in seeds] for method in measures.methods
    }


def _accuracies(measures: Measures, table: str) -> Exhibit:
    target = TABLES[table]
    answers = _answers(measures, target)
    paper = PAPER_NUMBERS[target]
    rows = []
    for method, found in answers.items():
        against = None if method == "erm" else compare(found, answers["erm"])
        row = {
            "method": _TITLES[method],
            "paper": f"{paper[method][0]:.2f} ± {paper[method][1]:.2f}" if method in paper else "",
            "here": _spread([100 * float(right.mean()) for right in found]),
            "seeds": len(found),
            "paper, minus ERM": f"{paper[method][0] - paper['erm'][0]:+.2f}" if against and method in paper else "",
        }
        rows.append({**row, **_compared(against), "verdict": against.mark if against else ""})
    tau, lam = measures.chosen
    return Exhibit(
        f"{table}{measures.study.suffix}",
        f"Table {table[-1]}: SVM accuracy in % on {measures.study.target_title(target)}; pre-trained on "
        f"{measures.study.title}",
        rows,
        notes=[
            f"tau = {tau:g} and lambda = {lam:g}, chosen on held-out training images. "
            "Deviations are over seeds (n - 1). Rules and intervals: docs/protocol.md."
        ],
    )


def _verdicts(measures: Measures) -> Exhibit:
    marks: dict[str, list[str]] = {method: [] for method in measures.methods if method != "erm"}
    rows: dict[str, dict[str, str]] = {method: {"method": _TITLES[method]} for method in marks}
    for target in TABLES.values():
        answers = _answers(measures, target)
        for method, row in rows.items():
            result = compare(answers[method], answers["erm"])
            row[measures.study.target_title(target)] = f"{100 * result.difference:+.2f} {result.mark}"
            marks[method].append(result.mark)
    of_paper = [mark for method in METHODS if method != "erm" for mark in marks[method]]
    counts = ", ".join(f"{of_paper.count(mark)} {mark}" for mark in ("holds", "fails", "undecided"))
    return Exhibit(
        f"verdicts{measures.study.suffix}",
        f"SVM accuracy minus ERM's, in points; pre-trained on {measures.study.title}",
        list(rows.values()),
        notes=[
            f"Of the paper's {len(of_paper)} comparisons: {counts}. docs/protocol.md defines these marks."
            f"{' The other rows are controls.' if len(measures.methods) > len(METHODS) else ''}"
        ],
    )


def _spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and deviation over seeds."""
    mean = f"{np.mean(values):.{digits}f}"
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else mean


def _compared(result: Comparison | None) -> dict[str, str]:
    def interval(ends: tuple[float, float] | None) -> str:
        return "" if ends is None else f"{100 * ends[0]:+.2f} to {100 * ends[1]:+.2f}"

    if result is None:
        return dict.fromkeys(("here, minus ERM", "95 % over seeds", "95 % over images"), "")
    return {
        "here, minus ERM": f"{100 * result.difference:+.2f}",
        "95 % over seeds": interval(result.over_seeds),
        "95 % over images": interval(result.over_images),
    }


def _figure3(measures: Measures) -> Exhibit:
    scale = measures.scale
    rows, panels = [], []
    for target in scale.targets:
        curves = []
        for method in CORRUPTED:
            errors = [100 * error for error in measures.finetuned(method, target)["test_error"]]
            rows.append({"target": measures.study.target_title(target), "from": _TITLES[method],
                         "test error in %, last epoch": f"{errors[-1]:.2f}"})  # fmt: skip
            curves.append(Curve(_TITLES[method], list(enumerate(errors, 1))))
        panels.append(Panel(measures.study.target_title(target), "epoch", "test error in %", curves))
    return Exhibit(
        f"fig3{measures.study.suffix}", f"Figure 3: fine-tuning from {measures.study.title}, one seed", rows, panels
    )


def _figure4(measures: Measures) -> Exhibit:
    rows, curves = [], []
    for label, method, tau in measures.step_models():
        shares = measures.by_step(method, tau)
        if shares is None:
            rows.append({"model": f"{label}, diverged"})
            continue
        points = [(step, 100 * share) for step, share in zip(measures.scale.steps, shares, strict=True)]
        rows.append({"model": label, **{f"step {step:g}": f"{value:.2f}" for step, value in points}})
        curves.append(Curve(label, points))
    return Exhibit(
        "fig4", f"Figure 4: accuracy in % on moved validation images, by step; {measures.study.selection_title}",
        rows, [Panel("", "length of the step at 224 px", "accuracy in %", curves)],
    )  # fmt: skip


def _figure5(measures: Measures) -> Exhibit:
    rows, curves = [], []
    for label, method, lam in measures.concept_models():
        cell = measures.by_class(method, lam)
        if cell is None:
            rows.append({"model": f"{label}, diverged"})
            continue
        by_concept, by_class = (
            sorted(cell[kind].items(), key=lambda item: item[1]) for kind in ("by_concept", "by_class")
        )
        (low, low_share), (high, high_share), (worst, worst_share) = by_concept[0], by_concept[-1], by_class[0]
        tenth = [share for _, share in by_class[: max(1, len(by_class) // 10)]]
        rows.append({"model": label, "worst concept": f"{low} {100 * low_share:.2f}",
                     "best concept": f"{high} {100 * high_share:.2f}",
                     "deviation over concepts": f"{100 * np.std([share for _, share in by_concept]):.2f}",
                     "worst class": f"{worst} {100 * worst_share:.2f}",
                     "worst tenth of classes": f"{100 * np.mean(tenth):.2f}",
                     **{concept: f"{100 * share:.2f}" for concept, share in sorted(by_concept)}})  # fmt: skip
        curves.append(Curve(label, [(place, 100 * share) for place, (_, share) in enumerate(by_concept, 1)]))
    return Exhibit(
        "fig5", f"Figure 5: accuracy in % by concept, sorted; {measures.study.selection_title}", rows,
        [Panel("", "concepts, from worst to best", "accuracy in %", curves)],
    )  # fmt: skip


def _selection(measures: Measures) -> Exhibit:
    chosen = dict(zip(("el", "cl"), measures.chosen, strict=True))
    shares: dict[tuple[str, float], dict[str, float | None]] = {}
    for method, value, target in measures.grid():
        share = measures.held_out(method, value, target)
        shares.setdefault((method, value), {})[measures.study.target_title(target)] = share
    rows = []
    for (method, value), by_target in shares.items():
        row = {"model": f"{_TITLES[method]}, {'tau' if method == 'el' else 'lambda'} {value:g}"}
        row |= {title: "diverged" if share is None else f"{100 * share:.2f}" for title, share in by_target.items()}
        told = [100 * share for share in by_target.values() if share is not None]
        row["mean"] = f"{np.mean(told):.2f}" if len(told) == len(by_target) else ""
        rows.append({**row, "chosen": "yes" if value == chosen[method] else ""})
    return Exhibit(
        "selection", f"Selection: SVM accuracy in % on held-out training images; {measures.study.selection_title}", rows
    )


def _opinions(measures: Measures) -> Exhibit:
    rows = []
    for target in measures.scale.targets:
        for method in measures.methods:
            cells = [measures.opinions(method, seed, target) for seed in measures.scale.seeds]
            balanced = [measures.score(method, seed, target)["balanced_accuracy"] for seed in measures.scale.seeds]
            row = {"target": measures.study.target_title(target), "method": _TITLES[method]}
            row["SVM, balanced"] = _spread([100 * share for share in balanced])
            for key, title in (("naive_bayes", "naive Bayes"), ("neighbours", "neighbours")):
                row[title] = _spread([100 * cell[key]["accuracy"] for cell in cells])
            for count in FEW_SHOTS:
                few = [cell["few_shot"].get(str(count)) for cell in cells]
                row[f"{count}-shot"] = _spread([100 * curve["accuracy"] for curve in few]) if all(few) else ""
            row["LIBSVM / LinearSVC"] = libsvm_cell(cells[0]["libsvm"])
            rows.append(row)
    return Exhibit(
        f"opinions{measures.study.suffix}",
        f"Second opinions, accuracy in %; pre-trained on {measures.study.title}",
        rows,
        notes=[
            "LIBSVM is one against one with the hinge loss, on at most 5,000 training rows of the first seed. An "
            "asterisk marks a solver that was stopped before convergence. A plus sign marks C and scaling from "
            "LinearSVC instead of its own choice."
        ],
    )  # fmt: skip


def _corruptions(measures: Measures) -> Exhibit:
    rows, panels, scale = [], [], measures.scale
    for target in scale.targets:
        told, curves = {}, []
        for method in CORRUPTED:
            cells = [measures.corrupted(method, seed, target) for seed in scale.seeds]
            told[method] = [np.frombuffer(bytes.fromhex(cell["told"]), np.uint8) / _CORRUPTIONS for cell in cells]
            row = {"target": measures.study.target_title(target), "method": _TITLES[method]}
            row |= {key: _spread([100 * cell[key] for cell in cells]) for key in ("clean", "corrupted")}
            row |= {key: _spread([cell[key] for cell in cells], 4) for key in ("kept", "drift")}
            against = None if method == "erm" else compare(told[method], told["erm"])
            renamed = {"here, minus ERM": "corrupted, minus ERM"}
            rows.append({**row, **{renamed.get(key, key): value for key, value in _compared(against).items()}})
            by_kind = [cell["by_corruption"].values() for cell in cells]
            points = [(0.0, 100 * float(np.mean([cell["clean"] for cell in cells])))]
            for severity in SEVERITIES:
                shares = [kind[str(severity)]["accuracy"] for kinds in by_kind for kind in kinds]
                points.append((severity, 100 * float(np.mean(shares))))
            curves.append(Curve(_TITLES[method], points))
        panels.append(Panel(measures.study.target_title(target), "severity", "SVM accuracy in %", curves))
    limit = "all" if scale.corrupted_rows is None else f"at most {scale.corrupted_rows:,}"
    return Exhibit(
        f"corruptions{measures.study.suffix}",
        f"Common corruptions: SVM accuracy in %; pre-trained on {measures.study.title}",
        rows,
        panels,
        [
            f"Measured on {limit} test images per target. Kept is corrupted / clean. Drift is 1 - cosine between the "
            "features of an image before and after. docs/evaluation.md describes both."
        ],
    )


EXHIBITS: dict[str, Callable[[Measures], Exhibit]] = {
    "verdicts": _verdicts,
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
"""By name."""
