"""Opens the INPUT of commands that take features or images, and its labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

from robustfeat.cli.extraction import Extraction
from robustfeat.cli.rendering import say

if TYPE_CHECKING:
    from robustfeat.serving.extractor import FeatureExtractor
    from robustfeat.serving.heads.features import Features
    from robustfeat.serving.heads.head import Head
    from robustfeat.serving.heads.labels.labels import Labels
    from robustfeat.serving.identity import ModelIdentity
    from robustfeat.serving.inputs.input_list import InputList

__all__ = [
    "open_extractor_of",
    "open_inputs",
    "open_labelled",
    "open_labels",
    "open_pair",
    "remark",
    "report_failed",
    "require_model",
]

_NAMED_IMAGES = 3

_RUN = ("precision", "engine", "decoding", "pooling")
"""Options whose defaults come from features: images are embedded as theirs were."""


def open_labels(
    labels: tuple[str, ...],
    inputs: tuple[str, ...],
    *,
    names: str | None,
    path_column: str | None,
    multi_label: bool,
) -> Labels:
    """Reads --labels. Labels of rows without names come in the rows' order."""
    from robustfeat.serving.heads.features import count_unnamed_rows
    from robustfeat.serving.heads.labels.reading import read_labels

    rows = count_unnamed_rows(inputs[0]) if names is None else None
    return read_labels(labels, multi_label=multi_label, path_column=path_column, rows=rows)


def open_inputs(
    inputs: tuple[str, ...],
    extraction: Extraction,
    quiet: bool,
    *,
    names: str | None = None,
    head: Head | None = None,
    head_place: str = "",
) -> Features:
    """Opens the features of INPUT, or embeds its images.

    Raises:
        HeadError: `head` belongs to another model.
    """
    from robustfeat.serving.inputs.listing import list_inputs

    features = _open_features(inputs, extraction, quiet, names, head, head_place)
    if features is not None:
        return features
    extractor = _open_extractor(extraction, head, head_place)
    with list_inputs(inputs) as found:
        _say_left_out(found, quiet)
        return _embed(extractor, extraction, found, quiet)


def open_labelled(
    inputs: tuple[str, ...],
    labels: Labels,
    extraction: Extraction,
    quiet: bool,
    *,
    check: Callable[[list[str]], None],
    names: str | None = None,
    head: Head | None = None,
    head_place: str = "",
) -> tuple[Features, int]:
    """Opens the features of INPUT, or embeds those of its images that have labels.

    Args:
        check: called with the images' paths before they are embedded; it may raise an error.

    Returns:
        The features, and the number of images without a label.
    """
    from robustfeat.serving.heads.labels.matching import labelled_inputs
    from robustfeat.serving.inputs.listing import list_inputs

    features = _open_features(inputs, extraction, quiet, names, head, head_place)
    if features is not None:
        return features, 0
    extractor = _open_extractor(extraction, head, head_place)
    with list_inputs(inputs) as found:
        _say_left_out(found, quiet)
        wanted, unlabelled = labelled_inputs(found, labels)
        with wanted:
            check([image.path for image in (wanted if len(wanted) else found)])
            if unlabelled.count:
                remark(f"{unlabelled.summary('images')} (not embedded)", quiet)
            return _embed(extractor, extraction, wanted, quiet), unlabelled.count


def _open_features(
    inputs: tuple[str, ...],
    extraction: Extraction,
    quiet: bool,
    names: str | None,
    head: Head | None,
    head_place: str,
) -> Features | None:
    """The features in INPUT, or None if INPUT names images."""
    from robustfeat.serving.heads.features import count_unnamed_rows, is_feature_file, open_array, open_features

    if head is not None and head.model is None:
        remark(f"{head_place}: does not name its model, so the model of the features is not checked", quiet)
    if not any(is_feature_file(place) for place in inputs):
        if names is not None:
            raise click.UsageError(f"--names is for a .npy file of features; {inputs[0]} holds images")
        return None
    if len(inputs) > 1:
        raise click.UsageError(f"expected one file of features; got {len(inputs)} INPUTs")
    typed = [name for name in extraction.given if name != "threads"]
    if typed:
        raise click.UsageError(f"--{typed[0].replace('_', '-')} is for images; {inputs[0]} holds features")
    if names is not None and not inputs[0].endswith(".npy"):
        raise click.UsageError(f"--names is for a .npy file of features; got {inputs[0]}")
    if names is None and count_unnamed_rows(inputs[0]) is None:
        features = open_features(inputs[0])
    else:
        features = open_array(inputs[0], names)
        numbered = " its rows have no names, so they are numbered from 0;" if names is None else ""
        remark(f"{inputs[0]}:{numbered} its model is unknown, so whether it matches a head is not checked", quiet)
    if head is not None:
        head.require_features(features, head_place)
    return features


