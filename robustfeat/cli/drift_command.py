"""`robustfeat drift`."""

from __future__ import annotations

import click

from robustfeat.cli.extraction import Extraction, Number, extraction_options
from robustfeat.cli.feature_inputs import open_pair, remark, report_failed
from robustfeat.cli.lines import require_output, write_lines
from robustfeat.cli.rendering import Command, say


@click.command("drift", cls=Command, short_help="Test whether new images differ from a reference.")
@click.argument("reference", metavar="REFERENCE")
@click.argument("new", metavar="NEW")
@click.option(
    "--head",
    metavar="HEAD",
    help="Also estimate the shares of its classes and its accuracy on NEW. A folder, or ORG/NAME on the Hub.",
)
@click.option(
    "--alpha",
    type=Number(min=0, max=1, min_open=True, max_open=True),
    default=0.01,
    show_default=True,
    help="A p-value below it is a shift.",
)
@click.option(
    "--sample",
    type=click.IntRange(min=2, max=4000),
    default=1000,
    show_default=True,
    metavar="N",
    help="Compare at most N images of each collection, drawn at random.",
)
@click.option(
    "--permutations",
    type=click.IntRange(min=19, max=99_999),
    default=999,
    show_default=True,
    metavar="N",
    help="The smallest possible p-value is 1 / (N + 1).",
)
@click.option(
    "--out", metavar="FILE", help="Write the images of NEW, the least typical first, to a .csv or .jsonl file."
)
@extraction_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--quiet", is_flag=True, help="No progress, no report on stderr.")
def command(
    reference: str,
    new: str,
    head: str | None,
    alpha: float,
    sample: int,
    permutations: int,
    out: str | None,
    extraction: Extraction,
    as_json: bool,
    quiet: bool,
) -> int:
    """Tests whether the images of NEW come from the same distribution as those of REFERENCE.

    Each is a file of features that `embed` wrote, or images as `embed` takes them. Images are embedded with the model
    of the features beside them. The test compares features by their energy distance, which lies between 0 and 1, and
    finds the p-value by permutations. The typicality of an image is near 0 if it is unlike the images of REFERENCE.

    The exit code is 3 if there is a shift, or if images failed; those are left out.
    """
    from robustfeat.cli.heads import load_head
    from robustfeat.progress import Progress, json_line
    from robustfeat.serving.collections.drift import measure_drift
    from robustfeat.serving.collections.drift_report import headline, remarks, to_csv, to_dict, to_jsonl

    if alpha <= 1 / (permutations + 1):
        raise click.UsageError(f"--alpha {alpha:g} needs --permutations above {1 / alpha - 1:.0f}; got {permutations}")
    require_output(out, [reference, new])
    opened = load_head(head) if head else None
    if opened is not None:
        opened.require_calibration()
    old, found = open_pair(reference, new, extraction, quiet, head=opened, head_place=head or "")
    progress = Progress("drift", permutations, "permutations", quiet=quiet)
    drift = measure_drift(old, found, opened, sample=sample, permutations=permutations, advance=progress.advance)
    progress.finish()
    if out is not None:
        write_lines((to_jsonl if out.endswith(".jsonl") else to_csv)(drift, found), out)
    for line in remarks(drift, old, found):
        remark(line, quiet)
    if as_json:
        click.echo(json_line(to_dict(drift, old, found, alpha)))
    else:
        say(headline(drift, alpha))
    codes = [report_failed(features, "left out") for features in (old, found)]
    return 3 if any(codes) or drift.comparison.p < alpha else 0
