"""`robustfeat embed`."""

from __future__ import annotations

import json

import click


@click.command("embed", short_help="Turn images into features.")
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option("--out", required=True, metavar="FEATS.npy", help="Where to write the features.")
@click.option("--model", default="builtin", show_default=True, help="A model folder, or builtin.")
@click.option("--precision", type=click.Choice(["fp32", "int8"]), default="fp32", show_default=True)
@click.option("--engine", type=click.Choice(["auto", "onnxruntime"]), default="auto", show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="Processors for the model.  [default: all granted]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as a JSON object.")
@click.option("--quiet", is_flag=True, help="No progress.")
def command(
    inputs: tuple[str, ...],
    out: str,
    model: str,
    precision: str,
    engine: str,
    device: str,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Embeds image files and folders of images: one float32 row for each image.

    Beside FEATS.npy come FEATS.index.jsonl (which row is which file, and what failed) and FEATS.meta.json (which
    model made it). An image that cannot be read is a row of NaN, and the exit code is then 3.
    """
    from robustfeat.serving.embedding import embed_files
    from robustfeat.serving.extractor import FeatureExtractor
    from robustfeat.serving.inputs import list_images

    found = list_images(inputs)
    extractor = FeatureExtractor.from_pretrained(
        model, precision=precision, engine=engine, device=device, threads=threads
    )
    result = embed_files(extractor, found, out, quiet=quiet)
    if as_json:
        summary = {
            "out": str(result.features),
            "images": result.images,
            "feature_size": result.feature_size,
            "failed": result.failed,
            "skipped": result.skipped,
            "seconds": round(result.seconds, 3),
        }
        click.echo(json.dumps(summary))
    elif not quiet:
        click.echo(f"{result.features}: {result.images} x {result.feature_size} float32", err=True)
    if result.failed:
        index = result.features.with_suffix(".index.jsonl")
        click.echo(f"robustfeat: {result.failed} of {result.images} images failed; {index} says why", err=True)
        return 3
    return 0
