"""`robustfeat duplicates`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from robustfeat.cli.extraction import Number
from robustfeat.cli.feature_inputs import remark, report_failed
from robustfeat.cli.head_options import names_option
from robustfeat.cli.lines import require_output, write_lines
from robustfeat.cli.rendering import Command, say
from robustfeat.counts import format_count

if TYPE_CHECKING:
    from robustfeat.serving.collections.keeping import Measures


@click.command("duplicates", cls=Command, short_help="List duplicate images and which ones to drop.")
@click.argument("feats", metavar="FEATS")
@click.option(
    "--threshold",
    type=Number(min=0, min_open=True, max=1),
    metavar="COSINE",
    help="Smallest cosine of near-duplicates.  [default: measured for the built-in model; see the docs]",
)
@click.option(
    "--keep",
    type=click.Choice(["first", "largest", "sharpest"]),
    default="first",
    show_default=True,
    help="Image to keep per group: the first row, the most pixels, or the most detail.",
)
@click.option(
    "--images",
    multiple=True,
    metavar="INPUT",
    help="Images behind FEATS, as passed to embed. --keep largest and sharpest read them. Repeatable.",
)
@click.option("--out", metavar="FILE", help="Write to this .csv or .jsonl file instead of CSV to stdout.")
@click.option("--drop-list", metavar="FILE", help="Also write the paths to drop to FILE, one per line.")
@click.option("--null", is_flag=True, help="End the lines of --drop-list with NUL instead of a newline.")
@names_option
@click.option("--threads", type=click.IntRange(min=1), help="Number of processors to use.  [default: all available]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line instead of CSV.")
@click.option("--quiet", is_flag=True, help="Hide progress and the summary.")
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
    """Lists the duplicates in FEATS and which ones to drop. It deletes nothing.

    Prints CSV with the columns group, row, path, cosine, action (keep or drop) and kind.

    Exact duplicates are files with the same bytes. Near-duplicates have features whose cosine reaches --threshold.
    Each image to drop reaches it with the kept image of its group, so a chain of similar images is not one group. The
    search misses no pair. Failed rows are left out, and the exit code is then 3.
    """
    from robustfeat.progress import Progress
    from robustfeat.serving.collections import sorting
    from robustfeat.serving.collections.keeping import measure_images
    from robustfeat.serving.collections.thresholds import default_threshold
    from robustfeat.serving.heads.features import open_array, open_features
    from robustfeat.system import available_cpus

    if keep != "first" and not images:
        raise click.UsageError(f"--keep {keep} reads the images; pass those given to embed as --images")
    inputs = [feats, *images, *([names] if names else [])]
    require_output(out, inputs)
    require_output(drop_list, [*inputs, *([out] if out else [])], ("",), option="--drop-list")
    if null and drop_list is None:
        raise click.UsageError("--null applies to --drop-list; pass that, too")
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
        f"{format_count(result.groups, 'group')}: {format_count(result.exact + result.near, 'image')} to drop "
        f"({format_count(result.exact, 'exact copy', 'exact copies')}, {result.near:,} near)",
        quiet,
    )
    if result.repeated:
        say(
            f"robustfeat: {format_count(result.repeated, 'row')} left out with path and bytes of an earlier row; "
            "to compare files of several folders, embed a folder that holds them all",
            err=True,
        )
    if result.unread:
        say(
            f"robustfeat: {format_count(result.unread, 'image')} could not be found or read; others were preferred",
            err=True,
        )
    code = report_failed(features, "left out")
    return 3 if result.unread else code
