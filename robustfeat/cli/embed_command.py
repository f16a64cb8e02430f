"""`robustfeat embed`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from robustfeat.cli.extraction import Extraction, extraction_options, quiet_downloads
from robustfeat.cli.rendering import Command, say

if TYPE_CHECKING:
    from robustfeat.serving.bulk.embedding import EmbeddingResult
    from robustfeat.serving.bulk.parts import Part


def _parse_part(_: click.Context, __: click.Parameter, text: str | None) -> Part | None:
    from robustfeat.serving.bulk.parts import Part

    try:
        return None if text is None else Part.parse(text)
    except ValueError as exc:
        raise click.BadParameter(str(exc)) from exc


@click.command("embed", cls=Command, short_help="Turn images into features.")
@click.argument("inputs", nargs=-1, metavar="[INPUT]...")
@click.option(
    "--out",
    required=True,
    metavar="FEATS",
    help="Features to write: a .npy, .parquet or .safetensors file, or a folder of several files, such as feats/ or "
    "feats.parquet/.",
)
@click.option(
    "--rows-per-file",
    type=click.IntRange(min=1),
    metavar="N",
    help="Rows per file if FEATS is a folder, rounded up to a multiple of --shard-rows.  [default: 1048576]",
)
@extraction_options
@click.option("--files-from", metavar="FILE", help="Read more INPUTs from FILE, one per line; - is stdin.")
@click.option("--null", is_flag=True, help="Lines of --files-from end with NUL instead of a newline.")
@click.option(
    "--match",
    multiple=True,
    metavar="PATTERN",
    help="Choose files of folders and archives by a pattern such as '*.jpg' instead of by suffix. Repeatable.",
)
@click.option(
    "--on-error",
    type=click.Choice(["nan", "stop"]),
    default="nan",
    show_default=True,
    help="What to do if an image fails: write a row of NaN, or stop the run.",
)
@click.option("--append", is_flag=True, help="Add inputs whose path is not in FEATS yet.")
@click.option(
    "--sync",
    is_flag=True,
    help="Update FEATS to match the inputs: drop rows of removed files, embed new and changed images, and keep the "
    "other rows.",
)
@click.option(
    "--part",
    callback=_parse_part,
    metavar="I/N",
    help="Embed only part I of N of the inputs. robustfeat join joins all parts.",
)
@click.option(
    "--restart",
    is_flag=True,
    help="Discard an unfinished run or features of another model, and start again.",
)
@click.option(
    "--shard-rows",
    type=click.IntRange(min=1),
    default=4096,
    show_default=True,
    help="Checkpoint every N rows. A killed run resumes after the last checkpoint.",
)
@click.option(
    "--ray",
    is_flag=False,
    flag_value="auto",
    metavar="[ADDRESS]",
    help="Run on Ray: on the cluster at HOST:PORT. Without ADDRESS, on the running cluster or a new local one.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as a JSON object.")
@click.option("--quiet", is_flag=True, help="Hide progress.")
def command(
    inputs: tuple[str, ...],
    out: str,
    rows_per_file: int | None,
    extraction: Extraction,
    files_from: str | None,
    null: bool,
    match: tuple[str, ...],
    on_error: str,
    append: bool,
    sync: bool,
    part: Part | None,
    restart: bool,
    shard_rows: int,
    ray: str | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Embeds images, one float32 row per image.

    An INPUT is a folder, an image, a quoted glob, FILE.tar, FILE.parquet (or FILE.parquet:COLUMN), or - for a list on
    stdin. It may be a URL such as s3://bucket/photos. Formats are JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF and, with the
    extra heic, HEIC. They are recognised by content.

    Beside FEATS, NAME.index.jsonl lists the path, hash and error of each row, and NAME.meta.json describes the model.
    If FEATS ends with a slash, it becomes a folder with files of features, their index files and one meta file. An
    image that cannot be read is a row of NaN, and the exit code is then 3. If a run is killed, repeat the command: it
    resumes.
    """
    from robustfeat.serving.bulk.embedding import embed_files
    from robustfeat.serving.bulk.job import Places
    from robustfeat.serving.inputs.listing import list_inputs
    from robustfeat.serving.inputs.remote import is_remote

    if not inputs and files_from is None:
        raise click.UsageError("Missing argument 'INPUT...', or --files-from.")
    Places.of(out)  # a wrong name is said at once
    quiet_downloads(quiet)
    extractor = extraction.open()
    scratch = None if is_remote(out) else Path(out).parent
    with list_inputs(inputs, files_from=files_from, null=null, match=match, folder=scratch) as found:
        result = embed_files(
            extractor,
            found,
            out,
            batch_size=extraction.batch_size,
            workers=extraction.workers,
            on_error=on_error,
            restart=restart,
            append=append,
            sync=sync,
            part=part,
            rows_per_file=rows_per_file,
            shard_rows=shard_rows,
            ray=ray,
            quiet=quiet,
        )
    show_result(result, continued=append or sync, as_json=as_json, quiet=quiet)
    return 3 if result.failed else 0


def show_result(result: EmbeddingResult, *, continued: bool, as_json: bool, quiet: bool) -> None:
    """Prints what was written.

    Args:
        continued: whether the output may have held inputs before.
    """
    if as_json:
        summary = {
            "out": result.features,
            "images": result.images,
            "feature_size": result.feature_size,
            "failed": result.failed,
            "skipped": result.skipped,
            "left_out": result.left_out,
            **({"known": result.known} if continued else {}),
            "seconds": round(result.seconds, 3),
        }
        click.echo(json.dumps(summary))
    elif not quiet:
        known = f" ({result.known:,} inputs were there already)" if continued else ""
        say(f"{result.features}: {result.images} x {result.feature_size} float32{known}", err=True)
        from robustfeat.serving.inputs.choice import say_left_out

        if said := say_left_out(result.left_out):
            say(f"robustfeat: {said}", err=True)
    if result.failed:
        say(f"robustfeat: {result.failed:,} of {result.images:,} images failed; {result.index} says why", err=True)
