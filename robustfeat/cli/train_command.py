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
from robustfeat.counts import format_count
from robustfeat.serving.engines.options import AUTO, DEVICES

if TYPE_CHECKING:
    from robustfeat.training.loop.trainer import TrainingResult
    from robustfeat.training.recipe import Recipe


def _spell_key(name: str, value: str | None) -> str | None:
    """Spells a key of the recipe that has no option."""
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
    short_help="Pre-train a network with HRRL or a related method.",
)
@click.argument("data", metavar="DATA")
@click.option("--out", required=True, metavar="RUN", help="Folder for the checkpoint and the metrics.")
@click.option(
    "--config", metavar="RECIPE", help="Name of a shipped recipe, or a TOML file. The options below override it."
)
@click.option(
    "--method",
    help="Training method: erm, el, cl, hrrl or stable; random, balanced or groupdro as baselines; or module:Class.  "
    "[default: hrrl]",
)
@click.option(
    "--network",
    metavar="NAME",
    help="Network to train: resnet18, or timm:NAME for a classifier of timm.  [default: resnet18]",
)
@click.option(
    "--init", metavar="MODEL|FILE", help="Start from the weights of a run, a model or a file.  [default: random]"
)
@click.option("--teacher", metavar="MODEL", help="Also learn this model's features of the same crop.  [default: none]")
@click.option("--probe", metavar="DATA", help="Labelled images on which each epoch's features are scored.")
@click.option(
    "--labels/--no-labels",
    default=None,
    help="Learn the labels, or only the features of the teacher or the start.  [default: labels]",
)
@click.option(
    "--concepts",
    metavar="NAME|CSV",
    help="Groups of classes: imagenet11, classes, a CSV file class,concept, or clusters:K of the teacher's features.  "
    "[default: imagenet11]",
)
@click.option("--epochs", type=int, help="Number of epochs.  [default: 90]")
@click.option("--batch-size", type=int, help="Images per step, over all processes.  [default: 256]")
@click.option("--lr", type=float, help="Learning rate.  [default: 0.1]")
@click.option("--weight-decay", type=float, help="Weight decay of the optimizer.  [default: 0.0001]")
@click.option(
    "--image-size",
    type=int,
    help="Side of the training and validation images in pixels, in all epochs.  [default: 224]",
)
@click.option("--tau", type=float, help="Example level: length of the step at 224 px.  [default: 1]")
@click.option(
    "--inner",
    type=click.Choice(["full", "half", "free"]),
    help="Example level: run a full inner pass, one at half the resolution, or none and replay batches.  "
    "[default: full]",
)
@click.option("--lambda", "lam", type=float, help="Concept level: strength of the pull towards q0.  [default: 10]")
@click.option(
    "--c", "q_warmup_divisor", metavar="C|auto", help="Concept level: divisor of the first steps of q.  [default: 10]"
)
@click.option("--reference", metavar="CSV", help="Concept level: file of q0, concept,share.  [default: N_k / N]")
@click.option("--target", metavar="IMAGES", help="Concept level: estimate q0 from these images of the target.")
@click.option(
    "--target-model",
    metavar="MODEL",
    default="builtin",
    show_default=True,
    help="Model that classifies the images of --target.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16", "fp16"]),
    help="Precision of training. fp16 needs a GPU.  [default: fp32]",
)
@click.option(
    "--compile/--no-compile", default=None, help="Compile the network with torch.compile.  [default: no-compile]"
)
@click.option("--seed", type=int, help="Random seed of weights, order and crops.  [default: 0]")
@click.option(
    "--val-fraction", type=float, help="Share of images held out if DATA has no validation split.  [default: 0.02]"
)
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set any other key of the recipe. Repeatable."
)
@click.option("--resume", is_flag=True, help="Resume from the checkpoint in RUN, with its recipe.")
@click.option(
    "--device",
    type=click.Choice([AUTO, *DEVICES]),
    default=AUTO,
    show_default=True,
    help="Device that trains the network. auto uses a GPU if one works.",
)
@click.option("--workers", type=click.IntRange(min=0), help="Number of decoder processes.  [default: by processors]")
@click.option(
    "--threads", type=click.IntRange(1, 1024), help="Number of processors for the network.  [default: all available]"
)
@click.option(
    "--cache-px",
    type=int,
    help="Decode each image once, to a square of this side in pixels; 0 decodes in every epoch.  [default: 0]",
)
@click.option(
    "--cache",
    default="auto",
    show_default=True,
    metavar="ram|device|FOLDER",
    help="Where --cache-px keeps the squares. auto is the GPU's memory or, on a CPU, ram.",
)
@click.option("--stream", is_flag=True, help="Read a Hub dataset over the network, and store nothing.")
@click.option(
    "--checkpoint-every-s",
    type=float,
    default=300.0,
    show_default=True,
    help="Seconds between checkpoints within an epoch.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as a JSON object.")
@click.option("--quiet", is_flag=True, help="Hide progress.")
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
    """Trains ResNet-18, or another --network, on DATA.

    DATA is a folder, or hf://datasets/ORG/NAME, a dataset on the Hub. The folder has one folder per class, or train/
    and val/ (validation/, test/) with one folder per class. It may also have train-*.parquet and validation-*.parquet
    files with the columns image and label, or train-*.tar and validation-*.tar shards.

    Defaults are the paper's recipe for ImageNet. With --config they come from RECIPE, and with --resume from RUN.

    On SIGINT or SIGTERM, training saves a checkpoint, and the exit code is 75. --resume then continues exactly. For
    several GPUs or CPU processes, run `torchrun --nproc-per-node N -m robustfeat train ...`.
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
    if ranks.world == 1:  # each of several processes would print the error; `train` checks again, for all together
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
            raise InputError("expected a name; got an empty one", argument=name, fix="pass a name, or leave it out")


def _refuse_foreign_code(method: str, source: str) -> None:
    """Refuses a method outside the package that a file names: only the command line may choose code to run."""
    from robustfeat.errors import InputError
    from robustfeat.training.methods import METHODS

    if method not in METHODS:
        raise InputError(
            f"{source}: its recipe names code outside robustfeat, method = {method!r}; a file may not choose code",
            fix=f"add `method={method}` if you trust that code",
        )


def _changes(overrides: dict[str, Any], settings: tuple[str, ...], reference: str | None) -> dict[str, Any]:
    """The recipe's keys that the options change, with their values."""
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
    """Prints the result of the run and returns the exit code."""
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
        scores = [] if unknown else [f"validation accuracy {result.validation_accuracy:.2%}"]
        if result.probe_accuracy is not None:
            scores.append(f"probe {result.probe_accuracy:.2%}")
        say(f"{result.run}" + (": " + ", ".join(scores) if scores else ""), err=True)
    if not result.bad_images:
        return 0
    say(f"robustfeat: left out {format_count(len(result.bad_images), 'image')} that could not be decoded", err=True)
    # torchrun treats every other exit code as a crash, and would report or restart a finished run.
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
    """Parses a TOML value; anything that is not one is text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
