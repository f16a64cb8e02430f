"""The comparisons with ERM: Tables 2 to 4, the verdicts, and the same with other statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.training.comparison.methods import Runs, compare_methods
from robustfeat.training.comparison.statistics import Comparison, compare
from robustfeat.training.comparison.tables import comparison_rows, forest, percent_interval, spread
from robustfeat.training.evaluation.answers import unpack
from robustfeat.training.paper.equivalence import cell_columns, compare_targets, equivalence
from robustfeat.training.paper.exhibit import TITLES, Exhibit
from robustfeat.training.paper.measures import Measures
from robustfeat.training.paper.scale import CONTROLS, METHODS, PAPER_NUMBERS, TABLES

__all__ = ["accuracies", "compared", "exploratory", "fitted", "fitted_note", "verdicts"]


def _answers(measures: Measures, target: str) -> dict[str, list[NDArray[np.bool_]]]:
    """By method and seed which test images the SVM tells."""
    seeds = measures.scale.seeds
    return {
        method: [unpack(measures.score(method, seed, target)["right"]) for seed in seeds] for method in measures.methods
    }


def fitted(cells: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Columns with the accuracies of the runs on their own images; none for cells that were made without."""
    columns = {"training_accuracy": "training", "validation_accuracy": "validation"}
    return {
        title: spread([100 * cell[key] for cell in cells])
        for key, title in columns.items()
        if all(key in cell for cell in cells)
    }


def fitted_note(rows: Sequence[Mapping[str, Any]]) -> str:
    """What these columns are, or that they are missing."""
    lacking = [row for row in rows if "training" not in row or "validation" not in row]
    if len(lacking) == len(rows):
        return "The training and validation accuracy of these runs were not recorded."
    note = (
        "Training and validation: accuracy in % on the benchmark's own images. Training is the mean over the last "
        "epoch, on the cropped and moved images of training."
    )
    return f"{note} Empty cells were not recorded." if lacking else note


def accuracies(measures: Measures, table: str) -> Exhibit:
    """One of Tables 2 to 4."""
    target = TABLES[table]
    answers = _answers(measures, target)
    paper = PAPER_NUMBERS[target]
    cells = None if measures.scale.margin is None else compare_targets(measures)
    rows = []
    for method, found in answers.items():
        against = None if method == "erm" else compare(found, answers["erm"])
        row = {
            "method": TITLES[method],
            "paper": f"{paper[method][0]:.2f} ± {paper[method][1]:.2f}" if method in paper else "",
            "here": spread([100 * float(right.mean()) for right in found]),
            "seeds": len(found),
            **fitted([measures.score(method, seed, target) for seed in measures.scale.seeds]),
            "paper, minus ERM": f"{paper[method][0] - paper['erm'][0]:+.2f}" if against and method in paper else "",
        }
        if cells is None:
            row |= {**compared(against), "verdict": against.mark if against else ""}
        else:
            row |= cell_columns(cells.get((method, target)))
        rows.append(row)
    return Exhibit(
        f"{table}{measures.study.suffix}",
        f"Table {table[-1]}: SVM accuracy in % on {measures.study.target_title(target)}; pre-trained on "
        f"{measures.study.title}",
        rows,
        notes=[
            f"{_chosen(measures)}Deviations are over seeds (n - 1). Rules and intervals: docs/protocol.md.",
            fitted_note(rows),
        ],
    )


def _chosen(measures: Measures) -> str:
    """A sentence with the values that the methods of the table have."""
    named = zip(("tau", "lambda"), measures.chosen, strict=True)
    values = [f"{name} = {value:g}" for name, value in named if value is not None]
    return f"{' and '.join(values)}, chosen on held-out training images. " if values else ""


def verdicts(measures: Measures) -> Exhibit:
    """All comparisons with ERM, marked as docs/protocol.md says."""
    if measures.scale.margin is not None:
        return equivalence(measures)
    marks: dict[str, list[str]] = {method: [] for method in measures.methods if method != "erm"}
    rows: dict[str, dict[str, str]] = {method: {"method": TITLES[method]} for method in marks}
    for target in TABLES.values():
        answers = _answers(measures, target)
        for method, row in rows.items():
            result = compare(answers[method], answers["erm"])
            row[measures.study.target_title(target)] = f"{100 * result.difference:+.2f} {result.mark}"
            marks[method].append(result.mark)
    of_paper = [mark for method in METHODS for mark in marks.get(method, [])]
    counts = ", ".join(f"{of_paper.count(mark)} {mark}" for mark in ("holds", "fails", "undecided"))
    return Exhibit(
        f"verdicts{measures.study.suffix}",
        f"SVM accuracy minus ERM's, in points; pre-trained on {measures.study.title}",
        list(rows.values()),
        notes=[
            f"Of the paper's {len(of_paper)} comparisons: {counts}. docs/protocol.md defines these marks."
            f"{' The other rows are controls.' if _has_controls(measures) else ''}"
        ],
    )


def exploratory(measures: Measures) -> Exhibit:
    """The same comparisons with a pooled deviation, corrected for their number, and joined over the targets."""
    seeds = measures.scale.seeds
    tasks: dict[str, dict[str, Runs]] = {}
    marks: dict[tuple[str, str], str] = {}
    for target in TABLES.values():
        title = measures.study.target_title(target)
        answers = _answers(measures, target)
        tasks[title] = {
            TITLES[method]: Runs([float(right.mean()) for right in found], seeds, found)
            for method, found in answers.items()
        }
        marks |= {
            (title, TITLES[method]): compare(found, answers["erm"]).mark
            for method, found in answers.items()
            if method != "erm"
        }
    erm, controls = TITLES["erm"], [TITLES[method] for method in CONTROLS]
    results = [result for result in compare_methods(tasks, erm, apart=controls) if result.method != erm]
    rows = [
        {**row, "verdict": marks.get((result.task, result.method), "")}
        for row, result in zip(comparison_rows(results, erm), results, strict=True)
    ]
    many = _has_controls(measures)
    count = len(TABLES) * sum(method in METHODS for method in measures.methods if method != "erm")
    return Exhibit(
        f"exploratory{measures.study.suffix}",
        f"Exploratory: SVM accuracy minus ERM's, in points, with a pooled deviation; pre-trained on "
        f"{measures.study.title}",
        rows,
        forest(results, erm, "pooled"),
        [
            f"Not preregistered. One deviation over seeds is pooled over the {len(measures.methods)} methods of a "
            "target, which assumes that it is equal for all. p is of the pooled interval. Holm's correction is for the "
            f"paper's {count} comparisons{', and a second one for the controls' if many else ''}. The last rows "
            "join the targets. Verdicts are the preregistered marks of docs/protocol.md."
        ],
    )


def _has_controls(measures: Measures) -> bool:
    return not set(measures.methods) <= set(METHODS)


def compared(result: Comparison | None) -> dict[str, str]:
    """Columns of a comparison, empty for the baseline."""
    if result is None:
        return dict.fromkeys(("here, minus ERM", "95 % over seeds", "95 % over images"), "")
    return {
        "here, minus ERM": f"{100 * result.difference:+.2f}",
        "95 % over seeds": percent_interval(result.over_seeds),
        "95 % over images": percent_interval(result.over_images),
    }
