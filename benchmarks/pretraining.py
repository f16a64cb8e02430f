"""Long pre-training in pieces: cells of equal time for docs/training.md, and a long run with a teacher.

    python benchmarks/pretraining.py cells DATA --teacher MODEL --task NAME=DATA ... --out runs/pretraining
    python benchmarks/pretraining.py long DATA --teacher MODEL --out runs/pretraining [--method erm]
    python benchmarks/pretraining.py status --out runs/pretraining

Each command goes on where it was stopped; run it under `nice -n 19` beside other work. A cell is one method with one
seed: it trains and gets a linear SVM per target, fitted and tested on disjoint *training* images of the target.
Its result is a file in docs/results/pretraining (`--results`), and a cell that has one is not trained again.
`status` tells how far the runs are, and prints the table of the finished cells.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from machine import hardware
from probe import draw, svm_accuracy
from robustfeat.files import new_file
from robustfeat.training.data.opening import open_training_data
from robustfeat.training.evaluation.subject import open_subject
from robustfeat.training.evaluation.tasks import embed_images
from robustfeat.training.loop.checkpoint import load_checkpoint
from robustfeat.training.loop.journal import read_metrics
from robustfeat.training.loop.run_folder import CHECKPOINT_NAME
from robustfeat.training.loop.trainer import train
from robustfeat.training.recipe import RECIPE_NAME, Recipe, load_recipe

COMMON: dict[str, Any] = {
    "batch_size": 256, "lr": 0.2, "weight_decay": 5e-4, "schedule": "cosine", "warmup_epochs": 1, "crop_pct": 1.0,
    "min_crop_area": 0.25, "tau": 0.35, "lam": 10.0, "q_baseline": True, "inner": "half", "precision": "bf16",
    "cache_px": 64,
}  # fmt: skip
METHODS = {"ERM": {"method": "erm", "epochs": 12}, "HRRL": {"method": "hrrl", "epochs": 10}}
"""Equal time: with `inner = half` a step of HRRL takes 1.21 times as long as one of ERM (docs/training.md)."""
SIGNALS: dict[str, dict[str, Any]] = {
    "labels": {},
    "labels + teacher": {"teacher_weight": 10.0, "teacher_crops": 4},
    "teacher": {"labels": False, "concepts": "clusters:11", "teacher_weight": 10.0, "teacher_crops": 4},
}
CELL = {"image_sizes": ((0, 48),), "validation_size": 64, "parts": 1}
LONG: dict[str, Any] = {
    "image_sizes": ((0, 64), (20, 96)), "validation_size": 96, "warmup_epochs": 2, "teacher_weight": 10.0,
    "teacher_crops": 5, "ema": 0.999,
}  # fmt: skip
LONG_EPOCHS = {"hrrl": 30, "erm": 36}
MOST_TRAIN, MOST_TEST = 4000, 2000
RESULTS = Path(__file__).parents[1] / "docs" / "results" / "pretraining"
KEPT_FEATURES = ("teacher-features.f16", "teacher-features.json")


def cell_recipe(signal: str, method: str, seed: int, teacher: str) -> Recipe:
    """How a cell is trained."""
    taught = {"teacher": teacher, "teacher_precision": "bf16"} if "teacher" in signal else {}
    return Recipe(**{**COMMON, **CELL, **METHODS[method], **SIGNALS[signal], **taught, "seed": seed})


def long_recipe(method: str, teacher: str) -> Recipe:
    """How the long run, or its ERM twin of equal time, is trained."""
    settings = {**COMMON, **LONG, "method": method, "epochs": LONG_EPOCHS[method]}
    if method == "erm":  # sizes change at the same share of the run
        share = LONG_EPOCHS["erm"] / LONG_EPOCHS["hrrl"]
        settings["image_sizes"] = tuple((round(first * share), side) for first, side in LONG["image_sizes"])
    return Recipe(**settings, teacher=teacher, teacher_precision="bf16")


def finish(recipe: Recipe, run: Path, options: argparse.Namespace) -> None:
    """Trains a run, or what is left of it."""
    resume = (run / CHECKPOINT_NAME).exists()
    recipe = Recipe.from_dict(load_checkpoint(run).recipe) if resume else recipe
    train(options.data, recipe, run, resume=resume, threads=options.threads)


def borrow_features(run: Path, others: Sequence[Path]) -> None:
    """Links a teacher's features that another run has kept: training takes them if they are those that it needs."""
    for other in others:
        files = [other / name for name in KEPT_FEATURES]
        if not run.exists() and all(file.exists() for file in files):
            run.mkdir(parents=True)
            for file in files:
                os.link(file, run / file.name)
            return


