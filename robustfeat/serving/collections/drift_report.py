"""Drift as lines to read, as CSV and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from robustfeat.counts import format_count
from robustfeat.progress import json_line
from robustfeat.serving.collections.drift import ATYPICAL, Answers, Drift
from robustfeat.serving.heads.cells import csv_line
from robustfeat.serving.heads.features import Features
from robustfeat.serving.inputs.sources import path_fields

__all__ = ["headline", "remarks", "to_csv", "to_dict", "to_jsonl"]

_LISTED_IMAGES, _LISTED_CLASSES = 10, 5


def headline(drift: Drift, alpha: float) -> str:
    """The answer in one line."""
    found = drift.comparison
    verdict = "shift" if found.p < alpha else "no shift found"
    line = f"{verdict}: p {found.p:.3g}, distance {found.distance:.4f}"
    if drift.answers:
        old, new = drift.answers.reference_accuracy, drift.answers.new_accuracy
        line += f"; estimated accuracy {100 * new:.0f} %, {100 * old:.0f} % on the reference"
    return line


def remarks(drift: Drift, reference: Features, new: Features) -> Iterator[str]:
    """What was compared, and how the collections differ, some lines."""
    rows, total = drift.comparison.rows, [int(features.good.sum()) for features in (reference, new)]
    yield f"compared {_of(rows[0], total[0])} of {reference.place} with {_of(rows[1], total[1])} of {new.place}"
    if len(drift.rows) < total[1]:
        yield f"typicality of {_of(len(drift.rows), total[1])} of {new.place}"
    if drift.in_both:
        images = format_count(drift.in_both, "image is", "images are")
        yield f"{images} in both collections, which hides a part of the shift"
    if drift.answers:
        yield _say_shares(drift.answers)
    share = float((drift.typicality < ATYPICAL).mean())
    yield f"atypical images: {100 * share:.1f} %, about {100 * ATYPICAL:.0f} % without a shift; least typical:"
    for place in range(min(_LISTED_IMAGES, len(drift.rows))):
        yield f"  {drift.typicality[place]:.3g}  {new.paths[int(drift.rows[place])]}"


def _of(part: int, total: int) -> str:
    return (
        f"all {format_count(total, 'image')}"
        if part == total
        else f"{part:,} of the {total:,} images, drawn at random,"
    )


def _say_shares(answers: Answers) -> str:
    old, new = answers.reference_shares, answers.new_shares
    most = np.argsort(-np.abs(new - old), kind="stable")[:_LISTED_CLASSES]
    moves = ", ".join(f"{answers.classes[at]} {100 * old[at]:.1f} to {100 * new[at]:.1f} %" for at in most)
    return (
        f"classes: {100 * answers.moved:.0f} % of the images moved, "
        f"which explains {100 * answers.explained:.0f} % of the distance ({moves})"
    )


def to_dict(drift: Drift, reference: Features, new: Features, alpha: float) -> dict[str, Any]:
    """All of it, for JSON."""
    found = drift.comparison
    summary: dict[str, Any] = {
        "shift": found.p < alpha,
        "p": found.p,
        "alpha": alpha,
        "distance": found.distance,
        "permutations": found.permutations,
        "compared": {"reference": found.rows[0], "new": found.rows[1]},
        "rows": {"reference": len(reference), "new": len(new)},
        "failed": {"reference": len(reference.errors), "new": len(new.errors)},
        "in_both": drift.in_both,
        "measured": len(drift.rows),
        "atypical": float((drift.typicality < ATYPICAL).mean()),
        "least_typical": [_record(drift, new, place) for place in range(min(_LISTED_IMAGES, len(drift.rows)))],
    }
    answers = drift.answers
    if answers is None:
        return summary
    names = list(map(str, answers.classes))
    return summary | {
        "accuracy": {"reference": answers.reference_accuracy, "new": answers.new_accuracy},
        "shares": {
            "reference": dict(zip(names, answers.reference_shares.tolist(), strict=True)),
            "new": dict(zip(names, answers.new_shares.tolist(), strict=True)),
            "moved": answers.moved,
            "explained": answers.explained,
        },
    }


def to_csv(drift: Drift, new: Features) -> Iterator[str]:
    """A header, and a line per image that was measured, the least typical first: path, row, typicality, distance."""
    yield csv_line(["path", "row", "typicality", "distance"])
    for row, typicality, away in zip(drift.rows.tolist(), drift.typicality.tolist(), drift.away.tolist(), strict=True):
        yield csv_line([new.paths[row], row, typicality, away])


def to_jsonl(drift: Drift, new: Features) -> Iterator[str]:
    """The same as JSON lines."""
    for place in range(len(drift.rows)):
        yield json_line(_record(drift, new, place)) + "\n"


def _record(drift: Drift, new: Features, place: int) -> dict[str, Any]:
    """One image for JSON; `place` counts from the least typical one."""
    row = int(drift.rows[place])
    return {
        **path_fields(new.paths[row]),
        "row": row,
        "typicality": float(drift.typicality[place]),
        "distance": float(drift.away[place]),
    }
