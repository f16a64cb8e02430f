"""`robustfeat torchserve`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import click

from robustfeat.cli.extraction import Extraction, max_items_option, max_pixels_option, serving_options
from robustfeat.cli.rendering import Command, say


@click.command("torchserve", cls=Command, short_help="Write an archive for TorchServe and run it.")
@click.argument("model", default="builtin")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    metavar="STORE",
    help="Folder for the archive, the model store.",
)
@click.option("--name", help="Name of the served model.  [default: MODEL's name]")
@click.option(
    "--workers", type=click.IntRange(1, 256), default=1, show_default=True, help="Number of worker processes."
)
@click.option(
    "--batch-size",
    type=click.IntRange(1, 256),
    help="Largest number of requests per batch.  [default: set by the model's input size]",
)
@click.option(
    "--batch-delay",
    type=click.IntRange(1, 60_000),
    default=1,
    show_default=True,
    metavar="MS",
    help="Longest wait of a request for others to join its batch, in milliseconds.",
)
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on. 0.0.0.0 answers other machines."
)
@click.option(
    "--port",
    type=click.IntRange(1, 64_531),
    default=8080,
    show_default=True,
    help="Port of inference. Management, metrics and gRPC use the next four.",
)
@click.option(
    "--token-life",
    type=click.IntRange(1, 60 * 24 * 3650),
    default=60 * 24,
    show_default=True,
    metavar="MINUTES",
    help="Lifetime of the tokens in key_file.json, in minutes.",
)
@click.option(
    "--max-body",
    type=click.IntRange(1, 2047),
    default=32,
    show_default=True,
    metavar="MIB",
    help="Largest accepted request body, in MiB.",
)
@max_pixels_option
@max_items_option
@click.option(
    "--timeout",
    type=click.IntRange(1),
    default=60,
    show_default=True,
    metavar="SECONDS",
    help="Longest time from a worker's receipt of a request to its answer.",
)
@click.option(
    "--decode-timeout",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    metavar="SECONDS",
    help="Longest time to decode one image.",
)
@click.option("--run", is_flag=True, help="Start TorchServe with the archive; SIGTERM or Ctrl+C stops it.")
@serving_options
def command(
    model: str,
    out: Path,
    name: str | None,
    workers: int,
    batch_size: int | None,
    batch_delay: int,
    host: str,
    port: int,
    token_life: int,
    max_body: int,
    max_pixels: int,
    max_items: int,
    timeout: int,
    decode_timeout: int,
    run: bool,
    extraction: Extraction,
) -> None:
    """Writes MODEL (default: builtin) to the folder STORE as an archive for TorchServe, with a config.properties.

    TorchServe then returns the features of `robustfeat embed`. The archive contains everything except the libraries in
    its requirements.txt. --run needs the extra `torchserve` and Java 17. TorchServe is no longer maintained: prefer
    `robustfeat serve` if you can choose.
    """
    from robustfeat.hub.catalog import resolve_model
    from robustfeat.serving.torchserve.archive import (
        KEYS,
        PROPERTIES,
        Addresses,
        check_name,
        claim_store,
        write_archive,
        write_properties,
    )
    from robustfeat.serving.torchserve.handler import Settings

    served = check_name(name or ("robustfeat" if model == "builtin" else Path(model).absolute().name))
    options = extraction.options
    folder = resolve_model(model, revision=options.revision, config_hash=options.config_hash)
    addresses = Addresses(host, port)
    settings = Settings(
        options=replace(options, engine=options.choose_engine(), revision=folder.revision, config_hash=None),
        workers=workers,
        max_items=max_items,
        max_body_bytes=max_body * 2**20,
        max_pixels=max_pixels,
        timeout_s=timeout,
        decode_timeout_s=decode_timeout,
    )
    with claim_store(out):
        server = None
        if run:  # first, so that a missing Java fails before anything is written
            from robustfeat.serving.torchserve.server import TorchServe

            server = TorchServe(out, served, addresses, workers)
        archive = write_archive(folder, out, served, settings, batch_size=batch_size, delay_ms=batch_delay)
        write_properties(folder, out, served, settings, addresses=addresses, token_minutes=token_life)
        if server is None:
            click.echo(json.dumps({"archive": str(archive), "config": str(out / PROPERTIES), "name": served}))
            return

        def announce() -> None:
            place = f"{addresses.url}:{port}/predictions/{served}"
            say(f"serving at {place} (the token is in {out / KEYS}, logs in {out / 'logs'})", err=True)

        say("starting TorchServe", err=True)
        server.run(announce)
