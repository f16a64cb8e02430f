"""The table of docs/models.md: accuracy, speed, size and terms of model folders.

    python benchmarks/probe.py builtin lite0 lite2 --task NAME=DATA --held-out --train 2000 --test 1000 --json NAME.json
    python benchmarks/embed.py --photos FOLDER --only speed --rounds 2 --out speed.json \
        --model builtin --model lite0=lite0 --model lite2=lite2
    python benchmarks/models.py builtin lite0 lite2 --accuracy NAME.json --speed speed.json

Accuracies are those of benchmarks/probe.py under the same names of models. Speeds are those of the whole command in
benchmarks/embed.py: fp32 on ONNX Runtime, and the fastest way that the model has. What is not given stays empty.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from robustfeat.hub.catalog import resolve_model

DEFAULT_WAY = "onnxruntime fp32"

Accuracies = dict[tuple[str, str], float]
"""In %, by model and task."""

Speeds = dict[str, dict[str, float]]
"""Images a second, by model and way."""


def read_accuracies(files: Sequence[Path]) -> tuple[Accuracies, dict[str, str]]:
    """The accuracies in files of benchmarks/probe.py, and the rows of each task."""
    found: Accuracies = {}
    rows: dict[str, str] = {}
    for file in files:
        for one in (row for rows_of_table in json.loads(file.read_text()).values() for row in rows_of_table):
            found[one["representation"], one["task"]] = one["accuracy"]
            rows[one["task"]] = f"{one['train']:,}/{one['test']:,}"
    return found, rows


def read_speeds(file: Path | None) -> Speeds:
    """The rates of the whole command in a file of benchmarks/embed.py."""
    tables: dict[str, Any] = json.loads(file.read_text())["tables"] if file else {}
    suffix = ": images/s"
    return {
        title.removesuffix(suffix): {row["way"]: row["embed"] for row in rows}
        for title, rows in tables.items()
        if title.endswith(suffix)
    }


def table(models: Sequence[str], accuracies: Accuracies, tasks: dict[str, str], speeds: Speeds) -> list[list[str]]:
    """The lines of the table, its head first."""
    head = ["model", "features", "input", "ONNX file", "terms", *(f"{task} ({rows})" for task, rows in tasks.items())]
    lines = [[*head, f"images/s, {DEFAULT_WAY}", "images/s, the fastest way"]]
    for model in models:
        folder = resolve_model(model)
        config, rates = folder.config, speeds.get(model, {})
        exact = {way: rate for way, rate in rates.items() if not way.endswith("scaled")}
        fastest = max(exact, key=lambda way: exact[way], default=None)
        lines.append(
            [
                config.name,
                f"{config.feature_size}",
                f"{config.preprocessing.image_size} px",
                f"{len(folder.read_onnx('fp32')) / 1e6:.1f} MB",
                str(config.provenance.get("terms", "not stated")),
                *(f"{accuracies[model, task]:.2f}" if (model, task) in accuracies else "" for task in tasks),
                f"{rates[DEFAULT_WAY]:.0f}" if DEFAULT_WAY in rates else "",
                f"{exact[fastest]:.0f} ({fastest})" if fastest else "",
            ]
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="as benchmarks/probe.py was given them")
    parser.add_argument("--accuracy", nargs="+", type=Path, default=[], metavar="FILE.json", help="of probe.py")
    parser.add_argument("--speed", type=Path, metavar="FILE.json", help="of embed.py")
    options = parser.parse_args()
    accuracies, tasks = read_accuracies(options.accuracy)
    head, *lines = table(options.models, accuracies, tasks, read_speeds(options.speed))
    for line in (head, ["---"] * len(head), *lines):
        print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    main()
