"""`robustfeat verify`."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import click

from robustfeat.cli.extraction import pin_options, pooling_option
from robustfeat.cli.rendering import Command, say
from robustfeat.counts import format_count

if TYPE_CHECKING:
    from robustfeat.hub.folder import ModelFolder
    from robustfeat.serving.verify import Check


@click.command("verify", cls=Command, short_help="Check a model on every installed engine.")
@click.argument("model", default="builtin")
@pin_options
@pooling_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")
@click.option("--quiet", is_flag=True, help="Hide progress.")
def command(model: str, revision: str | None, config_hash: str | None, pooling: str, as_json: bool, quiet: bool) -> int:
    """Checks MODEL (default: builtin) on this machine against its golden features.

    All file hashes are verified. Then every installed engine and precision embeds the golden images, and so does
    PyTorch. `timm` is the folder loaded by timm, with timm's preprocessing. Each line shows the smallest cosine to the
    golden features. An engine's line also shows its speed: images per second of the network, one batch at a time. The
    exit code is 3 if a cosine is too small or nothing could run.

    A transformers model (docs/hub.md) has no golden images. Its engines are compared with the first one, on the
    built-in model's images.
    """
    from robustfeat.cli.extraction import quiet_downloads
    from robustfeat.hub.catalog import resolve_model

    quiet_downloads(quiet)
    folder = resolve_model(model, revision=revision, config_hash=config_hash)
    folder.verify()
    if not quiet:
        say(f"{folder.config.name}: {format_count(len(folder.config.files), 'file')}, hashes verified", err=True)
    if not quiet and not folder.is_own:
        say(
            "no golden images: the first engine is the reference for the others, on robustfeat's own images",
            err=True,
        )
    ran = []
    for check in _checks(folder, pooling):
        click.echo(json.dumps(dataclasses.asdict(check) | {"short": check.short}) if as_json else str(check))
        if check.cosine is not None:
            ran.append(check)
    return 0 if ran and not any(check.short for check in ran) else 3


def _checks(folder: ModelFolder, pooling: str) -> Iterator[Check]:
    from robustfeat.hub.folder import WEIGHTS
    from robustfeat.serving.extractor import FeatureExtractor
    from robustfeat.serving.verify import MIN_COSINE, Check, check_ways, ways_on_gpu, ways_to_run

    ways = [replace(way, pooling=pooling) for way in (*ways_to_run(folder, "fp16"), *ways_on_gpu())]
    yield from check_ways(partial(FeatureExtractor.open, folder), ways, timed=True)
    if WEIGHTS not in folder.config.files:
        return  # without weights, PyTorch has nothing to run
    library, extra = ("transformers", "transformers") if folder.config.library == "transformers" else ("timm", "train")
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec(library)):
        yield Check("pytorch", "fp32", None, MIN_COSINE["fp32"], f"not installed: pip install 'robustfeat[{extra}]'")
    elif library == "transformers":
        from robustfeat.training.export.transformers_models import verify_with_transformers

        yield verify_with_transformers(folder)
    else:
        from robustfeat.training.export.golden import verify_with_timm, verify_with_torch

        yield verify_with_torch(folder)
        if folder.config.library == "timm":
            yield verify_with_timm(folder)
