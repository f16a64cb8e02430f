"""`robustfeat train`."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robustfeat.cli.rendering import Command, say
from robustfeat.serving.engines.options import AUTO, DEVICES

if TYPE_CHECKING:
    from robustfeat.training.loop.trainer import TrainingResult
    from robustfeat.training.recipe import Recipe


def _spell_key(name: str, value: str | None) -> str | None:
    """The spelling of a recipe's key that has no option of its own."""
    from robustfeat.training.recipe import Recipe

    if name not in {item.name for item in dataclasses.fields(Recipe)}:
        return None
    if value is None:
        return f"--set {name}"
    given = click.get_current_context().params
    for text in reversed(given["settings"]):
        key, setting = _setting(text)
        if key == name and value in {str(setting), repr(setting)}:
            return f"--set {text}"
    size = given["image_size"]
    if name == "image_sizes" and value == repr(((0, size),)):
        return f"--image-size {size}"
    return f"--set {name}={value}"


@click.command(
    "train",
    cls=Command,
    fallback=_spell_key,
    short_help="Pre-train a network with HRRL or a relative of it.",
)
@click.argument("data", metavar="DATA")
@click.option("--out", required=True, metavar="RUN", help="Folder for the checkpoint and the metrics.")
@click.option(
    "--config", metavar="RECIPE", help="A shipped recipe's name or a TOML file; the options below override it."
)
@click.option(
    "--method",
    help="erm, el, cl, hrrl or stable; random, balanced or groupdro to compare with; or module:Class.  [default: hrrl]",
)
@click.option("--network", metavar="NAME", help="resnet18, or timm:NAME for a classifier of timm.  [default: resnet18]")
@click.option(
    "--init", metavar="MODEL|FILE", help="Start from the weights of a run, a model or a file.  [default: random]"
)
@click.option("--teacher", metavar="MODEL", help="Learn this model's features of the same crop, too.  [default: none]")
@click.option("--probe", metavar="DATA", help="Labelled images to score the features with, epoch by epoch.")
@click.option(
    "--labels/--no-labels", default=None, help="Learn the labels, or features alone: the teacher's or the start's."
)
@click.option(
    "--concepts",
    metavar="NAME|CSV",
    help="imagenet11, classes, a CSV file class,concept, or clusters:K (by the teacher).  [default: imagenet11]",
)
@click.option("--epochs", type=int)
@click.option("--batch-size", type=int, help="Images in a step, of all processes together.")
@click.option("--lr", type=float, help="Learning rate.")
@click.option("--weight-decay", type=float)
@click.option("--image-size", type=int, help="Side of the training and validation images in pixels, in all epochs.")
@click.option("--tau", type=float, help="Example level: length of the step at 224 px.")
@click.option(
    "--inner",
    type=click.Choice(["full", "half", "free"]),
    help="Example level: a whole inner pass, one at half the resolution, or none, with replayed batches.",
)
@click.option("--lambda", "lam", type=float, help="Concept level: strength of the pull towards q0.")
@click.option("--c", "q_warmup_divisor", metavar="C|auto", help="Concept level: divides q's first steps.")
@click.option("--reference", metavar="CSV", help="Concept level: q0, as concept,share.  [default: N_k / N]")
@click.option("--target", metavar="IMAGES", help="Concept level: q0, estimated from a target's images.")
@click.option("--target-model", metavar="MODEL", default="builtin", show_default=True, help="What classifies them.")
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]))
@click.option("--compile/--no-compile", default=None, help="Run the network through torch.compile.")
@click.option("--seed", type=int)
@click.option("--val-fraction", type=float, help="Share held out where DATA has no validation split.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any other key of a recipe; repeatable.")
@click.option("--resume", is_flag=True, help="Resume from the checkpoint in RUN, by its recipe.")
@click.option("--device", type=click.Choice([AUTO, *DEVICES]), default=AUTO, show_default=True)
@click.option("--workers", type=click.IntRange(min=0), help="Processes that decode images.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Processors for the network.")
@click.option("--cache-px", type=int, help="Decode once, to squares of this side; 0 decodes each time.")
@click.option(
    "--cache",
    default="auto",
    show_default=True,
    metavar="ram|device|FOLDER",
    help="Where those are kept; auto is the GPU's memory or, on a CPU, ram.",
)
@click.option("--stream", is_flag=True, help="Read a dataset of the Hub over the network and keep nothing.")
@click.option(
    "--checkpoint-every-s",
    type=float,
    default=300.0,
    show_default=True,
    help="Seconds between checkpoints within an epoch.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as a JSON object.")
