"""`robustfeat info`."""

from __future__ import annotations

import json
from typing import Any

import click


@click.command("info", short_help="Show what a model is, how it fares and its terms.")
@click.argument("model", default="builtin")
@click.option("--json", "as_json", is_flag=True, help="Print everything as a JSON object.")
def command(model: str, as_json: bool) -> None:
    """Shows MODEL (default: builtin) after verifying the hashes of its files."""
    from robustfeat.hub.folder import resolve_model

    folder = resolve_model(model)
    folder.verify()
    config = folder.config
    if as_json:
        click.echo(json.dumps({**config.to_dict(), "path": str(folder.path)}, ensure_ascii=False))
        return
    contract = config.preprocessing
    lines = {
        "name": config.name,
        "folder": str(folder.path),
        "network": f"{config.architecture}, {config.feature_size} features",
        "input": f"{contract.image_size} px, {contract.interpolation}, crop {contract.crop_pct:g}",
        "preprocessing": contract.hash[:16],
        "precisions": ", ".join(folder.precisions),
        "size": f"{folder.size_bytes() / 1e6:.1f} MB, {len(config.files)} files, hashes verified",
        "source": config.provenance.get("source", "unknown"),
        "terms": config.provenance.get("terms", "not stated"),
    }
    for key, value in lines.items():
        click.echo(f"{key + ':':15}{value}")
    for title, content in config.results.items():
        click.echo(f"\n{title}:")
        _print_rows(content)


def _print_rows(content: Any) -> None:
    if not isinstance(content, list):
        click.echo(f"  {content}")
        return
    for row in content:
        click.echo("  " + ", ".join(f"{key} {value}" for key, value in row.items()))
