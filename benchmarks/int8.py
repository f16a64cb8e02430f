"""int8 beside fp32: how much of a network is int8, how near its features stay, their SVM accuracy, and the speed.

    python benchmarks/int8.py FOLDERS --make --weights lite0=FILE.pth --photos PHOTOS
    python benchmarks/int8.py FOLDERS --features --photos PHOTOS --task cifar10=DATA --json features.json
    python benchmarks/int8.py FOLDERS --speed --json speed.json

FOLDERS is a folder of model folders. `--make` adds the networks of `NETWORKS` that it lacks, at their own image
sizes (ResNet-18: 64 px) and calibrated on the golden images. Weights are given by `--weights`
(`resnet18=former/model.safetensors`, see docs/built-in.md), or are seeded ones, whose BatchNorm has seen the
photographs. Seeded weights have no outliers, as trained ones do, and their features hardly tell images apart. They
show that int8 can be made and how fast it is, not how exact it is for a trained network.

`--features` compares int8 with ONNX Runtime's fp32 on the photographs. A linear SVM learns from `--train` rows of a
task and is tested on `--test` others, as in benchmarks/probe.py. `--speed` times the model without decoding, with one
batch per processor side by side; nothing else may run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from timm.data.config import resolve_model_data_config

from machine import hardware
from probe import draw, svm_accuracy
from robustfeat.errors import RobustFeatError
from robustfeat.hub.folder import ModelFolder
from robustfeat.hub.markdown import table
from robustfeat.hub.preprocessing import Preprocessing, decode, preprocess
from robustfeat.serving.engines.options import RunOptions
from robustfeat.serving.extractor import FeatureExtractor
from robustfeat.serving.verify import check_golden, cosine
from robustfeat.training.data.opening import open_training_data
from robustfeat.training.export.backbones import import_backbone

NETWORKS = {
    "resnet18": "timm:resnet18",
    "resnet50": "timm:resnet50",
    "lite0": "timm:tf_efficientnet_lite0",
    "lite2": "timm:tf_efficientnet_lite2",
    "mobilenetv3": "timm:mobilenetv3_large_100",
    "convnext": "timm:convnext_tiny",
    "vit": "timm:vit_small_patch16_224",
    "dinov2": "timm:vit_small_patch14_dinov2",
}
OPTIONS: dict[str, dict[str, Any]] = {"resnet18": {"image_size": 64, "crop_pct": 1.0}, "dinov2": {"image_size": 224}}
ENGINES = ("onnxruntime", "openvino")
SPEED_S = 2.0


def make(root: Path, weights: dict[str, str], photos: Sequence[Path], only: Sequence[str]) -> None:
    """Writes the folders that are missing."""
    for name, source in NETWORKS.items():
        if (root / name).exists() or (only and name not in only):
            continue
        given, options = weights.get(name), OPTIONS.get(name, {})
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            file = given or str(seeded(source.partition(":")[2], photos, Path(scratch, "seeded.pt")))
            try:
                report = import_backbone(
                    source, root / name, weights=file, name=f"{name}{'' if given else '-seeded'}", **options
                )
            except RobustFeatError as exc:
                print(f"{name}: {exc}", flush=True)
                continue
        print(
            f"{name}: {report.cosines} {report.folder.config.int8_share}, {time.perf_counter() - began:.0f} s",
            flush=True,
        )


def seeded(architecture: str, photos: Sequence[Path], file: Path) -> Path:
    """A state dict of seeded weights; BatchNorm's statistics are the photographs'."""
    torch.manual_seed(0)
    network = timm.create_model(architecture)
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    if norms:
        settings = resolve_model_data_config(network)
        contract = Preprocessing(settings["input_size"][1], mean=settings["mean"], std=settings["std"])
        for norm in norms:
            norm.momentum = None  # a plain mean over all batches
            norm.reset_running_stats()
        network.train()
        with torch.no_grad():
            for first in range(0, len(photos), 8):
                network(
                    torch.from_numpy(preprocess([decode(p.read_bytes()) for p in photos[first : first + 8]], contract))
                )
    torch.save(network.state_dict(), file)
    return file


def measure_features(
    folder: ModelFolder, photos: Sequence[Path], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """A row for fp32 and for int8 in each engine."""
    about = folder.config.int8
    expected = None
    for engine, precision in (("onnxruntime", "fp32"), *((engine, "int8") for engine in ENGINES)):
        if precision not in folder.precisions:
            continue
        extractor = FeatureExtractor.open(folder, RunOptions(precision, engine, "cpu"))
        found = extractor.embed(photo.read_bytes() for photo in photos)
        expected = found if expected is None else expected
        near = cosine(found, expected)
        row = {
            "network": folder.config.name,
            "engine": engine,
            "precision": precision,
            "layers in int8": f"{about['layers']} of {about['of']}" if precision == "int8" else "",
            "multiply-adds": f"{100 * about['multiply_adds']:.1f} %" if precision == "int8" else "",
            "golden, least": f"{check_golden(extractor).cosine:.4f}",
            "photos, least": f"{near.min():.4f}",
            "photos, mean": f"{near.mean():.4f}",
        }
        for task in options.task or ():
            name, _, place = task.partition("=")
            row[name] = f"{100 * accuracy(extractor, place, options.train, options.test):.2f}"
        yield row


def accuracy(extractor: FeatureExtractor, place: str, train: int, test: int) -> float:
    """Of a linear SVM on the extractor's features."""
    train_set, test_set = open_training_data(place)
    rows, test_rows = draw(train_set, train), draw(test_set, test)
    x, x_test = (
        extractor.embed(data.source.read(int(row)) for row in places).astype(np.float64)
        for data, places in ((train_set, rows), (test_set, test_rows))
    )
    return svm_accuracy(x, train_set.labels[rows], x_test, test_set.labels[test_rows])[0]


