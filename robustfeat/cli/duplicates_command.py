"""`robustfeat duplicates`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from robustfeat.cli.extraction import Number
from robustfeat.cli.feature_inputs import remark
from robustfeat.cli.lines import require_output, write_lines
from robustfeat.cli.rendering import Command, say

if TYPE_CHECKING:
    from robustfeat.serving.collections.keeping import Measures


@click.command("duplicates", cls=Command, short_help="List duplicate images, and which of them to drop.")
@click.argument("feats", metavar="FEATS")
@click.option(
    "--threshold",
    type=Number(min=0, min_open=True, max=1),
    metavar="COSINE",
    help="Images are near-duplicates from this cosine on.  [default: measured for the built-in model; see the docs]",
)
@click.option(
    "--keep",
    type=click.Choice(["first", "largest", "sharpest"]),
    default="first",
    show_default=True,
    help="Which image of a group stays: the first row, the one of most pixels, or the one of most detail.",
)
@click.option(
    "--images",
    multiple=True,
    metavar="INPUT",
    help="Where the images lie, as embed was told; --keep largest and sharpest read them. Repeatable.",
)
@click.option("--out", metavar="FILE", help="A .csv or .jsonl file, instead of CSV on stdout.")
@click.option("--drop-list", metavar="FILE", help="Also write the paths to drop to FILE, one per line.")
@click.option("--null", is_flag=True, help="The lines of --drop-list end in NUL.")
@click.option(
    "--names", metavar="FILE", help="The path of each row, one per line, of a .npy file that embed did not write."
)
@click.option("--threads", type=click.IntRange(min=1), help="Processors to use.  [default: all granted]")
@click.option("--json", "as_json", is_flag=True, help="JSON lines on stdout.")
@click.option("--quiet", is_flag=True, help="No progress, no summary.")
def command(
    feats: str,
    threshold: float | None,
    keep: str,
    images: tuple[str, ...],
    out: str | None,
    drop_list: str | None,
    null: bool,
    names: str | None,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Lists the duplicates in FEATS as CSV: group, row, path, cosine, action (keep or drop), kind. It deletes nothing.

    Exact duplicates are files with the same bytes. Near-duplicates have features whose cosine reaches --threshold.
    Every image to drop is that similar to the kept image of its group, so a chain of similar images is not one group.
    No pair is missed. Failed rows are left out, and the exit code is then 3.
    """
    from robustfeat.progress import Progress
    from robustfeat.serving.collections import sorting
    from robustfeat.serving.collections.keeping import measure_images
    from robustfeat.serving.collections.thresholds import default_threshold
    from robustfeat.serving.heads.features import open_array, open_features
    from robustfeat.system import available_cpus

    if keep != "first" and not images:
        raise click.UsageError(f"--keep {keep} reads the images; pass --images with the folder that embed was given")
    inputs = [feats, *images, *([names] if names else [])]
    require_output(out, inputs)
    require_output(drop_list, [*inputs, *([out] if out else [])], ("",), option="--drop-list")
    if null and drop_list is None:
        raise click.UsageError("--null is for --drop-list")
    features = open_features(feats) if names is None else open_array(feats, names)
    if threshold is None:
        threshold, why = default_threshold(features)
        remark(f"threshold {threshold:.6g} ({why})", quiet)
    threads = threads or available_cpus()
    progress = Progress("duplicates", int(features.good.sum()), "rows", quiet=quiet)

    def measure(paths: Sequence[str]) -> Measures:
        read = Progress("read", len(paths), quiet=quiet)
        found = measure_images(keep, images, paths, threads=threads, progress=read)
        read.finish()
        return found

    result = sorting.sort_duplicates(
        features, threshold, None if keep == "first" else measure, threads=threads, progress=progress
    )
    progress.finish()
    if drop_list is not None:
        write_lines(sorting.drop_list(result.verdicts, features, null=null), drop_list)
    to_lines = sorting.to_jsonl if as_json or (out or "").endswith(".jsonl") else sorting.to_csv
    write_lines(to_lines(result.verdicts), out)
    remark(
        f"{result.groups:,} groups: {result.exact + result.near:,} images to drop "
        f"({result.exact:,} exact copies, {result.near:,} near)",
        quiet,
    )
    if result.repeated:
        say(
            f"robustfeat: {result.repeated:,} rows have the path and the bytes of an earlier row and were left out; "
            "to compare files of several folders, embed a folder that holds them all",
            err=True,
        )
    if result.unread:
        say(f"robustfeat: {result.unread:,} images were not found or not read: others were kept first", err=True)
    if features.errors:
        say(f"robustfeat: {len(features.errors):,} images failed and were left out", err=True)
    return 3 if features.errors or result.unread else 0
