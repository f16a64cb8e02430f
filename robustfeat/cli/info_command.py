"""`robustfeat info`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from robustfeat.cli.extraction import pin_options
from robustfeat.cli.rendering import Command, say
from robustfeat.progress import json_line

if TYPE_CHECKING:
    from robustfeat.hub.folder import ModelFolder
    from robustfeat.hub.head_folder import HeadFolder
    from robustfeat.hub.preprocessing import Preprocessing


_SHOWN_CLASSES = 20


@click.command("info", cls=Command, short_help="Show facts about a model, a head or features.")
@click.argument("place", default="builtin", metavar="[MODEL|HEAD|FEATS]")
@pin_options
@click.option("--json", "as_json", is_flag=True, help="Print everything as a JSON object.")
def command(place: str, revision: str | None, config_hash: str | None, as_json: bool) -> None:
    """Shows facts about MODEL (default: builtin), HEAD or FEATS (a file or a folder of features).

    File hashes are verified first. From a model on the Hub only config.json is downloaded (for transformers also
    preprocessor_config.json). Other files are verified if the cache has them.
    """
    from robustfeat.hub.catalog import resolve
    from robustfeat.hub.head_folder import HeadFolder
    from robustfeat.serving.heads.features import is_feature_file

    if is_feature_file(place) and revision is None and config_hash is None:
        _show_features(place, as_json)
        return
    found = resolve(place, revision=revision, config_hash=config_hash)
    if isinstance(found, HeadFolder):
        _show_head(found, as_json)
    else:
        _show_model(found, as_json)


def _show_head(folder: HeadFolder, as_json: bool) -> None:
    from robustfeat.serving.heads.head import Head

    head, about = Head.of_folder(folder), folder.about
    pins = {"path": str(folder.path), "revision": folder.revision, "sha256": folder.sha256}
    if as_json:
        click.echo(json_line({**about, **pins}))
        return
    shown = ", ".join(map(str, head.classes[:_SHOWN_CLASSES]))
    more = len(head.classes) - _SHOWN_CLASSES
    given = {"margins": True, "probabilities": head.calibrated, "typicality": head.tells_typicality}
    model = head.model
    lines = {
        "folder": str(folder.path),
        "head": f"{head.kind}, {head.scaling} scaling" + (", several labels" if head.multi_label else ""),
        "classes": f"{len(head.classes)}: {shown}" + (f" and {more} more" if more > 0 else ""),
        "answers": ", ".join(name for name, has in given.items() if has),
        "model": f"{model.name}{f' ({model.source})' if model.source else ''}" if model else "not stated",
        **({"weights": model.weights_sha256[:16], "preprocessing": model.preprocessing_hash[:16]} if model else {}),
        **({"model's commit": model.revision} if model and model.revision else {}),
        **({"revision": folder.revision} if folder.revision else {}),
        "sha256": folder.sha256,
    }
    for key, value in lines.items():
        say(f"{key + ':':15}{value}")
    for title, scores in head.scores.items():
        if isinstance(scores, Mapping):
            numbers = [f"{name} {value:.4g}" for name, value in scores.items() if isinstance(value, (int, float))]
            say(f"{title.replace('_', ' ') + ':':15}{', '.join(numbers)}")


def _show_features(place: str, as_json: bool) -> None:
    from robustfeat.serving.bulk.job import Places
    from robustfeat.serving.bulk.outputs import index_records, open_existing

    with open_existing(Places.of(place, argument=None)) as output:
        failed = sum(record["error"] is not None for record in index_records(output))
        meta, model = output.meta, output.model
    if as_json:
        click.echo(json_line({**meta, "features": place, "failed": failed}))
        return
    ways = [model.precision, model.decoding, *([f"pooling {model.pooling}"] if model.pooling else [])]
    lines = {
        "features": place,
        "rows": f"{output.rows:,}, {failed:,} of them failed",
        **({"files": f"{len(output.files):,}"} if output.places.is_dataset else {}),
        "model": f"{model.name}{f' ({model.source})' if model.source else ''}, {model.feature_size} features",
        "run": ", ".join([f"{model.engine} {model.engine_version}".rstrip(), *ways]),
        "weights": model.weights_sha256[:16],
        "preprocessing": model.preprocessing_hash[:16],
        **({"model's commit": model.revision} if model.revision else {}),
        **{f"{kind} hash": meta[key] for kind in ("features", "index") if (key := f"{kind}_sha256") in meta},
    }
    for key, value in lines.items():
        say(f"{key + ':':15}{value}")


def _show_model(folder: ModelFolder, as_json: bool) -> None:
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
    """The precisions, with file names if the folder is not in robustfeat's own layout."""
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
