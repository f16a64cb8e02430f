"""Robustness cards as tables, as files, and as results for a model card."""

from __future__ import annotations

import csv
import io
import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from robustfeat.counts import format_count
from robustfeat.files import new_file
from robustfeat.hub.markdown import table
from robustfeat.serving.inputs.sources import printable
from robustfeat.training.evaluation.corruptions import SEVERITIES
from robustfeat.training.evaluation.figures import Curve, Panel, draw

__all__ = ["FORMATS", "card_results", "corruption_rows", "robustness_markdown", "robustness_rows", "write_robustness"]

FORMATS = (".csv", ".md", ".json", ".png", ".svg")
"""Suffixes of a card's files."""

Result = Mapping[str, Any]


def robustness_rows(results: Sequence[Result]) -> list[dict[str, str]]:
    """A row for each model and task. Columns without any number are left out."""
    rows = [_row(result) for result in results]
    empty = {key for key in rows[0] if not any(row[key] for row in rows)}
    return [{key: value for key, value in row.items() if key not in empty} for row in rows]


def _row(result: Result) -> dict[str, str]:
    card = result["robustness"]
    aurocs = [value for value in card["auroc"].values() if value is not None]
    attack = card["attack"]
    return {
        "model": printable(result["model"]),
        "task": printable(result["task"]),
        "clean": _percent(card["clean"]),
        "corrupted": _percent(card["corrupted"]),
        **{title: _group(card[key]) for title, key in _GROUPS.items()},
        "ECE": _percent(card["ece"]),
        "ECE, corrupted": _percent(card["ece_corrupted"]),
        "moved": _number(card["moved"], 2),
        "AUROC, other tasks": _number(float(np.mean(aurocs)) if aurocs else None, 3),
        "AUROC, corrupted": _number(card["auroc_corrupted"], 3),
        "attack, L2": _number(attack.get("l2"), 3),
        "attack, levels": _number(attack.get("levels"), 2),
    }


_GROUPS = {
    "worst class": "worst_class",
    "worst class, corrupted": "worst_class_corrupted",
    "worst concept": "worst_concept",
}


def corruption_rows(results: Sequence[Result]) -> list[dict[str, str]]:
    """The accuracy in % by corruption, and by severity, for each model and task."""
    return [
        {
            "model": printable(result["model"]),
            "task": printable(result["task"]),
            **{name: _percent(_mean_accuracy(kind.values())) for name, kind in by_corruption.items()},
            **{
                f"severity {severity}": _percent(_mean_accuracy(kind[str(severity)] for kind in by_corruption.values()))
                for severity in SEVERITIES
            },
        }
        for result in results
        if (by_corruption := result["robustness"]["by_corruption"])
    ]


def notes(results: Sequence[Result]) -> list[str]:
    """What the numbers rest on."""
    most = max(result["robustness"]["images"] for result in results)
    lines = [
        f"Accuracies and ECE are in %, on at most {format_count(most, 'test image')} per task and corruption. "
        "They come from a linear SVM on frozen features of clean training images. Corrupted figures are means over "
        "all corruptions at severities 1 to 5.",
        "A worst class or concept has its number of test images in brackets. Moved is how far a corruption moves an "
        "image's centred features, over the distance to the nearest other image. It is a median.",
    ]
    attacks = [result["robustness"]["attack"] for result in results]
    if done := [attack for attack in attacks if "method" in attack]:
        most = max(attack["images"] for attack in done)
        lines.append(
            f"Attack is the median distance to another answer by {done[0]['method']}, on at most "
            f"{format_count(most, 'image')}. L2 is for pixels from 0 to 1, and levels are of 255 per value."
        )
    reasons = {
        (printable(result["model"]), reason)
        for result in results
        if (reason := result["robustness"]["attack"].get("left_out"))
    }
    return lines + [f"No attack on {model}, because {reason}." for model, reason in sorted(reasons)]


def robustness_markdown(results: Sequence[Result]) -> str:
    """Both tables and the notes, as a section of a document."""
    lines = [textwrap.fill(note, 100, break_on_hyphens=False) for note in notes(results)]
    tables = [table(robustness_rows(results)), table(corruption_rows(results))]
    return "\n".join(["## Robustness", "", *tables, "\n\n".join(lines)]) + "\n"


def card_results(results: Sequence[Result]) -> dict[str, Any]:
    """Results for a model card, as `export_run` takes them."""
    return {
        "Robustness": robustness_rows(results),
        "Accuracy in % on corrupted images": corruption_rows(results),
        "How robustness was measured": " ".join(notes(results)),
    }


def write_robustness(results: Sequence[Result], file: Path) -> None:
    """Writes a file in the format of its suffix, one of `FORMATS`."""
    kind = file.suffix
    if kind in {".png", ".svg"}:
        content = draw(_panels(results), kind[1:], "robustness")
    elif kind == ".csv":
        text, rows = io.StringIO(), list(_conditions(results))
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        content = text.getvalue().encode("utf-8", "surrogateescape")
    elif kind == ".json":
        content = (json.dumps(card_results(results), indent=1) + "\n").encode()
    else:
        content = robustness_markdown(results).encode()
    with new_file(file) as partial:
        partial.write_bytes(content)


def _conditions(results: Sequence[Result]) -> Iterator[dict[str, Any]]:
    """A row for each model, task, corruption and severity, in shares. Severity 0 is the clean image."""
    for result in results:
        card, named = result["robustness"], {"model": result["model"], "task": result["task"]}
        clean = {"accuracy": card["clean"], "ece": card["ece"], "auroc": None, "moved": None}
        yield {**named, "corruption": "clean", "severity": 0, **clean}
        for name, kind in card["by_corruption"].items():
            for severity, condition in kind.items():
                yield {**named, "corruption": name, "severity": int(severity), **condition}


def _panels(results: Sequence[Result]) -> list[Panel]:
    """The accuracy by severity, a panel for each task and a line for each model."""
    panels = []
    for task in dict.fromkeys(result["task"] for result in results):
        curves = [
            Curve(printable(result["model"]), [(0, 100 * card["clean"]), *_by_severity(card)])
            for result in results
            if result["task"] == task and (card := result["robustness"])
        ]
        panels.append(Panel(printable(task), "severity of corruptions", "accuracy in %", curves))
    return panels


def _by_severity(card: Result) -> list[tuple[float, float]]:
    kinds = card["by_corruption"].values()
    return [(severity, 100 * _mean_accuracy(kind[str(severity)] for kind in kinds)) for severity in SEVERITIES]


def _mean_accuracy(conditions: Iterable[Result]) -> float:
    return float(np.mean([condition["accuracy"] for condition in conditions]))


def _group(group: Result | None) -> str:
    return f"{printable(group['name'])} {_percent(group['accuracy'])} ({group['images']:,})" if group else ""


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
