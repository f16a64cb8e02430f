"""Options shared by the commands that embed images."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import click

from robustfeat.serving.engines.options import (
    AUTO,
    DECODINGS,
    DEVICES,
    ENGINES,
    MAX_PIXELS,
    POOLINGS,
    PRECISIONS,
    RunOptions,
)

if TYPE_CHECKING:
    from robustfeat.serving.extractor import FeatureExtractor

__all__ = [
    "ABOVE_ZERO",
    "Extraction",
    "Number",
    "extraction_options",
    "max_items_option",
    "max_pixels_option",
    "pin_options",
    "pooling_option",
    "serving_options",
]


class Number(click.FloatRange):
    """A finite float within bounds. click's own type accepts NaN."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number; anything else fails as it does in click's own types."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


ABOVE_ZERO = Number(min=0, min_open=True)

_PIN_OPTIONS = (
    click.option("--revision", metavar="REV", help="Branch, tag or commit on the Hub.  [default: main]"),
    click.option(
        "--config-hash",
        metavar="SHA256",
        help="Refuse a model with another config hash. robustfeat info prints it; it covers all files.",
    ),
)

pooling_option = click.option(
    "--pooling",
    type=click.Choice([AUTO, *POOLINGS]),
    default=AUTO,
    show_default=True,
    help="How the output of a transformers model becomes one vector. auto chooses by model type.",
)


@dataclass(frozen=True)
class Extraction:
    """The command line's options for embedding images.

    Attributes:
        model: a model folder, ORG/NAME on the Hub, or builtin.
        options: how to run the model, and which version of it.
        workers, batch_size: arguments of `embed_files`.
        given: names of the options that the user typed. Commands that embed nothing refuse them.
    """

    options: RunOptions
    model: str = "builtin"
    workers: int | None = None
    batch_size: int | None = None
    given: tuple[str, ...] = field(default=(), compare=False)

    def open(self, *, throughput: bool = True) -> FeatureExtractor:
        """Opens the extractor, tuned for throughput or for the latency of one image."""
        from robustfeat.serving.extractor import FeatureExtractor

        return FeatureExtractor.load(self.model, self.options.for_throughput() if throughput else self.options)


_MODEL_OPTION = click.option(
    "--model",
    default="builtin",
    show_default=True,
    metavar="MODEL",
    help="Model folder, ORG/NAME on the Hub, or builtin.",
)
_RUN_OPTIONS = (
    *_PIN_OPTIONS,
    click.option(
        "--precision",
        type=click.Choice(PRECISIONS),
        default="fp32",
        show_default=True,
        help="Precision of the model. fp16 is for GPUs; bf16 (with OpenVINO) and int8 are for processors.",
    ),
    click.option(
        "--engine",
        type=click.Choice([AUTO, *ENGINES]),
        default=AUTO,
        show_default=True,
        help="Inference engine. auto is OpenVINO for bf16, else ONNX Runtime. tensorrt needs an NVIDIA GPU.",
    ),
    click.option(
        "--device",
        type=click.Choice([AUTO, *DEVICES]),
        default=AUTO,
        show_default=True,
        help="Device that runs the model. auto uses a GPU if one works; cuda fails without one.",
    ),
    click.option(
        "--decoding",
        type=click.Choice(DECODINGS),
        default="exact",
        show_default=True,
        help="How to decode JPEGs. scaled reads large ones at a fraction of their size, which is faster and changes "
        "features slightly.",
    ),
    pooling_option,
    click.option(
        "--threads", type=click.IntRange(min=1), help="Number of processors for the model.  [default: all available]"
    ),
)
max_pixels_option = click.option(
    "--max-pixels",
    type=click.IntRange(min=1),
    default=MAX_PIXELS,
    show_default=True,
    help="Largest accepted image, in pixels. Decoding takes up to 24 bytes per pixel.",
)
max_items_option = click.option(
    "--max-items", type=click.IntRange(min=1), default=64, show_default=True, help="Most images per request."
)

_BULK_OPTIONS = (
    max_pixels_option,
    click.option(
        "--workers",
        type=click.IntRange(min=1),
        help="Number of decoder processes.  [default: one per available processor]",
    ),
    click.option(
        "--batch-size", type=click.IntRange(min=1), help="Images per batch.  [default: set by the model's input size]"
    ),
)


def pin_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that choose a model's version to a command."""
    for option in reversed(_PIN_OPTIONS):
        command = option(command)
    return command


def extraction_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds all options for embedding to a command, which gets them as one argument, `extraction`."""
    return _collect(
        command, (_MODEL_OPTION, *_RUN_OPTIONS, *_BULK_OPTIONS), ("model", "workers", "batch_size"), ("streams",)
    )


def serving_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that run a model, without those that choose one or embed in bulk."""
    return _collect(command, _RUN_OPTIONS, (), ("streams", "max_pixels"))


def _collect(
    command: Callable[..., Any], added: Sequence[Callable[..., Any]], others: Sequence[str], unasked: Sequence[str]
) -> Callable[..., Any]:
    """Adds the options `added`, which cover all fields of `RunOptions` except `unasked`, to a command."""

    @functools.wraps(command)
    def collected(**options: Any) -> Any:
        context = click.get_current_context()
        typed = click.core.ParameterSource.COMMANDLINE
        names = [entry.name for entry in fields(RunOptions) if entry.name not in unasked]
        given = tuple(name for name in (*names, *others) if context.get_parameter_source(name) is typed)
        run = RunOptions(**{name: options.pop(name) for name in names})
        extraction = Extraction(run, **{name: options.pop(name) for name in others}, given=given)
        return command(extraction=extraction, **options)

    for option in reversed(added):
        collected = option(collected)
    return collected


def quiet_downloads(quiet: bool) -> None:
    """Hides the progress bars of the Hub's client, which reads this variable at import."""
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
