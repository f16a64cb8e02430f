"""`robustfeat doctor`."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, replace
from typing import cast

import click

from robustfeat.cli.extraction import Extraction, serving_options
from robustfeat.cli.rendering import Command, say
from robustfeat.counts import format_count
from robustfeat.progress import visible

_COLOURS = {"ok": "green", "note": "yellow", "problem": "red"}


@click.command("doctor", cls=Command, short_help="Check this installation.")
@click.argument("model", default="builtin")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")
@serving_options
def command(model: str, as_json: bool, extraction: Extraction) -> int:
    """Checks whether this machine can embed and serve with MODEL (default: builtin) and these options.

    A model on the Hub is downloaded and verified. Each line reports one check: ok, a note, or a problem with its fix.
    The exit code is 3 if there is a problem.
    """
    from robustfeat.doctor import PROBLEM, examine

    counts: Counter[str] = Counter()
    respell = cast(Command, click.get_current_context().command).respell
    for found in examine(model, extraction.options):
        finding = replace(found, found=respell(found.found), fix=respell(found.fix) if found.fix else None)
        counts[finding.status] += 1
        if as_json:
            click.echo(json.dumps(asdict(finding)))
            continue
        status = click.style(f"{finding.status:9}", fg=_COLOURS[finding.status])
        click.echo(f"{status}{visible(f'{finding.check:12}{finding.found}')}")
        if finding.fix:
            say(f"{'':21}-> {finding.fix}")
    problems = counts[PROBLEM]
    if not as_json:
        say(format_count(problems, "problem") if problems else "no problems", err=True)
    return 3 if problems else 0