def _open_extractor(extraction: Extraction, head: Head | None, head_place: str) -> FeatureExtractor:
    extractor = extraction.open()
    if head is not None:  # before the work of embedding
        default = "" if "model" in extraction.given else "the default "
        head.require_model(extractor.identity, head_place, f"{default}--model {extraction.model}")
    return extractor


def _embed(extractor: FeatureExtractor, extraction: Extraction, images: InputList, quiet: bool) -> Features:
    from robustfeat.serving.heads.features import embed_features

    return embed_features(extractor, images, quiet=quiet, batch_size=extraction.batch_size, workers=extraction.workers)


def report_failed(features: Features, effect: str, failed: int | None = None) -> int:
    """Reports failed images in one line that names the first ones. Gives the exit code.

    Args:
        features: of the images.
        effect: what became of them.
        failed: how many of them count; by default all.
    """
    failed = len(features.errors) if failed is None else failed
    if not failed:
        return 0
    first = islice(sorted(features.errors.items()), min(failed, _NAMED_IMAGES))
    named = [f"{features.paths[row]} ({reason})" for row, reason in first]
    named += [f"{failed - len(named):,} more"] if failed > len(named) else []
    say(f"robustfeat: {failed:,} of {len(features):,} images failed, {effect}: {', '.join(named)}", err=True)
    return 3


def _say_left_out(images: InputList, quiet: bool) -> None:
    from robustfeat.serving.inputs.choice import say_left_out

    remark(say_left_out(images.left_out), quiet)


def remark(text: str, quiet: bool) -> None:
    """Prints a line on stderr, unless it is empty or `quiet` is set."""
    if text and not quiet:
        say(text, err=True)


def require_model(features: Features, model: ModelIdentity | None, place: str) -> None:
    """Refuses another model than the one that made the features, where both are known."""
    if features.model is not None and model is not None:
        features.model.require(model, features.place, place)


def open_extractor_of(features: Features, extraction: Extraction, fix: str) -> FeatureExtractor:
    """Opens the model of the features, with the options that made them. `fix` is for features of an unknown model."""
    from robustfeat.errors import InputError
    from robustfeat.hub.catalog import builtin_model
    from robustfeat.hub.folder import weights_sha256

    model = features.model
    if model is None:
        raise InputError(f"{features.place}: its model is unknown, so images and words cannot be embedded", fix=fix)
    if "model" not in extraction.given and weights_sha256(builtin_model().config.files) != model.weights_sha256:
        raise InputError(
            f"{features.place}: made by the model {model.name}, which images and words need, too",
            fix="pass its folder or its name on the Hub as `model`",
        )
    same: dict[str, Any] = {key: getattr(model, key) or "auto" for key in _RUN if key not in extraction.given}
    extractor = replace(extraction, options=replace(extraction.options, **same)).open()
    require_model(features, extractor.identity, f"--model {extraction.model}")
    return extractor


def open_pair(
    first: str, second: str, extraction: Extraction, quiet: bool, *, head: Head | None = None, head_place: str = ""
) -> tuple[Features, Features]:
    """Two collections of one model, each a file of features or images. Images follow the features beside them."""
    from robustfeat.serving.heads.features import is_feature_file
    from robustfeat.serving.inputs.listing import list_inputs

    places = (first, second)
    images = [place for place in places if not is_feature_file(place)]
    if not images:
        one, other = (open_inputs((place,), extraction, quiet, head=head, head_place=head_place) for place in places)
        return one, other
    plain = Extraction(extraction.options)  # whatever was typed is for the images
    found = {
        place: open_inputs((place,), plain, quiet, head=head, head_place=head_place)
        for place in places
        if place not in images
    }
    if found:
        (features,) = found.values()
        extractor = open_extractor_of(features, extraction, "embed the images first, and pass their features")
    else:
        extractor = _open_extractor(extraction, head, head_place)
    for place in dict.fromkeys(images):
        with list_inputs([place]) as listed:
            _say_left_out(listed, quiet)
            found[place] = replace(_embed(extractor, extraction, listed, quiet), place=place)
    return found[first], found[second]
