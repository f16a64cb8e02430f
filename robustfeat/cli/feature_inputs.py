"""INPUT of commands that take features, or images that are embedded first."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import click

from robustfeat.cli.extraction import Extraction
from robustfeat.cli.rendering import say

if TYPE_CHECKING:
    from robustfeat.serving.heads.features import Features
    from robustfeat.serving.heads.head import Head
    from robustfeat.serving.heads.labels.labels import Labels

__all__ = ["open_inputs", "remark"]


def open_inputs(
    inputs: tuple[str, ...],
    extraction: Extraction,
    quiet: bool,
    *,
    names: str | None = None,
    head: Head | None = None,
    head_place: str = "",
    labels: Labels | None = None,
    check: Callable[[list[str]], None] | None = None,
) -> Features:
    """The features that INPUT names, or those of the images that it names.

    Of images those alone that have `labels`; `check` may refuse their paths before the work of embedding them.
    """
    from robustfeat.serving.heads.features import embed_features, is_feature_file, open_array, open_features
    from robustfeat.serving.heads.labels.matching import labelled_inputs
    from robustfeat.serving.inputs.choice import say_left_out
    from robustfeat.serving.inputs.listing import list_inputs

    if head is not None and head.model is None:
        remark(f"{head_place}: does not say whose features it takes, so that is not checked", quiet)
    if any(is_feature_file(place) for place in inputs):
        if len(inputs) > 1:
            raise click.UsageError(f"features come alone; got {len(inputs)} INPUTs")
        typed = [name for name in extraction.given if name != "threads"]
        if typed:
            raise click.UsageError(f"--{typed[0].replace('_', '-')} is for images; {inputs[0]} holds features")
        if names is not None and not inputs[0].endswith(".npy"):
            raise click.UsageError(f"--names is for a .npy file of features; got {inputs[0]}")
        features = open_features(inputs[0]) if names is None else open_array(inputs[0], names)
        if features.model is None:
            remark(f"{features.place}: of an unknown model, so whether a head suits it is not checked", quiet)
        if head is not None:
            head.require_features(features, head_place)
        return features
    if names is not None:
        raise click.UsageError(f"--names is for a .npy file of features; {inputs[0]} holds images")
    extractor = extraction.open()
    if head is not None:  # before the work of embedding
        head.require_model(extractor.identity, head_place, f"--model {extraction.model}")
    with list_inputs(inputs) as found, labelled_inputs(found, labels) if labels else nullcontext(found) as wanted:
        remark(say_left_out(found.left_out), quiet)
        if check is not None:
            check([image.path for image in (wanted if len(wanted) else found)])
        return embed_features(
            extractor, wanted, quiet=quiet, batch_size=extraction.batch_size, workers=extraction.workers
        )


def remark(text: str, quiet: bool) -> None:
    """Prints a line on stderr, unless there is nothing to say."""
    if text and not quiet:
        say(text, err=True)
