"""Linear SVM accuracy of a model folder's features, beside raw pixels, HOG and an untrained network.

    python benchmarks/probe.py MODEL --task cifar10=DATA --train 10000 --test 10000 --baselines --json out.json

For each representation: standard scaling, C chosen on a stratified 10 % of the training rows, and all rows fitted, as
`robustfeat svm fit --scaling standard` does it. `--held-out` tests on further training rows instead of the test
split, for choices that must not see it.
`--way openvino:int8:exact` (engine, precision, decoding; may be repeated) shows what that way costs against
onnxruntime:fp32:exact.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from robustfeat.hub.config import ModelConfig
from robustfeat.serving.extractor import FeatureExtractor
from robustfeat.serving.heads.fitting.fit import select_and_fit
from robustfeat.training.data.image_set import ImageSet
from robustfeat.training.data.opening import open_training_data
from robustfeat.training.export.folder import Backbone, write_model_folder
from robustfeat.training.network import build_network, feature_network, feature_size

C_GRID = (1e-4, 1e-3, 1e-2)


def svm_accuracy(
    x: NDArray[Any], y: NDArray[np.int64], x_test: NDArray[Any], y_test: NDArray[np.int64]
) -> tuple[float, float | None]:
    """Accuracy on the test rows, and the C that the held-out rows chose."""
    selection, head, _ = select_and_fit(x, y, cs=C_GRID, scalings=["standard"], method="holdout")
    return float(np.mean(head.predict(x_test) == y_test)), selection.best.c


def draw(data: ImageSet, count: int, skip: int = 0) -> NDArray[np.int64]:
    order: NDArray[np.int64] = np.random.default_rng(0).permutation(len(data))[skip : skip + count]
    return order


def network_features(folder: Path, way: str, data: ImageSet, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    engine, precision, decoding = way.split(":")
    extractor = FeatureExtractor.from_pretrained(folder, engine=engine, precision=precision, decoding=decoding)
    return extractor.embed(data.source.read(int(row)) for row in rows).astype(np.float64)


def untrained_folder(like: ModelConfig, target: Path) -> Path:
    """The seeded, untrained network of a model with the same preprocessing, and all its features."""
    torch.manual_seed(0)
    name = like.architecture if like.architecture == "resnet18" else f"timm:{like.architecture}"
    classes = max(like.num_classes, 1)
    network = build_network(classes, name, image_size=like.preprocessing.image_size)
    size, state = feature_size(network), network.state_dict()
    config = like.replace(
        name="untrained",
        feature_size=size,
        num_classes=classes,
        components_of=0,
        recipe={},
        results={},
        concepts=(),
        int8={},
    )
    write_model_folder(Backbone(feature_network(network).eval(), state, config), target, calibration=None)
    return target


def squares(data: ImageSet, rows: NDArray[np.int64], side: int) -> list[NDArray[np.uint8]]:
    return [np.asarray(data.image(int(row)).resize((side, side))) for row in rows]


def pixel_features(data: ImageSet, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.stack([square.reshape(-1) / 255.0 for square in squares(data, rows, 16)])


def hog_features(data: ImageSet, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    from skimage.feature import hog

    return np.stack(
        [
            hog(square, pixels_per_cell=(8, 8), cells_per_block=(2, 2), channel_axis=-1)
            for square in squares(data, rows, 32)
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--task", action="append", required=True, metavar="NAME=DATA")
    parser.add_argument("--train", type=int, default=10_000)
    parser.add_argument("--test", type=int, default=10_000)
    parser.add_argument("--held-out", action="store_true", help="test on further training rows")
    parser.add_argument("--way", action="append", metavar="ENGINE:PRECISION:DECODING")
    parser.add_argument("--baselines", action="store_true", help="also raw pixels, HOG and an untrained network")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = {str(name): Path(name) for name in options.models}
        if options.baselines:
            like = FeatureExtractor.from_pretrained(options.models[0]).config
            folders["untrained network"] = untrained_folder(like, Path(scratch, "untrained"))
        for task in options.task:
            name, _, place = task.partition("=")
            train, test = open_training_data(place)
            train_rows = draw(train, options.train)
            if options.held_out:
                test, test_rows = train, draw(train, options.test, skip=options.train)
            else:
                test_rows = draw(test, options.test)
            representations: dict[str, Callable[[ImageSet, NDArray[np.int64]], NDArray[np.float64]]] = {
                f"{label} {way}" if options.way else label: partial(network_features, folder, way)
                for label, folder in folders.items()
                for way in options.way or ["onnxruntime:fp32:exact"]
            }
            if options.baselines:
                representations |= {"raw pixels at 16 px": pixel_features, "HOG at 32 px": hog_features}
            for label, represent in representations.items():
                x, x_test = represent(train, train_rows), represent(test, test_rows)
                accuracy, c = svm_accuracy(x, train.labels[train_rows], x_test, test.labels[test_rows])
                row = {
                    "task": name,
                    "representation": label,
                    "accuracy": round(100 * accuracy, 2),
                    "C": c,
                    "train": len(train_rows),
                    "test": len(test_rows),
                }
                rows.append(row)
                print(*(f"{value}" for value in row.values()), sep="\t", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps({"Linear SVM accuracy": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
