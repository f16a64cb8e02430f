"""`robustfeat train`."""

from __future__ import annotations

import json
from typing import Any

import click


@click.command("train", short_help="Pre-train a network with HRRL or a relative of it.")
@click.argument("data", metavar="DATA")
@click.option("--out", required=True, metavar="RUN", help="Folder for the checkpoint and the metrics.")
@click.option(
    "--config", metavar="RECIPE", help="A shipped recipe's name or a TOML file; the options below override it."
)
@click.option("--method", help="erm, el, cl, hrrl, or package.module:Class.  [default: hrrl]")
@click.option("--concepts", help="imagenet11, classes, or a CSV file class,concept.  [default: imagenet11]")
@click.option("--epochs", type=int)
@click.option("--batch-size", type=int)
@click.option("--lr", type=float, help="Learning rate.")
@click.option("--weight-decay", type=float)
@click.option("--image-size", type=int, help="Side of the training and validation images in pixels, in all epochs.")
@click.option("--tau", type=float, help="Example level: length of the step at 224 px.")
@click.option("--lambda", "lam", type=float, help="Concept level: strength of the pull towards N_k / N.")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]))
@click.option("--seed", type=int)
@click.option("--val-fraction", type=float, help="Share held out where DATA has no validation split.")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in RUN.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--workers", type=click.IntRange(min=0), help="Processes that decode images.")
@click.option("--threads", type=click.IntRange(min=1), help="Processors for the network.")
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
    image_size: int | None,
    resume: bool,
    device: str,
    workers: int | None,
    threads: int | None,
    checkpoint_every_s: float,
    as_json: bool,
    quiet: bool,
    **overrides: Any,
) -> int:
    """Trains ResNet-18 on DATA.

    DATA is a folder with train/ and val/ (or validation/, test/) of class folders, with train-*.parquet and
    validation-*.parquet files that have the columns image and label, or with train-*.tar and validation-*.tar shards;
    or hf://datasets/ORG/NAME, a dataset of the Hub. Without --config the recipe is the paper's for ImageNet. SIGINT and
    SIGTERM save a checkpoint first; --resume then goes on exactly.
    """
    from robustfeat.training.recipe import Recipe, load_recipe
    from robustfeat.training.trainer import train

    changes = {name: value for name, value in overrides.items() if value is not None}
    if image_size is not None:
        changes |= {"image_sizes": ((0, image_size),), "validation_size": image_size}
    recipe = (load_recipe(config) if config else Recipe()).replace(**changes)
    result = train(
        data,
        recipe,
        out,
        resume=resume,
        device=device,
        workers=workers,
        threads=threads,
        checkpoint_every_s=checkpoint_every_s,
        quiet=quiet,
    )
    if as_json:
        summary = {
            "run": str(result.run),
            "validation_accuracy": round(result.validation_accuracy, 5),
            "bad_images": len(result.bad_images),
        }
        click.echo(json.dumps(summary))
    elif not quiet:
        click.echo(f"{result.run}: validation accuracy {result.validation_accuracy:.2%}", err=True)
    if result.bad_images:
        click.echo(f"robustfeat: {len(result.bad_images)} images could not be decoded and were left out", err=True)
        return 3
    return 0
