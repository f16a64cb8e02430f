"""How well `robustfeat drift` finds shifts and estimates accuracy: the tables in docs/drift.md.

    python benchmarks/drift.py DATA ... --cache FOLDER [--model MODEL] [--precision int8] [--out FILE.json]

DATA are folders as `robustfeat train` takes them. At most 3,000 training images of each fit a head with C 0.1 and l2
scaling. At most 3,000 test images, in a random order, are cut into sets of 500. The first set is the reference, and the
others have no shift. Each corruption of `robustfeat evaluate --corruptions` at severities 1, 3 and 5 makes a shifted
set of the second set. The references of the other DATA are shifted sets, too. Sets of other shares have 250 of the test
images behind the reference, with shares by a Dirichlet distribution of concentration 1. False alarms are counted
between random halves of 1,000 test images. Features are kept in --cache.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from machine import hardware
from robustfeat.hub.markdown import table
from robustfeat.serving.collections.directions import to_units
from robustfeat.serving.collections.drift import Answers, measure_drift
from robustfeat.serving.collections.two_sample import compare_samples
from robustfeat.serving.engines.options import RunOptions
from robustfeat.serving.extractor import FeatureExtractor
from robustfeat.serving.heads.accuracy import estimate_accuracy
from robustfeat.serving.heads.features import Features
from robustfeat.serving.heads.fitting.fit import fit_head
from robustfeat.serving.heads.head import Head
from robustfeat.serving.heads.labels.labels import Labels
from robustfeat.serving.heads.labels.matching import match_labels
from robustfeat.training.data.image_set import ImageSet
from robustfeat.training.data.opening import open_training_data
from robustfeat.training.evaluation.corruptions import CORRUPTIONS, corrupt

MOST, ROWS, SEVERITIES, ALPHA, DRAWS, HALVES = 3000, 500, (1, 3, 5), 0.01, 10, 200
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Pair:
    """A reference, a set beside it, and what is known of them."""

    data: str
    kind: str
    reference: NDArray[np.float32]
    new: NDArray[np.float32]
    labels: NDArray[np.int64] | None


def embed(extractor: FeatureExtractor, data: ImageSet, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    starts = range(0, len(rows), extractor.batch_size)
    return np.concatenate(
        [extractor.embed_prepared(squares(extractor, data, rows[at : at + starts.step])) for at in starts]
    )


def squares(extractor: FeatureExtractor, data: ImageSet, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    return np.stack([extractor.prepare(data.image(int(row))) for row in rows])


def make_features(extractor: FeatureExtractor, place: str) -> Arrays:
    """Features and labels of one data set."""
    training, test = open_training_data(place)
    draw = np.random.default_rng(0)
    fitted = np.sort(draw.permutation(len(training))[:MOST])
    tested = draw.permutation(len(test))[:MOST]
    found: Arrays = {"train": embed(extractor, training, fitted), "train_labels": training.labels[fitted]}
    found |= {"test": embed(extractor, test, tested), "test_labels": test.labels[tested]}
    clean = squares(extractor, test, tested[ROWS : 2 * ROWS])
    for name in CORRUPTIONS:
        for severity in SEVERITIES:
            worse = np.stack([corrupt(square, name, severity, seed=row) for row, square in enumerate(clean)])
            batches = range(0, len(worse), extractor.batch_size)
            found[f"{name}{severity}"] = np.concatenate(
                [extractor.embed_prepared(worse[at : at + batches.step]) for at in batches]
            )
        print(f"{place}: {name}", flush=True)
    return found


def features_of(values: NDArray[np.float32]) -> Features:
    return Features("rows", values, list(map(str, range(len(values)))), {}, None)


def fit(data: Arrays) -> Head:
    features = features_of(data["train"])
    names = [(f"{label:03}",) for label in data["train_labels"]]
    labelled = match_labels(features, Labels("labels", dict(zip(features.paths, names, strict=True))))
    return fit_head(features, labelled, cs=(0.1,), scalings=("l2",))[0]


def pairs_of(name: str, data: Arrays, others: dict[str, Arrays]) -> Iterator[Pair]:
    """All pairs of one data set."""
    reference, labels = data["test"][:ROWS], data["test_labels"]

    def pair(kind: str, new: NDArray[np.float32], truth: NDArray[np.int64] | None) -> Pair:
        return Pair(name, kind, reference, new, truth)

    for start in range(ROWS, len(labels) - ROWS + 1, ROWS):
        yield pair("no shift", data["test"][start : start + ROWS], labels[start : start + ROWS])
    for key in (f"{name} {severity}" for name in CORRUPTIONS for severity in SEVERITIES):
        yield pair(key, data[key.replace(" ", "")], labels[ROWS : 2 * ROWS])
    for other, arrays in others.items():
        if other != name:
            yield pair("other data", arrays["test"][:ROWS], None)
    draw, behind = np.random.default_rng(0), np.arange(ROWS, len(labels))
    for _ in range(DRAWS):
        shares = draw.dirichlet(np.ones(labels.max() + 1))[labels[behind]] / np.bincount(labels[behind])[labels[behind]]
        rows = draw.choice(behind, ROWS // 2, replace=False, p=shares / shares.sum())
        yield pair("other shares", data["test"][rows], labels[rows])


def measure(pair: Pair, head: Head) -> dict[str, Any]:
    """What drift says of a pair, and the truth."""
    began = time.process_time()
    found = measure_drift(features_of(pair.reference), features_of(pair.new), head)
    answers = found.answers
    assert answers is not None
    figures: dict[str, Any] = {"data": pair.data, "kind": pair.kind, "seconds": time.process_time() - began}
    figures |= {"p": found.comparison.p, "distance": found.comparison.distance}
    figures |= {"atypical": float((found.typicality < 0.05).mean()), "explained": answers.explained}
    if pair.labels is None:
        return figures
    return figures | judge_answers(answers, head, pair, pair.labels)


def judge_answers(answers: Answers, head: Head, pair: Pair, labels: NDArray[np.int64]) -> dict[str, Any]:
    """Estimates beside the truth: accuracy by five rules, and shares by two."""
    before, after = head.probabilities(pair.reference), head.probabilities(pair.new)
    confidence = before.max(1)
    least = np.quantile(confidence, 1 - confidence.mean())
    truth = np.bincount(labels, minlength=len(head.classes)) / len(labels)
    return {
        "accuracy": float((after.argmax(1) == labels).mean()),
        "estimate": answers.new_accuracy,
        "reference's shares": estimate_accuracy(after, answers.reference_shares),
        "EM's shares": estimate_accuracy(after, answers.new_shares),
        "mean confidence": float(after.max(1).mean()),
        "ATC": float((after.max(1) >= least).mean()),
        "shares, EM": float(np.abs(answers.new_shares - truth).sum() / 2),
        "shares, mean": float(np.abs(after.mean(0) - truth).sum() / 2),
    }


def measure_false_alarms(sets: dict[str, Arrays]) -> dict[str, dict[str, float]]:
    """The share of small p-values between random halves of the test images."""
    found = {}
    for name, data in sets.items():
        draw = np.random.default_rng(0)
        units = to_units(data["test"])
        orders = [draw.permutation(len(units))[: 2 * ROWS] for _ in range(HALVES)]
        values = np.array(
            [
                compare_samples(units[order[:ROWS]], units[order[ROWS:]], permutations=199, seed=seed).p
                for seed, order in enumerate(orders)
            ]
        )
        found[name] = {f"p at most {level}": float((values <= level).mean()) for level in (0.01, 0.05, 0.1, 0.5)}
    return found


def mean(found: list[dict[str, Any]], key: str) -> float:
    return float(np.mean([one[key] for one in found]))


def error(found: list[dict[str, Any]], rule: str) -> str:
    """Mean distance between estimate and truth, in points."""
    return f"{100 * np.mean([abs(one[rule] - one['accuracy']) for one in found]):.1f}"


def test_row(kind: str, found: list[dict[str, Any]]) -> dict[str, str]:
    return {
        "sets": kind,
        "pairs": str(len(found)),
        f"p below {ALPHA}": f"{100 * np.mean([one['p'] < ALPHA for one in found]):.0f} %",
        "distance": f"{mean(found, 'distance'):.4f}",
        "atypical images": f"{100 * mean(found, 'atypical'):.0f} %",
        "explained": f"{100 * mean(found, 'explained'):.0f} %",
    }


def accuracy_row(kind: str, found: list[dict[str, Any]]) -> dict[str, str]:
    row = {"sets": kind, "pairs": str(len(found)), "accuracy": f"{100 * mean(found, 'accuracy'):.1f}"}
    row |= {rule: error(found, rule) for rule in RULES}
    return row | {key: f"{mean(found, key):.2f}" for key in ("shares, EM", "shares, mean")}


RULES = ("estimate", "reference's shares", "EM's shares", "mean confidence", "ATC")


def report(found: list[dict[str, Any]]) -> None:
    """Prints the tables."""
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for one in found:
        by_kind.setdefault(one["kind"], []).append(one)
    print(table([test_row(kind, some) for kind, some in by_kind.items()]))
    same = by_kind["no shift"]
    for kind, least in (
        ("other shares", ""),
        ("other data", ""),
        *((f"severity {one}", str(one)) for one in SEVERITIES),
    ):
        some = [one for one in found if one["kind"] == kind or (least and one["kind"].endswith(least))]
        is_shift = np.repeat([0, 1], [len(same), len(some)])
        aurocs = [
            f"{roc_auc_score(is_shift, [sign * one[key] for one in same + some]):.3f} by {key}"
            for key, sign in (("distance", 1), ("p", -1))
        ]
        print(f"AUROC of {len(same)} sets without a shift against {len(some)} of {kind}: {', '.join(aurocs)}")
    labelled = {kind: some for kind, some in by_kind.items() if "accuracy" in some[0]}
    labelled["all"] = [one for some in labelled.values() for one in some]
    print(table([accuracy_row(kind, some) for kind, some in labelled.items()]))
    print(f"processor seconds per pair: {mean(found, 'seconds'):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--cache", required=True, metavar="FOLDER")
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--out", metavar="FILE.json")
    options = parser.parse_args()
    extractor = FeatureExtractor.load(options.model, RunOptions(precision=options.precision).for_throughput())
    sets: dict[str, Arrays] = {}
    for place in options.data:
        file = Path(options.cache, f"{Path(place).name}.npz")
        if not file.exists():
            np.savez(file, **make_features(extractor, place))  # type: ignore[arg-type]  # of NumPy's stubs
        sets[Path(place).name] = dict(np.load(file))
    found = []
    for name, data in sets.items():
        head = fit(data)
        found += [measure(pair, head) for pair in pairs_of(name, data, sets)]
        print(f"{name}: {len(found)} pairs", flush=True)
    report(found)
    false_alarms = measure_false_alarms(sets)
    print("false alarms:", json.dumps(false_alarms))
    if options.out:
        Path(options.out).write_text(
            json.dumps({"pairs": found, "false_alarms": false_alarms, "hardware": hardware()}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
