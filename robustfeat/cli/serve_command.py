"""`robustfeat serve`."""

from __future__ import annotations

import socket
from pathlib import Path

import click

from robustfeat.cli.extraction import Extraction, extraction_options

_MAX_REQUESTS = 64
"""At once; more get 503, so that bodies and images in flight stay bounded."""

_GRACE_S = 10
"""How long the requests at hand have when the server is stopped."""


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
    places = [f"/predict/{head}" for head in opened]
    app = create_app(extractor, opened, model_name=name)
    try:
        listener = socket.create_server((host, port), backlog=2048)
    except OSError as exc:
        raise InputError(f"--host {host} --port {port}: {exc.strerror or exc}; choose another") from exc
    click.echo(f"serving at http://{host}:{listener.getsockname()[1]} ({', '.join(['/embed', *places])})", err=True)
    config = uvicorn.Config(
        app, access_log=False, log_level="warning", limit_concurrency=_MAX_REQUESTS, timeout_graceful_shutdown=_GRACE_S
    )
    uvicorn.Server(config).run(sockets=[listener])
