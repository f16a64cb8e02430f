"""The paper's tables and figures as data: what each needs, and what comes out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from robustfeat.training.comparison.statistics import compare
from robustfeat.training.comparison.tables import spread
from robustfeat.training.concepts import load_concepts
from robustfeat.training.evaluation.corruptions import CORRUPTIONS, SEVERITIES
from robustfeat.training.evaluation.figures import Curve, Panel
from robustfeat.training.evaluation.probes import FEW_SHOTS
from robustfeat.training.evaluation.report import libsvm_cell
from robustfeat.training.paper.comparisons import accuracies, compared, exploratory, fitted, fitted_note, verdicts
from robustfeat.training.paper.exhibit import TITLES, Exhibit
from robustfeat.training.paper.gate import gate
from robustfeat.training.paper.measures import Measures
from robustfeat.training.paper.scale import TABLES

__all__ = ["EXHIBITS"]

_TABLE1 = {
    "Animal": 121, "Artifact": 107, "Bird": 59, "Container": 56, "Device": 129, "Dog": 118, "Instrumentality": 106,
    "Mammal": 100, "Structure": 57, "Vehicle": 67, "Others": 80,
}  # fmt: skip
_FIGURE2_PEAKS = {100: 755, 150: 1534, 200: 2550, 300: 5253}
"""Values by mu, read from the derivative of h, since the figure has no numbers."""

_CORRUPTIONS = len(CORRUPTIONS) * len(SEVERITIES)


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


def _figure3(measures: Measures) -> Exhibit:
    scale = measures.scale
    rows, panels = [], []
    for target in scale.targets:
        curves = []
        for method in measures.corrupted_methods:
            cell = measures.finetuned(method, target)
            errors = [100 * error for error in cell["test_error"]]
            rows.append({"target": measures.study.target_title(target), "from": TITLES[method],
                         "test error in %, last epoch": f"{errors[-1]:.2f}", **fitted([cell])})  # fmt: skip
            curves.append(Curve(TITLES[method], list(enumerate(errors, 1))))
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
    if measures.scale.folds:
        return _selection_by_folds(measures)
    chosen = dict(zip(("el", "cl"), measures.chosen, strict=True))
    tried = [("erm", None), *dict.fromkeys((method, value) for method, value, _ in measures.grid())]
    rows = []
    for method, value in tried:
        row = {"model": TITLES[method]}
        if value is not None:
            row["model"] += f", {'tau' if method == 'el' else 'lambda'} {value:g}"
        cells = [measures.held_out_cell(method, value, target) for target in measures.scale.targets]
        for target, cell in zip(measures.scale.targets, cells, strict=True):
            # ERM decides nothing, so that older reports lack it.
            shown = "not measured" if cell is None else "diverged"
            if cell is not None and "held_out" in cell:
                shown = f"{100 * cell['held_out']:.2f}"
            row[measures.study.target_title(target)] = shown
        told = [100 * cell["held_out"] for cell in cells if cell is not None and "held_out" in cell]
        row["mean"] = f"{np.mean(told):.2f}" if len(told) == len(cells) else ""
        row["chosen"] = "yes" if value is not None and value == chosen[method] else ""
        rows.append({**row, **(fitted([cells[0]]) if cells[0] else {})})
    title = f"Selection: SVM accuracy in % on held-out training images; {measures.study.selection_title}"
    return Exhibit("selection", title, rows, notes=[fitted_note(rows)])


def _selection_by_folds(measures: Measures) -> Exhibit:
    study, scale = measures.study, measures.scale
    chosen = dict(zip(("el", "cl"), measures.chosen, strict=True))
    rows = []
    for method, value in dict.fromkeys(one[:2] for one in measures.grid()):
        row = {"model": f"{TITLES[method]}, {'tau' if method == 'el' else 'lambda'} {value:g}"}
        for target in scale.targets:
            own = measures.fold_means(method, value, [target])
            row[study.target_title(target)] = f"{100 * own.mean:.2f}" if own else "diverged"
        scores = measures.fold_means(method, value)
        row["mean"] = f"{100 * scores.mean:.2f}" if scores else ""
        row["standard error"] = f"{100 * scores.error:.2f}" if scores else ""
        row["chosen"] = "yes" if value == chosen[method] else ""
        rows.append(row)
    title = f"Selection: SVM accuracy in % on five folds of the training images; {study.selection_title_of_all_seeds}"
    note = (
        "Chosen is the smallest tau and the largest lambda within one standard error of the best mean. The error is "
        "over the folds, each a mean over targets and seeds."
    )
    return Exhibit("selection", title, rows, notes=[note])


def _opinions(measures: Measures) -> Exhibit:
    rows = []
    for target in measures.scale.targets:
        for method in measures.methods:
            cells = [measures.opinions(method, seed, target) for seed in measures.scale.seeds]
            balanced = [measures.score(method, seed, target)["balanced_accuracy"] for seed in measures.scale.seeds]
            row = {"target": measures.study.target_title(target), "method": TITLES[method]}
            row["SVM, balanced"] = spread([100 * share for share in balanced])
            for key, title in (("naive_bayes", "naive Bayes"), ("neighbours", "neighbours")):
                row[title] = spread([100 * cell[key]["accuracy"] for cell in cells])
            for count in FEW_SHOTS:
                few = [cell["few_shot"].get(str(count)) for cell in cells]
                row[f"{count}-shot"] = spread([100 * curve["accuracy"] for curve in few]) if all(few) else ""
            row["LIBSVM / LinearSVC"] = libsvm_cell(cells[0]["libsvm"])
            rows.append({**row, **fitted(cells)})
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
        for method in measures.corrupted_methods:
            cells = [measures.corrupted(method, seed, target) for seed in scale.seeds]
            told[method] = [np.frombuffer(bytes.fromhex(cell["told"]), np.uint8) / _CORRUPTIONS for cell in cells]
            row = {"target": measures.study.target_title(target), "method": TITLES[method]}
            row |= {key: spread([100 * cell[key] for cell in cells]) for key in ("clean", "corrupted")}
            row |= {key: spread([cell[key] for cell in cells], 4) for key in ("kept", "drift")}
            against = None if method == "erm" else compare(told[method], told["erm"])
            row |= fitted(cells)
            renamed = {"here, minus ERM": "corrupted, minus ERM"}
            rows.append({**row, **{renamed.get(key, key): value for key, value in compared(against).items()}})
            by_kind = [cell["by_corruption"].values() for cell in cells]
            points = [(0.0, 100 * float(np.mean([cell["clean"] for cell in cells])))]
            for severity in SEVERITIES:
                shares = [kind[str(severity)]["accuracy"] for kinds in by_kind for kind in kinds]
                points.append((severity, 100 * float(np.mean(shares))))
            curves.append(Curve(TITLES[method], points))
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
    "gate": gate,
    "verdicts": verdicts,
    "exploratory": exploratory,
    "table1": _table1,
    **{table: partial(accuracies, table=table) for table in TABLES},
    "fig2": _figure2,
    "fig3": _figure3,
    "fig4": _figure4,
    "fig5": _figure5,
    "selection": _selection,
    "opinions": _opinions,
    "corruptions": _corruptions,
}
"""Exhibits by name."""
