"""The options of commands that embed images, and what they mean."""

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
    "pin_options",
    "pooling_option",
    "serving_options",
]


class Number(click.FloatRange):
    """A float within bounds that is not infinite; click lets NaN through."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number; what is none fails as click's own types do."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number.", param, ctx)
        return number


ABOVE_ZERO = Number(min=0, min_open=True)

_PIN_OPTIONS = (
    click.option("--revision", metavar="REV", help="A branch, tag or commit on the Hub.  [default: main]"),
    click.option("--config-hash", metavar="SHA256", help="The hash that robustfeat info prints; it pins all files."),
)

pooling_option = click.option(
    "--pooling",
    type=click.Choice([AUTO, *POOLINGS]),
    default=AUTO,
    show_default=True,
    help="Features of a model of transformers; auto goes by its type.",
)


@dataclass(frozen=True)
class Extraction:
    """How images are embedded, as the command line says.

    Attributes:
        model: a model folder, ORG/NAME on the Hub, or builtin.
        options: how it is run, and which version of it.
        workers, batch_size: as `embed_files` takes them.
        given: the options that were typed, for commands that may not need them.
    """

    options: RunOptions
    model: str = "builtin"
    workers: int | None = None
    batch_size: int | None = None
    given: tuple[str, ...] = field(default=(), compare=False)

    def open(self, *, throughput: bool = True) -> FeatureExtractor:
        """The extractor: for the best throughput, or for the soonest answer to a single image."""
        from robustfeat.serving.extractor import FeatureExtractor

        return FeatureExtractor.load(self.model, self.options.for_throughput() if throughput else self.options)


_MODEL_OPTION = click.option(
    "--model", default="builtin", show_default=True, help="A model folder, ORG/NAME on the Hub, or builtin."
)
_RUN_OPTIONS = (
    *_PIN_OPTIONS,
    click.option(
        "--precision",
        type=click.Choice(PRECISIONS),
        default="fp32",
        show_default=True,
        help="fp16 is for GPUs, bf16 (with OpenVINO) and int8 are for processors.",
    ),
    click.option(
        "--engine",
        type=click.Choice([AUTO, *ENGINES]),
        default=AUTO,
        show_default=True,
        help="auto is ONNX Runtime, or OpenVINO for bf16. tensorrt needs an NVIDIA GPU.",
    ),
    click.option(
        "--device",
        type=click.Choice([AUTO, *DEVICES]),
        default=AUTO,
        show_default=True,
        help="auto takes a GPU where one answers; cuda fails where none does.",
    ),
    click.option(
        "--decoding",
        type=click.Choice(DECODINGS),
        default="exact",
        show_default=True,
        help="scaled decodes large JPEGs at a fraction of their size: faster, slightly other features.",
    ),
    pooling_option,
    click.option("--threads", type=click.IntRange(min=1), help="Processors for the model.  [default: all granted]"),
)
_BULK_OPTIONS = (
    click.option(
        "--max-pixels",
        type=click.IntRange(min=1),
        default=MAX_PIXELS,
        show_default=True,
        help="Largest accepted image, in pixels; decoding takes up to 24 bytes for each.",
    ),
    click.option(
        "--workers", type=click.IntRange(min=1), help="Processes that decode.  [default: all processors granted]"
    ),
    click.option(
        "--batch-size", type=click.IntRange(min=1), help="Images in a batch.  [default: by the model's input]"
    ),
)


def pin_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command the options that say which version of a model it takes."""
    for option in reversed(_PIN_OPTIONS):
        command = option(command)
    return command


def extraction_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command these options, as one argument `extraction`."""
    return _collect(
        command, (_MODEL_OPTION, *_RUN_OPTIONS, *_BULK_OPTIONS), ("model", "workers", "batch_size"), ("streams",)
    )


def serving_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The same without the options that say which model, and how it works in bulk."""
    return _collect(command, _RUN_OPTIONS, (), ("streams", "max_pixels"))


def _collect(
    command: Callable[..., Any], added: Sequence[Callable[..., Any]], others: Sequence[str], unasked: Sequence[str]
) -> Callable[..., Any]:
    """Gives a command the options `added`; those of `RunOptions` but for `unasked`, which follow from the command."""

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
    """Leaves out the progress bars of the Hub's client, which reads this when it is imported."""
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