def score(run: Path, tasks: dict[str, str]) -> dict[str, float]:
    """Accuracy in % of linear SVMs on a run's features, by target; no test image is seen."""
    subject, scores = open_subject(str(run)), {}
    for name, place in tasks.items():
        train_set, _ = open_training_data(place)
        test_rows = min(MOST_TEST, round(0.27 * len(train_set)))
        train_rows = min(MOST_TRAIN, len(train_set) - test_rows)
        rows = draw(train_set, train_rows + test_rows)
        images = train_set.subset(rows)
        x, y = embed_images(subject, images), images.labels
        accuracy, _ = svm_accuracy(x[:train_rows], y[:train_rows], x[train_rows:], y[train_rows:])
        scores[name] = round(100 * accuracy, 2)
    return scores


def run_cells(options: argparse.Namespace) -> None:
    tasks = dict(task.split("=", 1) for task in options.task)
    for seed in options.seeds:
        taught: list[Path] = []
        for method, signal in product(options.methods, SIGNALS):
            name = f"{signal} {method} seed {seed}".replace(" + ", "-").replace(" ", "-").lower()
            run, result = options.out / name, options.results / f"{name}.json"
            if not result.exists():
                if "teacher" in signal:
                    borrow_features(run, taught)
                finish(cell_recipe(signal, method, seed, options.teacher), run, options)
                values = {"signal": signal, "method": method, "seed": seed, "svm": score(run, tasks)}
                options.results.mkdir(parents=True, exist_ok=True)
                with new_file(result) as partial:
                    partial.write_text(json.dumps({**values, "machine": hardware()}, indent=1) + "\n")
                print(json.dumps(values), flush=True)
            if "teacher" in signal:
                taught.append(run)


def run_long(options: argparse.Namespace) -> None:
    finish(long_recipe(options.method, options.teacher), options.out / f"long-{options.method}", options)


def tell_status(options: argparse.Namespace) -> None:
    cells = [json.loads(file.read_text()) for file in sorted(options.results.glob("*.json"))]
    for run in sorted(path.parent for path in options.out.glob(f"*/{RECIPE_NAME}")):
        recipe, events = load_recipe(str(run / RECIPE_NAME)), read_metrics(run)
        epochs = [event for event in events if event["event"] == "epoch"]
        accuracy = epochs[-1].get("validation_accuracy") if epochs else None
        print(
            f"{run.name}: {len(epochs)} of {recipe.epochs} epochs" + (f", accuracy {accuracy:.2%}" if accuracy else "")
        )
    if cells:
        print("\n" + table(cells))


def table(cells: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row per method and signal, a column per target, mean ± deviation over the seeds."""
    targets = list(cells[0]["svm"])
    lines = [f"| learned from | method | seeds | {' | '.join(targets)} |", "|---" * (3 + len(targets)) + "|"]
    for signal in SIGNALS:
        for method in METHODS:
            found = [cell["svm"] for cell in cells if (cell["signal"], cell["method"]) == (signal, method)]
            if found:
                columns = [spread([scores[target] for scores in found]) for target in targets]
                lines.append(f"| {signal} | {method} | {len(found)} | {' | '.join(columns)} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, work in (("cells", run_cells), ("long", run_long), ("status", tell_status)):
        command = commands.add_parser(name)
        command.set_defaults(work=work)
        command.add_argument("--out", required=True, type=Path)
        if name != "long":
            command.add_argument("--results", type=Path, default=RESULTS)
        if name != "status":
            command.add_argument("data", metavar="DATA")
            command.add_argument("--teacher", required=True, metavar="MODEL")
            command.add_argument("--threads", type=int, help="1 beside other work: two wait for each other")
        if name == "cells":
            command.add_argument("--task", action="append", required=True, metavar="NAME=DATA")
            command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
            command.add_argument("--methods", choices=list(METHODS), nargs="+", default=list(METHODS))
        if name == "long":
            command.add_argument("--method", choices=sorted(LONG_EPOCHS), default="hrrl")
    options = parser.parse_args()
    options.work(options)


if __name__ == "__main__":
    main()
