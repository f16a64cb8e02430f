"""`robustfeat join`."""

from __future__ import annotations

import click

from robustfeat.cli.embed_command import show_result
from robustfeat.cli.rendering import Command


@click.command("join", cls=Command, short_help="Join the parts that `embed --part` wrote.")
@click.argument("parts", nargs=-1, required=True, metavar="PART...")
@click.option(
    "--out",
    required=True,
    metavar="FEATS",
    help="Where to write: a .npy, .parquet or .safetensors file, or a folder of several files, such as feats/.",
)
@click.option(
    "--rows-per-file",
    type=click.IntRange(min=1),
    metavar="N",
    help="Rows of each file where FEATS is a folder; 1,048,576 by default. Raised to whole shards of the parts.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as a JSON object.")
@click.option("--quiet", is_flag=True, help="No progress.")
def command(parts: tuple[str, ...], out: str, rows_per_file: int | None, as_json: bool, quiet: bool) -> int:
    """Joins all parts of a run to FEATS, which gets the bytes of a run that was not parted.

    A PART is a file or a folder of features that `robustfeat embed --part I/N` wrote. The parts stay, and may be named
    in any order.
    """
    from robustfeat.serving.bulk.joining import join_parts

    result = join_parts(parts, out, rows_per_file=rows_per_file, quiet=quiet)
    show_result(result, continued=False, as_json=as_json, quiet=quiet)
    return 3 if result.failed else 0
