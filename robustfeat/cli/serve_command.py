"""`robustfeat serve`."""

from __future__ import annotations

from pathlib import Path

import click

from robustfeat.cli.extraction import Extraction, extraction_options

_MAX_REQUESTS = 64
"""At once; more get 503, so that bodies and images in flight stay bounded."""


@click.command("serve", short_help="Answer over HTTP.")
@click.option("--head", "heads", multiple=True, metavar="[NAME=]HEAD", help="A head to serve at /predict/NAME.")
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0 answers other machines, too.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 picks a free one.")
@extraction_options
def command(heads: tuple[str, ...], host: str, port: int, extraction: Extraction) -> None:
    """Serves features at /embed and heads at /predict/NAME: POST the bytes of an image. /docs describes all.

    There is no authentication: keep it on this machine, or behind something that has it.
    """
    from robustfeat.errors import InputError
    from robustfeat.serving.heads.head import Head

    unused = [name for name in extraction.given if name in {"workers", "batch_size"}]
    if unused:
        raise click.UsageError(f"--{unused[0].replace('_', '-')} is for embed")
    opened: dict[str, Head] = {}
    for entry in heads:
        name, _, place = ("", "", entry) if Path(entry).is_dir() else entry.partition("=")
        name = name or Path(place).absolute().name
        if name in opened or "/" in name:
            raise InputError(f"--head {entry}: expected NAME=HEAD, each NAME once and without a slash")
        opened[name] = Head.load(place)

    import uvicorn

    from robustfeat.serving.server import create_app

    extractor = extraction.open(throughput=False)
    name = "robustfeat" if extraction.model == "builtin" else extractor.config.name
    app = create_app(extractor, opened, model_name=name)
    uvicorn.run(app, host=host, port=port, access_log=False, limit_concurrency=_MAX_REQUESTS)
