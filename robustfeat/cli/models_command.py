"""`robustfeat models`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import click

from robustfeat.cli.rendering import Command, say
from robustfeat.progress import json_line

if TYPE_CHECKING:
    from robustfeat.hub.catalog import Listing


@click.command("models", cls=Command, short_help="List local models, good public ones, or the Hub's.")
@click.option(
    "--remote",
    is_flag=False,
    flag_value="",
    metavar="[QUERY]",
    help="List models on the Hub with QUERY in the name: robustfeat's, then ONNX models of others.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object per line. `group` names the list of the model."
)
def command(remote: str | None, as_json: bool) -> None:
    """Lists the built-in model and the models in the Hub's cache, with size, revision and scores.

    Good public models follow, each with the command that gets it. Their scores were published by their makers or
    measured by robustfeat. --json names the sources.
    """
    from robustfeat.hub.catalog import cached_models, list_builtin, public_models, search_models, search_others

    if remote is None:
        _print("here", [list_builtin(), *cached_models()], _say_ours, as_json)
        _print("public", public_models(), _say_other, as_json, "Public models")
        return
    count = _print("hub", search_models(remote), _say_ours, as_json)
    count += _print("others", search_others(remote), _say_other, as_json, "ONNX models of others")
    if not count:
        say("no model on the Hub" + (f" has {remote!r} in its name" if remote else ""), err=True)


def _print(
    group: str, models: Iterable[Listing], print_one: Callable[[Listing], None], as_json: bool, title: str = ""
) -> int:
    """Prints a list and returns its length."""
    count = 0
    for count, model in enumerate(models, 1):
        if as_json:
            command = None if group == "here" else _command(model.model)
            click.echo(json_line({"group": group, **dataclasses.asdict(model), "command": command}))
            continue
        if title and count == 1:
            say(f"{title}:")
        print_one(model)
    return count


def _say_ours(model: Listing) -> None:
    refs = f" ({', '.join(model.refs)})" if model.refs else ""
    size = "" if model.size_bytes is None else f"{model.size_bytes / 1e6:.1f} MB"
    what = model.problem or "; ".join(model.scores) or "no scores"
    say(f"{model.model:32}  {(model.revision or '')[:12] + refs or '-':24}  {size:>10}  {what}")


def _say_other(model: Listing) -> None:
    facts = [
        "" if model.features is None else f"{model.features} features",
        "" if model.image_size is None else f"{model.image_size} px",
        "" if model.size_bytes is None else f"{model.size_bytes / 1e6:.0f} MB",
        model.license or "no license",
        "" if model.downloads is None else f"{model.downloads:,} downloads a month",
    ]
    say(f"  {model.model}: {'; '.join([', '.join(filter(None, facts)), *model.scores])}")
    say(f"      {_command(model.model)}")


def _command(model: str) -> str:
    """The command that downloads or imports a model."""
    library, _, name = model.rpartition(":")
    return f"robustfeat import {model} --out {name}" if library else f"robustfeat pull {model}"
