"""The reference distribution q0 of a target task, from unlabelled images of it: the future work of the paper."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from robustfeat.errors import DataError, ModelFolderError, first_line
from robustfeat.hub.catalog import resolve_model
from robustfeat.hub.folder import CLASSIFIER, TRAINING, WEIGHTS, ModelFolder
from robustfeat.progress import remark
from robustfeat.serving.extractor import FeatureExtractor
from robustfeat.serving.heads.shares import fit_shares
from robustfeat.serving.inputs.choice import say_left_out
from robustfeat.serving.inputs.input_list import InputList
from robustfeat.serving.inputs.listing import list_inputs
from robustfeat.training.concepts import assign_concepts

__all__ = ["estimate_reference", "read_classifier"]

_BATCH = 64
_FLOOR = 0.1
"""Of an equal share: what EM leaves a concept at least. At a share of 0 the concept level would drop it."""


def _batches(listed: InputList) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    for image in listed:
        try:
            batch.append(image.read())
        except OSError:
            batch.append(b"")  # cannot be decoded, and counts as that
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def read_classifier(folder: ModelFolder) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The weight (C, D) and the bias (C,) of the classifier of a model's features."""
    projected = bool(folder.config.components_of)
    state = load(folder.read(CLASSIFIER if projected else WEIGHTS))
    prefix = "" if projected else f"{folder.config.classifier}."
    return state[f"{prefix}weight"].astype(np.float64), state[f"{prefix}bias"].astype(np.float64)


def estimate_reference(
    images: str, concepts: str, model: str = "builtin", *, rule: str = "mean", quiet: bool = True
) -> dict[str, float]:
    """The share of each concept among a target's images, as a classifier sees them.

    An image's probabilities of the concepts are the model's softmax, summed within concepts. A class that the model
    does not know counts for those that it takes it for.

    Args:
        images: a folder of the target's images, or one image.
        concepts: see `load_concepts`; must have every class of the model.
        model: a model folder, builtin, or ORG/NAME, trained by robustfeat (its classifier is used).
        rule: `mean` over the images, or `em`: `fit_shares`, with classes of one size in the model's training. Every
            concept then gets at least a tenth of an equal share.
        quiet: print no line about images that are left out.

    Returns:
        Shares by concept, which sum to 1. Concepts without classes of the model have 0.

    Raises:
        DataError: the model has no classifier or no class names, a class has no concept, or no image can be decoded.
        ModelFolderError, HubError, InputError: the model or the images cannot be read.
    """
    folder = resolve_model(model)
    recipe = folder.config.recipe
    if recipe.get("projection") or not recipe.get("labels", True):
        raise DataError(
            "was trained with `projection` or without labels, so no classifier of its features was trained",
            argument="target_model",
            value=model,
            fix="pass a model that was trained with labels and without `projection`",
        )
    extractor = FeatureExtractor.open(folder)
    try:
        classes = json.loads(folder.read(TRAINING))["classes"]
        weight, bias = read_classifier(folder)
        if not all(isinstance(name, str) for name in classes) or weight.shape[:1] != (len(classes),):
            raise ValueError("its classes do not fit its classifier")
    except (ModelFolderError, OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as exc:
        raise DataError(
            f"has no named classes ({first_line(exc)})",
            argument="target_model",
            value=model,
            fix="pass a model that robustfeat trained",
        ) from exc
    try:
        of_class = assign_concepts(concepts, classes, np.ones(len(classes), np.int64))
    except DataError as exc:
        raise DataError(
            f"{model} tells the target's concepts by classes of its own, which need concepts, too: {exc.problem}",
            argument="target",
            value=images,
            fix=exc.fix,
        ) from exc
    membership = np.eye(len(of_class.names))[of_class.of_class]
    found, failed = [np.empty((0, len(of_class.names)))], 0
    with list_inputs([images]) as listed:
        for batch in _batches(listed):
            features = extractor.embed(batch, on_error="nan").astype(np.float64)
            features = features[np.isfinite(features).all(1)]
            failed += len(batch) - len(features)
            logits = features @ weight.T + bias
            shares = np.exp(logits - logits.max(1, keepdims=True))
            found.append(shares / shares.sum(1, keepdims=True) @ membership)
        if said := say_left_out(listed.left_out, failed):
            remark(f"{images}: {said}", quiet=quiet)
    posteriors = np.concatenate(found)
    if not len(posteriors):
        raise DataError(f"none of its {failed} images can be decoded", argument="target", value=images)
    if rule == "mean":
        estimate = posteriors.mean(0)
    else:
        estimate = fit_shares(posteriors, membership.mean(0), least=_FLOOR / len(of_class.names))
    told = {name: round(float(share), 6) for name, share in zip(of_class.names, estimate, strict=True)}
    return told | dict.fromkeys(of_class.empty, 0.0)  # this model cannot detect these
