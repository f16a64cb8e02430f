"""`robustfeat svm` beside scikit-learn used by hand; a large photo folder with few labels; a set larger than memory.

    python benchmarks/svm.py same --train TRAIN.npy --test TEST.npy --labels DATA.parquet:COLUMN ... --out same.json
    python benchmarks/svm.py photos --photos DATA.parquet:COLUMN --out photos.json
    python benchmarks/svm.py large --rows 1000000 --scratch FOLDER --out large.json

- same: `svm fit` + `svm score` on features that `embed` wrote, and a script that uses scikit-learn alone for the same
  search, each in a process of its own: accuracies, choices and seconds.
- photos: 20,000 JPEG files and 500 labels to 20,000 predictions in two commands, `svm fit` and `svm predict`, with
  each engine and precision.
- large: `svm fit` on 1,000,000 rows of 512 features that are made in FOLDER (5 GB, deleted at the end), with all
  settings and the last fit: seconds, processor time, peak anonymous memory, and accuracy on 10,000 further rows.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import parquet

from machine import hardware, peak_memory
from robustfeat.serving import Head

HERE = Path(__file__).parent
ROBUSTFEAT = [sys.executable, "-m", "robustfeat"]


def timed(command: list[Any]) -> tuple[float, str]:
    began = time.monotonic()
    result = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, check=True)
    return time.monotonic() - began, result.stdout


def same(options: argparse.Namespace) -> dict[str, Any]:
    rounds: list[dict[str, float]] = []
    answers: dict[str, Any] = {}
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory() as scratch:
            head = Path(scratch, "head")
            labels = [part for source in options.labels for part in ("--labels", source)]
            fit_s, said = timed(
                [
                    *ROBUSTFEAT,
                    "svm",
                    "fit",
                    options.train,
                    *labels,
                    "--out",
                    head,
                    "--selection",
                    "holdout",
                    "--quiet",
                    "--json",
                ]
            )
            score_s, accuracy = timed([*ROBUSTFEAT, "svm", "score", head, options.test, *labels, "--quiet"])
            chosen = json.loads(said)
            answers["robustfeat"] = {"C": chosen["C"], "scaling": chosen["scaling"], "accuracy": float(accuracy)}
            script = [sys.executable, HERE / "peers" / "sklearn_svm.py", options.train, options.test, *options.labels]
            script_s, said = timed(script)
            answers["scikit-learn"] = json.loads(said)
        rounds.append(
            {"robustfeat_s": fit_s + score_s, "scikit_learn_s": script_s, "ratio": (fit_s + score_s) / script_s}
        )
        print(f"round {number + 1}: {rounds[-1]}", answers, flush=True)
    answers["rounds"] = rounds
    answers["equal"] = answers["robustfeat"] == answers["scikit-learn"]
    return answers


def photos(options: argparse.Namespace) -> dict[str, Any]:
    """CIFAR's images as files: small ones, as a folder of photographs that were made smaller for labelling."""
    file, _, column = options.photos.rpartition(":")
    table = parquet.read_table(file, columns=["image", column]).slice(0, options.count)
    images, labels = table.column("image").combine_chunks().field("bytes"), table.column(column).to_pylist()
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "photos")
        folder.mkdir()
        for number in range(len(table)):
            (folder / f"{number:06}.jpg").write_bytes(images[number].as_py())
        csv = Path(scratch, "labels.csv")
        csv.write_text(
            "path,label\n" + "".join(f"{row:06}.jpg,class {labels[row]}\n" for row in range(options.labelled))
        )
        for way in options.way or ["auto:fp32", "auto:int8", "openvino:int8"]:
            engine, precision = way.split(":")
            how = ["--engine", engine, "--precision", precision, "--quiet"]
            head, out = Path(scratch, "head"), Path(scratch, "predictions.csv")
            shutil.rmtree(head, ignore_errors=True)
            fit_s, _ = timed([*ROBUSTFEAT, "svm", "fit", folder, "--labels", csv, "--out", head, *how])
            predict = [*ROBUSTFEAT, "svm", "predict", head, folder, "--out", out, "--suggest", 20, *how]
            predict_s, said = timed(predict)
            predicted = [line.split(",")[1] for line in out.read_text().splitlines()[1:]]
            assert len(predicted) == len(table)
            assert len(said.splitlines()) == 21
            right = np.mean([f"class {label}" == guess for label, guess in zip(labels, predicted, strict=True)])
            rows[way] = {"fit_s": fit_s, "predict_s": predict_s, "seconds": fit_s + predict_s, "accuracy": float(right)}
            print(way, rows[way], flush=True)
    return rows


def make_rows(folder: Path, count: int, size: int = 512, classes: int = 10) -> None:
    """Features as a network's last layer gives them, none below zero, with their labels: x.npy and y.npy.

    The classes overlap: of 12,000 rows, least squares on 10,000 tells 77 % of the others.
    """
    draw = np.random.default_rng(0)
    spread = 1 / np.sqrt(1 + np.arange(size))  # of the directions, which most networks' features have so
    means = draw.normal(size=(classes, size)) * spread
    values = np.lib.format.open_memmap(folder / "x.npy", "w+", "<f4", (count, size))
    labels = draw.integers(0, classes, count)
    for start in range(0, count, 10_000):
        rows = slice(start, min(start + 10_000, count))
        noise = draw.standard_normal((len(labels[rows]), size), np.float32) * (8 * spread)
        values[rows] = np.maximum(means[labels[rows]] + noise + 0.1, 0)
    values.flush()
    np.save(folder / "y.npy", labels)


def large(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder, head = Path(scratch), Path(scratch, "head")
        make_rows(folder, options.rows + 10_000)
        values, labels = np.load(folder / "x.npy", mmap_mode="r"), np.load(folder / "y.npy")
        np.save(folder / "train.npy", values[: options.rows])
        np.save(folder / "labels.npy", labels[: options.rows])
        fixed = ["--C", str(options.c)] if options.c else []
        command = [*ROBUSTFEAT, "svm", "fit", folder / "train.npy", "--labels", folder / "labels.npy", "--out", head]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        anonymous, _, seconds = peak_memory([*map(str, command), *fixed])
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        selection = json.loads((head / "head.json").read_text())["selection"]
        guessed = Head.load(head).predict(values[options.rows :])
        accuracy = float(np.mean(guessed == labels[options.rows :].astype(str)))
    return {
        "rows": options.rows,
        "seconds": round(seconds, 1),
        "processor_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "anonymous_gib": round(anonymous / 2**20, 3),
        "test_accuracy": accuracy,
        "selection": selection,
        "hardware": hardware(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=["same", "photos", "large"])
    parser.add_argument("--train", metavar="FEATS")
    parser.add_argument("--test", metavar="FEATS")
    parser.add_argument("--labels", action="append", metavar="LABELS")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--photos", metavar="FILE.parquet:COLUMN")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--labelled", type=int, default=500)
    parser.add_argument("--way", action="append", metavar="ENGINE:PRECISION")
    parser.add_argument("--c", type=float, help="of `large`, instead of five")
    parser.add_argument("--scratch", metavar="FOLDER", help="for the rows of `large`: 5 GB a million")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--out", metavar="FILE.json")
    options = parser.parse_args()
    found = {"same": same, "photos": photos, "large": large}[options.section](options)
    print(json.dumps(found, indent=2))
    if options.out:
        Path(options.out).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
