"""INPUT of commands that take features, or images that are embedded first, and their labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from robustfeat.cli.extraction import Extraction
from robustfeat.cli.rendering import say

if TYPE_CHECKING:
    from robustfeat.serving.extractor import FeatureExtractor
    from robustfeat.serving.heads.features import Features
    from robustfeat.serving.heads.head import Head
    from robustfeat.serving.heads.labels.labels import Labels
    from robustfeat.serving.inputs.input_list import InputList

__all__ = ["open_inputs", "open_labelled", "open_labels", "remark"]


def open_labels(
    labels: tuple[str, ...],
    inputs: tuple[str, ...],
    *,
    names: str | None,
    path_column: str | None,
    multi_label: bool,
) -> Labels:
    """What --labels says. Rows without names have their labels in order."""
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
    """The features that INPUT names, or those of the images that it names. `head` refuses those of another model."""
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
    """The same, but of images those that have labels; and how many images have none.

    `check` may refuse the paths of these images before the work of embedding them.
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
    """The features that INPUT names; None where it names images."""
    from robustfeat.serving.heads.features import count_unnamed_rows, is_feature_file, open_array, open_features

    if head is not None and head.model is None:
        remark(f"{head_place}: does not say whose features it takes, so that is not checked", quiet)
    if not any(is_feature_file(place) for place in inputs):
        if names is not None:
            raise click.UsageError(f"--names is for a .npy file of features; {inputs[0]} holds images")
        return None
    if len(inputs) > 1:
        raise click.UsageError(f"features come alone; got {len(inputs)} INPUTs")
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
        remark(f"{inputs[0]}:{numbered} of an unknown model, so whether a head suits it is not checked", quiet)
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


def _say_left_out(images: InputList, quiet: bool) -> None:
    from robustfeat.serving.inputs.choice import say_left_out

    remark(say_left_out(images.left_out), quiet)


def remark(text: str, quiet: bool) -> None:
    """Prints a line on stderr, unless there is nothing to say."""
    if text and not quiet:
        say(text, err=True)
