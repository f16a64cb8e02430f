"""One ONNX file from pixels to answers: a network with a head behind it. Loads no PyTorch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

import robustfeat
from robustfeat.errors import ExportError
from robustfeat.files import new_file
from robustfeat.hub.card import describe_preprocessing
from robustfeat.hub.external_data import MAX_BYTES
from robustfeat.hub.preprocessing import normalise
from robustfeat.progress import remark
from robustfeat.serving.extractor import FeatureExtractor
from robustfeat.serving.heads.distance import measure_distance
from robustfeat.serving.heads.head import Head
from robustfeat.training.export.assembly import golden_images
from robustfeat.training.export.graph_editing import drop_unused, rename_tensors
from robustfeat.training.export.graph_head import DISTANCE, PROBABILITIES, SCORES, TYPICALITY, put_head
from robustfeat.training.export.graph_pooling import POOLINGS, Found, put_output
from robustfeat.training.export.graph_reading import run_graph, run_outputs
from robustfeat.training.export.stamp import INPUT, OUTPUT, stamp_onnx

__all__ = ["CLASSIFIER_VERSION", "ClassifierReport", "export_classifier"]

CLASSIFIER_VERSION = 1
"""Version of the metadata and of the outputs' meaning."""

_EARLIEST_OPSET = 9
_SMALL = 1e-6
"""Scores below this are compared as if they were this large."""
_TOLERANCE = 1e-3
"""A file whose answers are further from the head's in float64 is wrong. Float32 costs 1e-4 at most, see the tests."""


@dataclass(frozen=True)
class ClassifierReport:
    """A file that was accepted.

    Attributes:
        path: the file.
        size_bytes: size of the file.
        differences: by output, the largest difference from the head's own answers for the golden images. Those of
            probabilities and typicality are absolute. Scores are relative to the largest one of an image, and a
            distance to itself or the median unseen image's, whichever is larger.
    """

    path: Path
    size_bytes: int
    differences: Mapping[str, float]


def export_classifier(
    head: Head, extractor: FeatureExtractor, out: str | Path, *, quiet: bool = True
) -> ClassifierReport:
    """Writes one ONNX file with the network and the head, which takes pixels and gives the head's answers.

    The file takes `pixel_values`, (N, 3, S, S) float32, and gives `probabilities` (N, K) if the head is calibrated,
    `scores` (N, K), and `distance` and `typicality` (N,) if the head has them. Its metadata hold the classes, the
    preprocessing contract and all hashes.

    Args:
        head: any.
        extractor: the head's model, in ONNX Runtime on the processor. The file gets its precision.
        out: the file.
        quiet: say nothing of the steps on stderr.

    Raises:
        InputError: the head takes another model's features, or `out` cannot be written.
        ExportError: the file cannot be made, or gives other answers than the head; nothing was written.
    """
    folder, source = extractor.folder, str(extractor.folder.source)
    head.require_model(extractor.identity, "the head", source)
    remark(f"{extractor.config.name}: puts the head behind the {extractor.precision} network", quiet=quiet)
    model = onnx.load_model_from_string(folder.read_onnx(extractor.options.stored_precision))
    squares = np.stack([extractor.prepare(content) for _, content in golden_images()])
    contract = extractor.config.preprocessing
    inputs = normalise(squares, contract)
    _put_features(model, extractor, inputs, source)
    opset = _opset(model, source)
    try:
        put_head(model.graph, head, OUTPUT, opset)
    except OverflowError as exc:
        raise ExportError(f"the head cannot be computed in float32: {exc}", fix="fit it with another scaling") from exc
    side = contract.image_size
    del model.graph.input[:], model.graph.value_info[:]
    model.graph.input.append(helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", 3, side, side]))
    drop_unused(model.graph, [value.name for value in model.graph.output])
    stamp_onnx(model, contract)
    model.producer_name, model.producer_version = "robustfeat", robustfeat.__version__
    helper.set_model_props(model, _metadata(head, extractor) | {one.key: one.value for one in model.metadata_props})
    if model.ByteSize() > MAX_BYTES:
        raise ExportError(
            f"{source}: with the head it is larger than 2 GB, which engines cannot read", fix="use a smaller network"
        )
    differences = _compare(model, inputs, head, extractor.embed_prepared(squares), source)
    content = model.SerializeToString()
    with new_file(out) as partial:
        partial.write_bytes(content)
    return ClassifierReport(Path(out), len(content), differences)


def _put_features(
    model: onnx.ModelProto, extractor: FeatureExtractor, inputs: NDArray[np.float32], source: str
) -> None:
    """Makes the features of a network of transformers a tensor of its graph; networks of ours give them."""
    pooling, graph = extractor.engine.pooling, model.graph
    if pooling.name is None:
        return
    rename_tensors(graph, {OUTPUT: f"{OUTPUT}.network"})
    del graph.output[:], graph.value_info[:]
    graph.output.append(onnx.ValueInfoProto(name=pooling.output))
    (values,) = run_graph(model, [inputs], source)
    found = Found(pooling.output, values, _opset(model, source), channels_last=False)
    put_output(graph, found, pooling.name if pooling.name in POOLINGS else None, pooling.prefix, source)


def _opset(model: onnx.ModelProto, source: str) -> int:
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)
    if opset < _EARLIEST_OPSET:
        raise ExportError(
            f"{source}: its ONNX file has opset {opset}; a head needs {_EARLIEST_OPSET} or later",
            fix="export the network again for a later opset",
        )
    return int(opset)


