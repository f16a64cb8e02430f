"""`robustfeat models`."""

from __future__ import annotations

import dataclasses

import click

from robustfeat.cli.rendering import Command, say
from robustfeat.progress import json_line


@click.command("models", cls=Command, short_help="List the models that are here, or on the Hub.")
@click.option(
    "--remote",
    is_flag=False,
    flag_value="",
    metavar="[QUERY]",
    help="The Hub's models instead, with QUERY in the name.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object a line.")
def command(remote: str | None, as_json: bool) -> None:
    """Lists the built-in model and those in the Hub's cache, with size, revision and scores."""
    from robustfeat.hub.catalog import BUILTIN, Listing, builtin_model, cached_models, search_models

    if remote is None:
        own = builtin_model()
        scores = tuple(map(str, own.config.evaluations))
        found = [Listing(BUILTIN, own.config.name, None, (), own.size_bytes(), scores), *cached_models()]
    else:
        found = list(search_models(remote))
    for model in found:
        if as_json:
            click.echo(json_line(dataclasses.asdict(model)))
            continue
        refs = f" ({', '.join(model.refs)})" if model.refs else ""
        size = "" if model.size_bytes is None else f"{model.size_bytes / 1e6:.1f} MB"
        what = model.problem or "; ".join(model.scores) or "no scores"
        say(f"{model.model:32}  {(model.revision or '')[:12] + refs or '-':24}  {size:>10}  {what}")
    if remote is not None and not found:
        say("no model of robustfeat on the Hub" + (f" has {remote!r} in its name" if remote else ""), err=True)
