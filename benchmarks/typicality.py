"""How well typicality tells images of other classes and of other data sets: the table in docs/heads.md.

    python benchmarks/typicality.py NAME=FEATS:DATA.parquet:COLUMN:CLASSES ... [--rows N] [--few N] [--out FILE.json]

FEATS are features that `embed` wrote of the images in DATA.parquet, and COLUMN holds their labels. Of the first N rows
of each data set, those of the first CLASSES classes, by name, are known. 70 % of them, drawn with seed 0, are fitted
with C = 0.1 and l2 scaling; the others are unseen. `--few` adds a head of so few rows, for the data sets with the most
of them.

Printed for each head, with images rejected below a typicality of 0.05:
- false alarms: the share of unseen rows that are rejected;
- other classes: AUROC of typicality, unseen rows against those of the other classes, and the share rejected of these;
- other data sets: the same for at most 2,000 rows of each.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from machine import hardware
from robustfeat.hub.markdown import table
from robustfeat.serving.heads.features import Features, load
from robustfeat.serving.heads.fitting.fit import fit_head
from robustfeat.serving.heads.head import Head
from robustfeat.serving.heads.labels.matching import LabelledRows, match_labels
from robustfeat.serving.heads.labels.reading import read_labels

LEAST = 0.05
FITTED = 0.7
OTHERS = 2000


@dataclass(frozen=True)
class DataSet:
    """Features, the first rows of them with labels, and how many classes are known."""

    name: str
    features: Features
    labelled: LabelledRows
    known: int

    @classmethod
    def parse(cls, text: str, rows: int) -> DataSet:
        """From NAME=FEATS:DATA.parquet:COLUMN:CLASSES."""
        name, _, rest = text.partition("=")
        place, file, column, known = rest.split(":")
        features = load(place)
        labelled = match_labels(features, read_labels([f"{file}:{column}"]))
        is_first = labelled.rows < rows
        first = replace(labelled, rows=labelled.rows[is_first], targets=labelled.targets[is_first])
        return cls(name, features, first, int(known))

    def values(self, places: NDArray[np.int64]) -> NDArray[np.float32]:
        """Features of these places among the labelled rows."""
        return self.features.values[self.labelled.rows[places]]


def fit(data: DataSet, places: NDArray[np.int64]) -> Head:
    """A head of these places, which are of known classes."""
    some = replace(
        data.labelled,
        rows=data.labelled.rows[places],
        targets=data.labelled.targets[places],
        classes=data.labelled.classes[: data.known],
    )
    return fit_head(data.features, some, cs=(0.1,), scalings=("l2",))[0]


def measure(data: DataSet, others: list[DataSet], count: int | None) -> dict[str, Any]:
    """Figures of one head, fitted on 70 % of the rows of known classes or on `count` of them."""
    draw = np.random.default_rng(0)
    is_known = data.labelled.targets < data.known
    order = draw.permutation(np.flatnonzero(is_known))
    unseen_from = round(FITTED * len(order))
    fitted = np.sort(order[: count or unseen_from])
    head = fit(data, fitted)
    unseen = head.typicality(data.values(np.sort(order[unseen_from:])))

    def compare(values: NDArray[np.float32]) -> dict[str, float]:
        found = head.typicality(values)
        is_unseen = np.repeat([1, 0], [len(unseen), len(found)])
        auroc = roc_auc_score(is_unseen, np.concatenate([unseen, found]))
        return {"rows": len(found), "auroc": float(auroc), "rejected": float((found < LEAST).mean())}

    several = {one.name: one.values(np.arange(min(OTHERS, len(one.labelled.rows)))) for one in others}
    return {
        "data": data.name,
        "known": data.known,
        "classes": len(data.labelled.classes),
        "fitted": len(fitted),
        "unseen": len(unseen),
        "false_alarms": float((unseen < LEAST).mean()),
        "other_classes": compare(data.values(np.flatnonzero(~is_known))),
        "other_data": {name: compare(values) for name, values in several.items()},
    }


def row(found: dict[str, Any]) -> dict[str, str]:
    """A row of the table."""

    def text(one: dict[str, float]) -> str:
        return f"{one['auroc']:.2f}, {100 * one['rejected']:.0f} %"

    return {
        "fitted on": f"{found['data']}, {found['known']} of {found['classes']} classes",
        "images": f"{found['fitted']:,}",
        f"false alarms at {LEAST}": f"{100 * found['false_alarms']:.1f} %",
        "the other classes: AUROC, rejected": text(found["other_classes"]),
        "other data sets: AUROC, rejected": "; ".join(
            f"{text(one)} ({name})" for name, one in found["other_data"].items()
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", metavar="NAME=FEATS:DATA.parquet:COLUMN:CLASSES")
    parser.add_argument("--rows", type=int, default=6000, help="of each data set, the first ones")
    parser.add_argument("--few", type=int, default=40)
    parser.add_argument("--out", metavar="FILE.json")
    options = parser.parse_args()
    sets = [DataSet.parse(text, options.rows) for text in options.data]
    most = max(len(one.labelled.rows) for one in sets)
    found = []
    for data in sets:
        others = [one for one in sets if one is not data]
        found.append(measure(data, others, None))
        if options.few and len(data.labelled.rows) == most:
            found.append(measure(data, others, options.few))
    print(table([row(one) for one in found]))
    if options.out:
        Path(options.out).write_text(json.dumps({"heads": found, "hardware": hardware()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
