"""`robustfeat serve`."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from robustfeat.cli.extraction import ABOVE_ZERO, Extraction, serving_options
from robustfeat.cli.rendering import Command, say

if TYPE_CHECKING:
    from robustfeat.serving.http.keys import KeyRing
    from robustfeat.serving.http.limits import Limits
    from robustfeat.serving.http.process.log import Log
    from robustfeat.serving.http.service import Service
    from robustfeat.serving.http.similar import ServedCollection


@click.command("serve", cls=Command, short_help="Answer over HTTP.")
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="[NAME=]MODEL",
    help="A model to serve under a name; may be repeated, the first is the default.  [default: robustfeat=builtin]",
)
@click.option(
    "--head",
    "heads",
    multiple=True,
    metavar="[NAME=]HEAD",
    help="A head to serve at /predict/NAME: a folder, or ORG/NAME[@REVISION] on the Hub.",
)
@click.option(
    "--collection",
    "collections",
    multiple=True,
    metavar="[NAME=]FEATS",
    help="Features of a served model, to search at /similar/NAME.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0 and :: answer other machines, too.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 picks a free one.")
@click.option("--workers", type=click.IntRange(1, 256), default=1, show_default=True, help="Processes that answer.")
@click.option(
    "--keys",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Bearer keys, a line each: NAME KEY [rate=N] [concurrency=N]; read again when it changes. The environment's "
    "ROBUSTFEAT_API_KEYS holds such lines, too.",
)
@click.option(
    "--allowed-host",
    "hosts",
    multiple=True,
    metavar="NAME",
    help="A name that requests may have in their Host header, beside addresses and localhost; *.NAME or * for more.",
)
@click.option(
    "--max-body",
    "max_body_bytes",
    type=ABOVE_ZERO,
    callback=lambda ctx, parameter, value: int(value * 2**20),
    default=32,
    show_default=True,
    metavar="MIB",
    help="Of a request.",
)
@click.option("--max-pixels", type=click.IntRange(1), default=100_000_000, show_default=True, help="Of an image.")
@click.option("--max-items", type=click.IntRange(1), default=64, show_default=True, help="Images in a request.")
@click.option(
    "--max-queue",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Images at hand in a worker; beyond them 503.",
)
@click.option("--max-connections", type=click.IntRange(1), default=1024, show_default=True, help="To a worker.")
@click.option(
    "--timeout",
    "timeout_s",
    type=ABOVE_ZERO,
    default=30,
    show_default=True,
    metavar="SECONDS",
    help="From a request's head to its answer.",
)
@click.option(
    "--decode-timeout",
    "decode_timeout_s",
    type=ABOVE_ZERO,
    default=10,
    show_default=True,
    metavar="SECONDS",
    help="For an image.",
)
@click.option(
    "--drain",
    type=ABOVE_ZERO,
    default=20,
    show_default=True,
    metavar="SECONDS",
    help="For the requests at hand when the server is stopped.",
)
@click.option("--no-page", is_flag=True, help="Without the page at /, and without /teach, which fits its heads.")
@click.option("--log-requests", is_flag=True, help="A line of JSON on stderr for every request.")
@serving_options
def command(
    models: tuple[str, ...],
    heads: tuple[str, ...],
    collections: tuple[str, ...],
    host: str,
    port: int,
    workers: int,
    keys: Path | None,
    hosts: tuple[str, ...],
    max_body_bytes: int,
    max_pixels: int,
    max_items: int,
    max_queue: int,
    max_connections: int,
    timeout_s: float,
    decode_timeout_s: float,
    drain: float,
    no_page: bool,
    log_requests: bool,
    extraction: Extraction,
) -> None:
    """Serves features at /embed, /v1/embeddings and /v2, heads at /predict/NAME, and collections at /similar/NAME.

    In a browser, / is a page for looking at images and teaching classifiers, and /docs describes all routes.

    It answers this machine alone unless --host says otherwise; give it --keys before you open it to others.
    """
    from robustfeat.errors import InputError
    from robustfeat.serving.http.keys import ENVIRONMENT, KeyRing
    from robustfeat.serving.http.limits import Limits
    from robustfeat.serving.http.process.log import Log
    from robustfeat.serving.http.process.supervisor import Supervisor
    from robustfeat.system import anonymous_memory

    model_places, head_places = _named("--model", *(models or ("robustfeat=builtin",))), _named("--head", *heads)
    # A file's name without its suffix is the name of its collection.
    collection_places = _named(
        "--collection", *(one if "=" in one else f"{Path(one).stem}={one}" for one in collections)
    )
    if len(model_places) > 1 and (extraction.options.revision or extraction.options.config_hash):
        raise click.UsageError(
            "--revision and --config-hash are for one model; pull the models and serve their folders"
        )
    limits = Limits(
        max_body_bytes=max_body_bytes,
        max_pixels=max_pixels,
        max_items=max_items,
        max_queue=max_queue,
        timeout_s=timeout_s,
        decode_timeout_s=decode_timeout_s,
        max_connections=max_connections,
    )
    ring = KeyRing(keys, os.environ.get(ENVIRONMENT))
    listener = _listen(host, port)
    counts = anonymous_memory()

    def run(number: int, report: int) -> None:
        from robustfeat.serving.http.process.worker import run_worker

        def open_service() -> Service:
            place = (counts, number, workers)
            log = Log(number, requests=log_requests)
            service = _open(model_places, head_places, extraction, limits, ring, _hosts(host, hosts), log, place)
            service.collections = _open_collections(collection_places, service)
            service.page = not no_page
            return service

        run_worker(open_service, listener, report, drain)

    def announce() -> None:
        _announce(host, listener, head_places, collection_places, restricted=bool(ring.names))

    def refresh() -> None:
        with contextlib.suppress(InputError):  # the workers say so
            ring.refresh()

    log = Log("supervisor").error
    supervisor = Supervisor(listener, run, workers=workers, drain_s=drain, announce=announce, refresh=refresh, log=log)
    click.get_current_context().exit(supervisor.serve())


def _open(
    model_places: dict[str, str],
    head_places: dict[str, str],
    extraction: Extraction,
    limits: Limits,
    keys: KeyRing,
    hosts: list[str],
    log: Log,
    worker: tuple[int, int, int],
) -> Service:
    """What a worker serves; `worker` is where the counts lie, its number, and how many there are."""
    import tempfile

    from robustfeat.serving.http.admission import Admission
    from robustfeat.serving.http.process.metrics import Metrics
    from robustfeat.serving.http.service import ServedModel, Service, match_heads
    from robustfeat.system import available_cpus

    counts, number, workers = worker
    processors = max(1, available_cpus() // workers // len(model_places))
    metrics = Metrics(number, models=len(model_places))
    if not metrics.shared:
        log.error("metrics are those of one worker: no space for those of all", folder=tempfile.gettempdir())
    models = {}
    for name, place in model_places.items():
        options = replace(extraction.options, threads=extraction.options.threads or processors)
        chosen = replace(extraction, model=place, options=options)
        models[name] = ServedModel(
            name, chosen.open(throughput=False), limits, metrics, decoders=processors, shared=bool(keys.names)
        )
    heads = {}
    if head_places:
        from robustfeat.cli.heads import load_head

        heads = match_heads({name: load_head(place) for name, place in head_places.items()}, list(models.values()))
    admission = Admission(limits, counts, number, workers)
    return Service(models, heads, limits, keys, hosts, admission, metrics, log, workers)


def _open_collections(places: dict[str, str], service: Service) -> dict[str, ServedCollection]:
    """Collections by name, each with the model of the service that made it."""
    if not places:
        return {}
    from robustfeat.serving.heads.features import open_features
    from robustfeat.serving.http.similar import match_collections
    from robustfeat.system import available_cpus

    features = {name: open_features(place) for name, place in places.items()}
    return match_collections(features, list(service.models.values()), max(1, available_cpus() // service.workers))


def _named(option: str, *entries: str) -> dict[str, str]:
    """Places by name, of NAME=PLACE or of a place whose last part is the name."""
    from robustfeat.errors import InputError

    found: dict[str, str] = {}
    for entry in entries:
        name, equals, place = ("", "", entry) if Path(entry).is_dir() else entry.partition("=")
        if not equals:
            last = Path(entry if Path(entry).exists() else entry.partition("@")[0]).absolute().name
            name, place = "robustfeat" if entry == "builtin" else last, entry
        if name in found or not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}", name, re.ASCII):
            raise InputError(
                f"{option} {entry}: expected NAME=PLACE, each name once, of letters, digits, '.', '_' and '-'"
            )
        found[name] = place
    return found


def _hosts(host: str, allowed: tuple[str, ...]) -> list[str]:
    """Names that requests may have in their Host header, beside addresses."""
    return ["localhost", *{socket.gethostname().lower(), host.lower()}, *(name.lower() for name in allowed)]


def _announce(
    host: str, listener: socket.socket, heads: Iterable[str], collections: Iterable[str], *, restricted: bool
) -> None:
    """Says where the server answers, and whether everybody may ask."""
    address = f"[{host}]" if ":" in host else host
    places = ["/embed", "/v1/embeddings", "/v2", *(f"/predict/{name}" for name in heads)]
    places += [f"/similar/{name}" for name in collections]
    say(f"serving at http://{address}:{listener.getsockname()[1]} ({', '.join(places)})", err=True)
    if not restricted and not ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback:
        say("every machine that reaches this address may ask; --keys FILE restricts it", err=True)


def _listen(host: str, port: int) -> socket.socket:
    """The server's socket; the one of `::`, every address, takes IPv4, too.

    Raises:
        InputError: the address cannot be had.
    """
    from robustfeat.errors import InputError

    try:
        if ":" not in host:
            return socket.create_server((host, port), backlog=2048)
        both = host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server((host, port), backlog=2048, family=socket.AF_INET6, dualstack_ipv6=both)
    except (OSError, UnicodeError, TypeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "no host name"
        raise InputError(f"--host {host} --port {port}: {reason}; choose another") from exc
