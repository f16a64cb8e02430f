"""`robustfeat compare`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from robustfeat.cli.lines import require_output
from robustfeat.cli.rendering import Command

_FORMATS = (".csv", ".md", ".tex", ".json", ".png", ".svg")


@click.command("compare", cls=Command, short_help="Compare training methods over seeds.")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option("--baseline", metavar="METHOD", help="Method that the others are compared with.  [default: erm]")
@click.option(
    "--interval",
    type=click.Choice(["pooled", "paired"]),
    default="pooled",
    show_default=True,
    help="Interval of the p-values and of the plot.",
)
@click.option(
    "--out", "outs", metavar="FILE", multiple=True, help="Also write a .csv, .md, .tex, .json, .png or .svg file."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per row instead of the table.")
@click.option("--quiet", is_flag=True, help="No remarks.")
def command(
    runs: tuple[str, ...], baseline: str | None, interval: str, outs: tuple[str, ...], as_json: bool, quiet: bool
) -> int:
    """Compares training methods by runs of several seeds.

    RUN is a run of `robustfeat train`, or a JSON file of `robustfeat evaluate`, which also keeps the answers per image.
    Runs whose recipes differ only in the seed are one method. NAME=RUN gives the method another name.

    The table has the difference from the baseline on each task with 95 % intervals over seeds and test images. Holm's
    correction covers all comparisons. --out may be repeated, and .png or .svg is a forest plot.
    """
    for out in outs:
        require_output(out, runs, _FORMATS)

    from robustfeat.hub.markdown import table
    from robustfeat.progress import remark
    from robustfeat.training.comparison.methods import compare_methods, differing_settings, group_scores
    from robustfeat.training.comparison.scores import read_scores
    from robustfeat.training.comparison.tables import comparison_rows, objects, write_comparison

    scores = read_scores(runs)
    tasks = group_scores(scores)
    chosen = baseline or _default_baseline([method for methods in tasks.values() for method in methods])
    results = compare_methods(tasks, chosen, interval=interval)
    if keys := differing_settings(scores):
        remark(f"besides the method, the recipes differ in {', '.join(keys)}", quiet=quiet)
    for out in outs:
        write_comparison(results, chosen, interval, Path(out))
    if as_json:
        for row in objects(results, chosen):
            click.echo(json.dumps(row))
    else:
        click.echo(table(comparison_rows(results, chosen)), nl=False)
    return 0


def _default_baseline(methods: list[str]) -> str:
    """ERM, also where its name has settings; without it, the first method.

    Raises:
        InputError: there are several of ERM.
    """
    from robustfeat.errors import InputError

    found = sorted({method for method in methods if method.partition(",")[0] == "erm"})
    if len(found) > 1:
        fix = "pass one of them as `baseline`, or name one apart as NAME=RUN"
        raise InputError(f"several methods are ERM: {'; '.join(found)}", fix=fix)
    return found[0] if found else methods[0]
