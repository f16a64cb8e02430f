"""`robustfeat join`."""

from __future__ import annotations

import click

from robustfeat.cli.embed_command import show_result
from robustfeat.cli.rendering import Command


@click.command("join", cls=Command, short_help="Join the parts written by `embed --part`.")
@click.argument("parts", nargs=-1, required=True, metavar="PART...")
@click.option(
    "--out",
    required=True,
    metavar="FEATS",
    help="Features to write: a .npy, .parquet or .safetensors file, or a folder of several files, such as feats/.",
)
@click.option(
    "--rows-per-file",
    type=click.IntRange(min=1),
    metavar="N",
    help="Rows per file if FEATS is a folder, rounded up to whole shards of the parts.  [default: 1048576]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as a JSON object.")
@click.option("--quiet", is_flag=True, help="Hide progress.")
def command(parts: tuple[str, ...], out: str, rows_per_file: int | None, as_json: bool, quiet: bool) -> int:
    """Joins the parts of a run to FEATS, byte-identical to the output of a run without parts.

    A PART is a file or a folder of features from `robustfeat embed --part I/N`. All parts are needed, in any order.
    They are kept.
    """
    from robustfeat.serving.bulk.joining import join_parts

    result = join_parts(parts, out, rows_per_file=rows_per_file, quiet=quiet)
    show_result(result, continued=False, as_json=as_json, quiet=quiet)
    return 3 if result.failed else 0
