"""`robustfeat info`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from robustfeat.cli.extraction import pin_options
from robustfeat.cli.rendering import Command, say
from robustfeat.progress import json_line

if TYPE_CHECKING:
    from robustfeat.hub.folder import ModelFolder
    from robustfeat.hub.preprocessing import Preprocessing


@click.command("info", cls=Command, short_help="Show what a model is, how it fares and its terms.")
@click.argument("model", default="builtin")
@pin_options
@click.option("--json", "as_json", is_flag=True, help="Print everything as a JSON object.")
def command(model: str, revision: str | None, config_hash: str | None, as_json: bool) -> None:
    """Shows MODEL (default: builtin) after verifying the hashes of its files.

    Of a model on the Hub it downloads config.json alone (and preprocessor_config.json of a model of transformers), and
    verifies what the cache holds besides.
    """
    from robustfeat.hub.catalog import resolve_model

    folder = resolve_model(model, revision=revision, config_hash=config_hash)
    folder.verify(folder.present)
    config = folder.config
    if as_json:
        about: dict[str, Any] = {"path": str(folder.path), "revision": folder.revision}
        about |= {"config_hash": folder.config_hash}
        if config.outputs:
            about["pooling"] = list(config.outputs.preferred)
        click.echo(json_line({**config.to_dict(), **about}))
        return
    files = f"{len(config.files)}"
    if len(folder.present) < len(config.files):
        files = f"{len(folder.present)} of {files} here"
    contract = config.preprocessing
    lines = {
        "name": config.name,
        "folder": str(folder.path),
        "network": f"{config.architecture}, {config.feature_size or 'an unknown number of'} features",
        **({"pooling": ", else ".join(config.outputs.preferred)} if config.outputs else {}),
        "input": _input(contract),
        "preprocessing": contract.hash[:16],
        "precisions": ", ".join(_networks(folder)),
        **({"int8": config.int8_share} if config.int8_share else {}),
        "files": f"{files}, {folder.size_bytes() / 1e6:.1f} MB{', hashes verified' if folder.present else ''}",
        **({"revision": folder.revision} if folder.revision else {}),
        "config hash": folder.config_hash,
        "source": config.provenance.get("source", "unknown"),
        "terms": config.provenance.get("terms", "not stated"),
    }
    for key, value in lines.items():
        say(f"{key + ':':15}{value}")
    if config.evaluations:
        say()
        say("evaluations:")
        for evaluation in config.evaluations:
            say(f"  {evaluation} ({', '.join(filter(None, (evaluation.split, evaluation.protocol)))})")
    for title, content in config.results.items():
        say()
        say(f"{title}:")
        _print_rows(content)


def _input(contract: Preprocessing) -> str:
    mode = "" if contract.crop_mode == "center" else f" {contract.crop_mode}"
    order = "" if contract.channel_order == "rgb" else f", {contract.channel_order.upper()}"
    return f"{contract.image_size} px, {contract.interpolation},{mode} crop {contract.crop_pct:g}{order}"


def _networks(folder: ModelFolder) -> list[str]:
    """The precisions, with the names of files where a folder may call them differently."""
    from robustfeat.hub.onnx_layout import find_network

    if folder.is_own:
        return folder.precisions
    return [f"{precision} ({find_network(folder.config.files, precision)})" for precision in folder.precisions]


def _print_rows(content: Any) -> None:
    if not isinstance(content, list):
        say(f"  {content}")
        return
    for row in content:
        say("  " + ", ".join(f"{key} {value}" for key, value in row.items()))