def _compare(
    model: onnx.ModelProto, inputs: NDArray[np.float32], head: Head, features: NDArray[np.float32], source: str
) -> dict[str, float]:
    """The largest difference of each output from the head's own answers.

    Raises:
        ExportError: one is too large.
    """
    margins = head.margins(features)
    expected = {SCORES: margins}
    if head.calibrated:
        expected[PROBABILITIES] = head.calibrate(margins)
    if head.tells_typicality:
        expected |= {DISTANCE: measure_distance(head.arrays, features), TYPICALITY: head.typicality(features)}
    # The batch is free: one image, then an odd number of them.
    parts = run_outputs(model, [inputs[:1], inputs[1:]], source)
    differences = {}
    for name, wanted in expected.items():
        away = np.abs(np.concatenate([part[name] for part in parts]) - wanted)
        if name == SCORES:
            away = away / np.maximum(np.abs(wanted).max(1, keepdims=True), _SMALL)
        if name == DISTANCE:
            away = away / np.maximum(wanted, np.median(head.arrays["distance.unseen"]))
        # An image as far away as an unseen one may be counted on either side of it.
        allowed = _TOLERANCE + (head.least_typicality if name == TYPICALITY else 0)
        differences[name] = float(away.max())
        if not away.max() <= allowed:
            raise ExportError(
                f"the file gives other {name} than the head (by {away.max():.2g}, {allowed:.2g} allowed); nothing was "
                "written",
                fix="report this head",
            )
    return differences


def _metadata(head: Head, extractor: FeatureExtractor) -> dict[str, str]:
    """Metadata that a program needs to use the file, and its origin."""
    identity = extractor.identity
    about = {
        **{name: getattr(head, name) for name in ("kind", "scaling", "multi_label", "sha256")},
        "model": head.model.to_head() if head.model else None,
        "scores": dict(head.scores),
    }
    network = {
        **identity.values("name", "revision", "weights_sha256", "preprocessing_hash", "feature_size", "precision"),
        "config_hash": extractor.folder.config_hash,
        "pooling": identity.pooling,
    }
    entries = {
        "classifier_version": CLASSIFIER_VERSION,
        "classes": list(head.classes),
        "preprocessing": extractor.config.preprocessing.to_dict(),
        "head": about,
        "model": network,
    }
    texts = {name: json.dumps(value, ensure_ascii=False) for name, value in entries.items()}
    return {f"robustfeat.{name}": text for name, text in (texts | {"usage": _usage(head, extractor)}).items()}


def _usage(head: Head, extractor: FeatureExtractor) -> str:
    """How to use the file, for people."""
    contract = extractor.config.preprocessing
    side, steps = contract.image_size, " ".join(describe_preprocessing(contract).split())
    rule = "above 0 for each label that applies" if head.multi_label else "the largest is the class"
    lines = [
        f"pixel_values: float32 (N, 3, {side}, {side}). {steps} Mean and std are for values from 0 to 1.",
        f"scores: float32 (N, {len(head.classes)}), in the order of robustfeat.classes; {rule}.",
    ]
    if head.calibrated:
        each = "each by itself" if head.multi_label else "of the classes, adding up to 1"
        lines.append(f"probabilities: float32 (N, {len(head.classes)}), calibrated, {each}.")
    if head.tells_typicality:
        lines.append(
            "typicality: float32 (N), the share of unseen images of the classes that are at least as unlike them: near "
            "0 for an image of none of the classes. distance: float32 (N), on which it is based."
        )
    return "\n".join(lines)
