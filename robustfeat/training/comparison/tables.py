"""A comparison of methods as Markdown, CSV, LaTeX and a forest plot."""

from __future__ import annotations

import csv
import io
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from robustfeat.files import new_file
from robustfeat.hub.markdown import columns, table
from robustfeat.serving.inputs.sources import printable
from robustfeat.training.comparison.methods import Result
from robustfeat.training.comparison.statistics import Interval
from robustfeat.training.evaluation.figures import Forest, draw

__all__ = ["comparison_rows", "forest", "latex", "objects", "percent_interval", "spread", "write_comparison"]

_LABEL = 45  # characters of a line below a plot
_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
    **{mark: f"\\{mark}" for mark in "&%$#_{}"},
}  # fmt: skip


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and deviation over seeds."""
    mean = f"{np.mean(values):.{digits}f}"
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else mean


def percent_interval(ends: Interval | None) -> str:
    """An interval of shares, in points."""
    return "" if ends is None else f"{100 * ends[0]:+.2f} to {100 * ends[1]:+.2f}"


def p_value(p: float | None) -> str:
    """With four digits."""
    return "" if p is None else f"{p:.4f}" if p >= 0.00005 else "< 0.0001"


def comparison_rows(results: Sequence[Result], baseline: str) -> list[dict[str, str]]:
    """Cells by column, in percent. Columns without any number are left out."""
    rows = []
    for result in results:
        estimate = result.pooled or result.paired
        fitted = {
            title: spread([100 * value for value in result.runs.fitted[key]]) if key in result.runs.fitted else ""
            for key, title in (("training_accuracy", "training"), ("validation_accuracy", "validation"))
        }
        rows.append({
            "task": printable(result.task),
            "method": printable(result.method),
            "runs": str(len(result.runs.accuracies)),
            "accuracy": spread([100 * value for value in result.runs.accuracies]),
            **fitted,
            f"minus {baseline}": f"{100 * estimate.mean:+.2f}" if estimate else "",
            "95 % paired": percent_interval(result.paired.interval if result.paired else None),
            "95 % pooled": percent_interval(result.pooled.interval if result.pooled else None),
            "95 % over images": percent_interval(result.over_images),
            "p": p_value(result.p),
            "p, Holm": p_value(result.holm),
        })  # fmt: skip
    optional = ("training", "validation", "95 % paired", "95 % pooled", "95 % over images", "p", "p, Holm")
    empty = {key for key in optional if not any(row[key] for row in rows)}
    return [{key: value for key, value in row.items() if key not in empty} for row in rows]


def objects(results: Sequence[Result], baseline: str) -> list[dict[str, Any]]:
    """Plain data for JSON and CSV, in shares; None for whatever is unknown."""
    return [
        {
            "task": result.task,
            "method": result.method,
            "baseline": baseline,
            "seeds": " ".join("" if seed is None else str(seed) for seed in result.runs.seeds),
            "runs": len(accuracies := result.runs.accuracies),
            "accuracy": float(np.mean(accuracies)),
            "deviation": float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else None,
            **{
                key: float(np.mean(result.runs.fitted[key])) if key in result.runs.fitted else None
                for key in ("training_accuracy", "validation_accuracy")
            },
            "difference": result.pooled.mean if result.pooled else None,
            **_ends("paired", result.paired.interval if result.paired else None),
            **_ends("pooled", result.pooled.interval if result.pooled else None),
            **_ends("images", result.over_images),
            "p": result.p,
            "p_holm": result.holm,
        }
        for result in results
    ]


def _ends(name: str, interval: Interval | None) -> dict[str, float | None]:
    low, high = interval or (None, None)
    return {f"{name}_low": low, f"{name}_high": high}


def latex(rows: Sequence[Mapping[str, str]]) -> str:
    """A table for the package booktabs."""
    names = columns(rows)
    lines = [" & ".join(_escaped(row.get(name, "")) for name in names) + r" \\" for row in rows]
    head = " & ".join(map(_escaped, names)) + r" \\"
    return "\n".join([
        rf"\begin{{tabular}}{{{'l' * len(names)}}}", r"\toprule", head, r"\midrule", *lines, r"\bottomrule",
        r"\end{tabular}", "",
    ])  # fmt: skip


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(mark, mark) for mark in text)


def forest(results: Sequence[Result], baseline: str, interval: str) -> list[Forest]:
    """A panel for each task with the differences from the baseline, in points."""
    panels = []
    for task in dict.fromkeys(result.task for result in results):
        rows = [
            (printable(result.method), 100 * found.mean, found.interval and _in_points(found.interval))
            for result in results
            if result.task == task and (found := result.of(interval))
        ]
        label = textwrap.fill(f"points minus {printable(baseline)}, 95 % {interval}", _LABEL)
        panels.append(Forest(printable(task), label, rows))
    return panels


def _in_points(interval: Interval) -> Interval:
    return 100 * interval[0], 100 * interval[1]


def write_comparison(results: Sequence[Result], baseline: str, interval: str, file: Path) -> None:
    """Writes a file in the format of its suffix: .csv, .md, .tex, .json, .png or .svg."""
    kind = file.suffix
    if kind in {".png", ".svg"}:
        content = draw(forest(results, baseline, interval), kind[1:], "comparison")
    elif kind == ".csv":
        text, rows = io.StringIO(), objects(results, baseline)
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        content = text.getvalue().encode("utf-8", "surrogateescape")
    elif kind == ".json":
        content = (json.dumps(objects(results, baseline), indent=1) + "\n").encode()
    else:
        rows_of_text = comparison_rows(results, baseline)
        content = (latex(rows_of_text) if kind == ".tex" else table(rows_of_text)).encode()
    with new_file(file) as partial:
        partial.write_bytes(content)