@click.option("--quiet", is_flag=True, help="No progress.")
def command(
    data: str,
    out: str,
    config: str | None,
    reference: str | None,
    target: str | None,
    target_model: str,
    settings: tuple[str, ...],
    resume: bool,
    device: str,
    workers: int | None,
    threads: int | None,
    cache: str,
    stream: bool,
    checkpoint_every_s: float,
    as_json: bool,
    quiet: bool,
    **overrides: Any,
) -> int:
    """Trains a network on DATA: ResNet-18, or another by --network.

    DATA is a folder of class folders, or with train/ and val/ (or validation/, test/) of them, with train-*.parquet and
    validation-*.parquet files that have the columns image and label, or with train-*.tar and validation-*.tar shards;
    or hf://datasets/ORG/NAME, a dataset of the Hub. Without --config the recipe is the paper's for ImageNet: 90
    epochs of batches of 256 at 224 px, lr 0.1, tau 1, lambda 10, fp32. SIGINT and SIGTERM save a checkpoint first
    and make the exit code 75; --resume then goes on exactly. Several GPUs, or processes on a CPU, train together by
    `torchrun --nproc-per-node N -m robustfeat train ...`.
    """
    from robustfeat.errors import InputError
    from robustfeat.training.loop.arguments import check_arguments
    from robustfeat.training.loop.ranks import Ranks
    from robustfeat.training.recipe import Recipe, load_recipe

    _refuse_empty(config=config, reference=reference, target=target, cache=cache)
    if reference and target:
        raise InputError("--reference and --target: both give q0; pass one of them")
    base = load_recipe(config) if config else _recipe_of_run(Path(out)) if resume else Recipe()
    changes = _changes(overrides, settings, reference)
    if "method" not in changes:
        _refuse_foreign_code(base.method, f"--config {config}" if config else out)
    recipe = base.override(changes)
    if recipe.concepts not in {"imagenet11", "classes"} and Path(recipe.concepts).is_file():
        recipe = recipe.replace(concepts=str(Path(recipe.concepts).resolve()))  # the run resumes from any folder
    places = {name: getattr(recipe, name) for name in ("teacher", "probe")}
    recipe = recipe.replace(
        **{name: str(Path(place).resolve()) for name, place in places.items() if place and Path(place).is_dir()}
    )
    cache = cache.lower() if cache.lower() in {"auto", "ram", "device"} else cache
    ranks = Ranks.from_environment()
    if ranks.world == 1:  # of several processes each would print it; `train` checks again, in all of them together
        check_arguments(
            data,
            recipe,
            Path(out),
            ranks,
            resume=resume,
            cache=cache,
            stream=stream,
            checkpoint_every_s=checkpoint_every_s,
        )
    from robustfeat.training.loop.trainer import train  # loads PyTorch, which takes seconds

    result = train(
        data,
        recipe,
        out,
        resume=resume,
        device=device,
        workers=workers,
        threads=threads,
        cache=cache,
        stream=stream,
        target=target,
        target_model=target_model,
        checkpoint_every_s=checkpoint_every_s,
        quiet=quiet,
    )
    return _report(result, as_json, quiet) if ranks.rank == 0 else 0


def _refuse_empty(**values: str | None) -> None:
    from robustfeat.errors import InputError

    for name, value in values.items():
        if value == "":
            raise InputError("got nothing", argument=name, fix="name one, or leave the option out")


def _refuse_foreign_code(method: str, source: str) -> None:
    """A file must not choose code that is run: whoever starts a training names the code."""
    from robustfeat.errors import InputError
    from robustfeat.training.methods import METHODS

    if method not in METHODS:
        raise InputError(
            f"{source}: its recipe asks for code, method = {method!r}, which is not run because a file says so",
            fix=f"add `method={method}` if you trust that code",
        )


def _changes(overrides: dict[str, Any], settings: tuple[str, ...], reference: str | None) -> dict[str, Any]:
    """The keys of the recipe that the options change."""
    from robustfeat.training.concepts import load_reference

    changes = {name: value for name, value in overrides.items() if value is not None}
    image_size = changes.pop("image_size", None)
    if image_size is not None:
        changes["image_sizes"] = ((0, image_size),)
    changes |= dict(_setting(text) for text in settings)
    if "q_warmup_divisor" in changes:
        changes["q_warmup_divisor"] = _toml_value(str(changes["q_warmup_divisor"]))
    if reference:
        changes["reference"] = load_reference(reference)
    return changes


def _report(result: TrainingResult, as_json: bool, quiet: bool) -> int:
    """Prints how the run ended, and gives the exit code."""
    unknown = math.isnan(result.validation_accuracy)  # labels were not learned
    if as_json:
        summary = {
            "run": str(result.run),
            "validation_accuracy": None if unknown else round(result.validation_accuracy, 5),
            **({} if result.probe_accuracy is None else {"probe_accuracy": round(result.probe_accuracy, 5)}),
            "bad_images": len(result.bad_images),
        }
        click.echo(json.dumps(summary))
    elif not quiet:
        told = [] if unknown else [f"validation accuracy {result.validation_accuracy:.2%}"]
        if result.probe_accuracy is not None:
            told.append(f"probe {result.probe_accuracy:.2%}")
        say(f"{result.run}" + (": " + ", ".join(told) if told else ""), err=True)
    if not result.bad_images:
        return 0
    say(f"robustfeat: {len(result.bad_images)} images could not be decoded and were left out", err=True)
    # torchrun takes any exit code but 0 for a crash, and reports or restarts a run that is done.
    return 0 if "TORCHELASTIC_RUN_ID" in os.environ else 3


def _recipe_of_run(out: Path) -> Recipe:
    from robustfeat.training.loop.run_folder import checkpoint_file
    from robustfeat.training.recipe import Recipe

    file = checkpoint_file(out)
    from robustfeat.training.loop.checkpoint import load_checkpoint  # loads PyTorch

    return Recipe.from_dict(load_checkpoint(file).recipe)


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise click.UsageError(f"--set {text}: expected KEY=VALUE, for example --set warmup_epochs=2")
    return key.strip(), _toml_value(value.strip())


def _toml_value(text: str) -> Any:
    """A number, true, a list, a table; what is none of them is text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