def measure_speed(folder: ModelFolder) -> dict[str, Any]:
    """Images per second of the model for each engine and precision, and int8's against fp32's."""
    row: dict[str, Any] = {"network": folder.config.name, "px": folder.config.preprocessing.image_size}
    for engine in ENGINES:
        speeds = {
            precision: speed(FeatureExtractor.open(folder, RunOptions(precision, engine, "cpu").for_throughput()))
            for precision in ("fp32", "int8")
            if precision in folder.precisions
        }
        row |= {f"{engine} {precision}": f"{value:.0f}" for precision, value in speeds.items()}
        if "int8" in speeds:
            row[f"{engine} ratio"] = f"{speeds['int8'] / speeds['fp32']:.2f}"
    return row


def speed(extractor: FeatureExtractor) -> float:
    """Images per second with as many batches side by side as the engine has streams."""
    side = extractor.config.preprocessing.image_size
    squares: NDArray[np.uint8] = np.random.default_rng(0).integers(
        0, 256, (extractor.batch_size, side, side, 3), dtype=np.uint8
    )
    extractor.embed_prepared(squares)
    counts: list[int] = []
    ends = time.perf_counter() + SPEED_S

    def run() -> None:
        count = 0
        while time.perf_counter() < ends:
            extractor.embed_prepared(squares)
            count += 1
        counts.append(count)

    began = time.perf_counter()
    threads = [threading.Thread(target=run) for _ in range(extractor.engine.streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) * len(squares) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, metavar="FOLDERS")
    parser.add_argument("--make", action="store_true")
    parser.add_argument("--features", action="store_true")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="of the networks")
    parser.add_argument("--weights", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--photos", type=Path, metavar="FOLDER")
    parser.add_argument("--task", action="append", metavar="NAME=DATA")
    parser.add_argument("--train", type=int, default=1400)
    parser.add_argument("--test", type=int, default=1400)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    photos = sorted(options.photos.rglob("*.*")) if options.photos else []
    if options.make:
        options.folders.mkdir(exist_ok=True)
        make(options.folders, dict(entry.split("=", 1) for entry in options.weights), photos, options.only)
    found = [
        ModelFolder(options.folders / name)
        for name in NETWORKS
        if (options.folders / name).exists() and (not options.only or name in options.only)
    ]
    rows: list[dict[str, Any]] = []
    for row in measure(found, photos, options):
        rows.append(row)
        print(*row.values(), sep="\t", flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps({"machine": hardware(), "rows": rows}, indent=2) + "\n")
    if rows:
        print(table(rows))


def measure(
    folders: Sequence[ModelFolder], photos: Sequence[Path], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    for folder in folders:
        if options.features:
            yield from measure_features(folder, photos, options)
        if options.speed:
            yield measure_speed(folder)


if __name__ == "__main__":
    main()
