"""`robustfeat serve`."""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robustfeat import __version__
from robustfeat.cli.extraction import ABOVE_ZERO, Extraction, serving_options
from robustfeat.cli.rendering import Command, Failure, say
from robustfeat.errors import RobustFeatError
from robustfeat.progress import visible

if TYPE_CHECKING:
    from robustfeat.serving.http.limits import Limits
    from robustfeat.serving.http.manifest import Manifest
    from robustfeat.serving.http.options import ServerOptions
    from robustfeat.serving.http.process.log import Log
    from robustfeat.serving.http.service import Service
    from robustfeat.serving.http.watched import WatchedFile

_RETIRE_S = 15.0
"""More than a request's time: a worker whose place another one has taken may need so much for the last answers."""


class ServeCommand(Command):
    """Logs the error that ends the server where all lines are to be JSON."""

    def invoke(self, ctx: click.Context) -> Any:
        """As `Command.invoke`."""
        try:
            return super().invoke(ctx)
        except Failure as exc:
            if ctx.params["log_format"] != "json":
                raise
            from robustfeat.serving.http.process.log import Log

            Log("supervisor").error("failed", error=visible(exc.message), exit_code=exc.exit_code)
            ctx.exit(exc.exit_code)


def _collect_limits(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command its bounds as one argument `limits`."""

    @functools.wraps(command)
    def collected(**options: Any) -> Any:
        from robustfeat.serving.http.limits import Limits

        bounds = {field.name: options.pop(field.name) for field in fields(Limits)}
        return command(limits=Limits(**bounds), **options)

    return collected


@click.command("serve", cls=ServeCommand, short_help="Answer over HTTP.")
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="[NAME=]MODEL[@REV][#SHA256]",
    help="A model to serve under a name. The first one is the default. A revision on the Hub and the config hash of "
    "robustfeat info pin it.  [default: robustfeat=builtin]",
)
@click.option(
    "--head",
    "heads",
    multiple=True,
    metavar="[NAME=]HEAD[@REV][#SHA256]",
    help="A head to serve at /predict/NAME. It is a folder or ORG/NAME on the Hub, pinned like a model.",
)
@click.option(
    "--collection",
    "collections",
    multiple=True,
    metavar="[NAME=]FEATS",
    help="Features of a served model, to search at /similar/NAME.",
)
@click.option(
    "--manifest",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="TOML file with models, heads and collections, in place of these options. The server reloads when it changes.",
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
@click.option(
    "--forwarded-allow-ips",
    metavar="LIST",
    envvar="FORWARDED_ALLOW_IPS",
    default="127.0.0.1",
    show_default=True,
    help="Proxies whose X-Forwarded-For is believed, as addresses and networks with commas between them, or *.",
)
@click.option("--log-requests", is_flag=True, help="A line of JSON on stderr for every request.")
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="With json every line on stderr is JSON, from the start to the end. With text only errors and requests are.",
)
@click.option(
    "--otlp-endpoint",
    metavar="URL",
    help="Send traces of requests to this collector of OpenTelemetry, by OTLP over HTTP (extra otel).",
)
@serving_options
@_collect_limits
def command(
    models: tuple[str, ...],
    heads: tuple[str, ...],
    collections: tuple[str, ...],
    manifest: Path | None,
    host: str,
    port: int,
    workers: int,
    keys: Path | None,
    hosts: tuple[str, ...],
    limits: Limits,
    drain: float,
    no_page: bool,
    forwarded_allow_ips: str,
    log_requests: bool,
    log_format: str,
    otlp_endpoint: str | None,
    extraction: Extraction,
) -> None:
    """Serves features at /embed, /v1/embeddings and /v2, heads at /predict/NAME, and collections at /similar/NAME.

    In a browser, / is a page for looking at images and teaching classifiers, and /docs describes all routes.

    It answers this machine alone unless --host says otherwise; give it --keys before you open it to others.
    """
    from robustfeat.serving.http.keys import ENVIRONMENT, KeyRing
    from robustfeat.serving.http.manifest import Manifest, read_manifest
    from robustfeat.serving.http.options import ServerOptions, check_otlp_endpoint, parse_proxies
    from robustfeat.serving.http.process.reloads import Reloads
    from robustfeat.serving.http.watched import WatchedFile
    from robustfeat.system import anonymous_memory

    if manifest and (models or heads or collections):
        raise click.UsageError("--manifest names all models, heads and collections; leave the options for them out")
    named = Manifest.of_options(models, heads, collections)
    watched = WatchedFile(manifest) if manifest else None
    run_options = extraction.options

    def asked() -> Manifest:
        found = read_manifest(manifest) if manifest else named
        return found.pin_model(run_options.revision, run_options.config_hash)

    options = ServerOptions(
        run=run_options,
        limits=limits,
        keys=KeyRing(keys, os.environ.get(ENVIRONMENT)),
        hosts=_hosts(host, hosts),
        workers=workers,
        counts=anonymous_memory(),
        reloads=Reloads(),
        page=not no_page,
        proxies=parse_proxies(forwarded_allow_ips),
        log_requests=log_requests,
        log_stages=log_format == "json",
        otlp_endpoint=check_otlp_endpoint(otlp_endpoint),
        drain_s=drain,
    )
    click.get_current_context().exit(_serve(options, asked, watched, host, _listen(host, port)))


def _serve(
    options: ServerOptions,
    asked: Callable[[], Manifest],
    watched: WatchedFile | None,
    host: str,
    listener: socket.socket,
) -> int:
    """Serves until a signal; the exit code.

    Args:
        options: of all workers.
        asked: what is to be served now.
        watched: the file that says so, if there is one.
        host, listener: where.
    """
    from robustfeat.serving.http.manifest import Manifest
    from robustfeat.serving.http.process.log import Log
    from robustfeat.serving.http.process.supervisor import Start, Supervisor

    def run(start: Start) -> None:
        from robustfeat.serving.http.opening import open_service
        from robustfeat.serving.http.process.worker import run_worker

        def open_served() -> Service:
            manifest = asked() if start.loaded is None else Manifest.from_dict(start.loaded)
            return open_service(manifest, options, start.number)

        run_worker(open_served, listener, start, options)

    def refresh() -> bool:
        with contextlib.suppress(RobustFeatError):  # the workers say so
            options.keys.refresh()
        return watched is not None and watched.changed()

    log = Log("supervisor", stages=options.log_stages)
    log.stage("starting", version=__version__, pid=os.getpid(), workers=options.workers)
    supervisor = Supervisor(
        listener,
        run,
        workers=options.workers,
        drain_s=options.drain_s,
        retire_s=options.limits.timeout_s + _RETIRE_S,
        announce=_Announcements(host, listener, log, options),
        refresh=refresh,
        explain=lambda exc: visible(command.explain(exc)),
        reloads=options.reloads,
        log=log,
    )
    return supervisor.serve()


class _Announcements:
    """Says where the server answers, and whether everybody may ask; later, that it has reloaded."""

    def __init__(self, host: str, listener: socket.socket, log: Log, options: ServerOptions) -> None:
        self._host, self._listener, self._log, self._options = host, listener, log, options
        self._started = False

    def __call__(self, loaded: Mapping[str, Mapping[str, Any]]) -> None:
        if self._started:
            self._log.info("reloaded", **loaded)
            return
        self._started = True
        name, port, *_ = self._listener.getsockname()
        host = f"[{self._host}]" if ":" in self._host else self._host
        places = ["/embed", "/v1/embeddings", "/v2", *(f"/predict/{name}" for name in loaded["heads"])]
        places += [f"/similar/{name}" for name in loaded["collections"]]
        if self._options.log_stages:
            keys = sorted(self._options.keys.names)
            self._log.stage("serving", version=__version__, address=f"http://{host}:{port}", keys=keys, **loaded)
            return
        say(f"serving at http://{host}:{port} ({', '.join(places)})", err=True)
        if not self._options.keys.names and not ipaddress.ip_address(name.partition("%")[0]).is_loopback:
            say("every machine that reaches this address may ask; --keys FILE restricts it", err=True)


def _hosts(host: str, allowed: tuple[str, ...]) -> list[str]:
    """Names that requests may have in their Host header, beside addresses."""
    return ["localhost", *{socket.gethostname().lower(), host.lower()}, *(name.lower() for name in allowed)]


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
