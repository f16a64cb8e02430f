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
from robustfeat.cli.extraction import ABOVE_ZERO, Extraction, max_items_option, max_pixels_option, serving_options
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
"""Time for a replaced worker to finish its last requests, in addition to a request's time limit."""


class ServeCommand(Command):
    """A command that logs its final error as JSON if --log-format is json."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command; see `Command.invoke`."""
        try:
            return super().invoke(ctx)
        except Failure as exc:
            if ctx.params["log_format"] != "json":
                raise
            from robustfeat.serving.http.process.log import Log

            Log("supervisor").error("failed", error=visible(exc.message), exit_code=exc.exit_code)
            ctx.exit(exc.exit_code)


def _collect_limits(command: Callable[..., Any]) -> Callable[..., Any]:
    """Passes the limits to a command as one argument, `limits`."""

    @functools.wraps(command)
    def collected(**options: Any) -> Any:
        from robustfeat.serving.http.limits import Limits

        bounds = {field.name: options.pop(field.name) for field in fields(Limits)}
        return command(limits=Limits(**bounds), **options)

    return collected


@click.command("serve", cls=ServeCommand, short_help="Serve models, heads and collections over HTTP.")
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="[NAME=]MODEL[@REV][#SHA256]",
    help="Model to serve, by an optional name. The first one is the default. A revision on the Hub and the config hash "
    "of robustfeat info pin it. Repeatable.  [default: robustfeat=builtin]",
)
@click.option(
    "--head",
    "heads",
    multiple=True,
    metavar="[NAME=]HEAD[@REV][#SHA256]",
    help="Head to serve at /predict/NAME: a folder or ORG/NAME on the Hub, pinned like a model. Repeatable.",
)
@click.option(
    "--collection",
    "collections",
    multiple=True,
    metavar="[NAME=]FEATS",
    help="Features of a served model to search at /similar/NAME. Repeatable.",
)
@click.option(
    "--reference",
    metavar="FEATS",
    help="Features of a served model. /metrics tells how far its latest images lie from them.",
)
@click.option(
    "--manifest",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="TOML file with models, heads and collections, in place of these options. The server reloads when it changes.",
)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on. 0.0.0.0 and :: also answer other machines.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen on. 0 chooses a free one.",
)
@click.option(
    "--workers", type=click.IntRange(1, 256), default=1, show_default=True, help="Number of worker processes."
)
@click.option(
    "--keys",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="File of bearer keys, one per line: NAME KEY [rate=N] [concurrency=N]. It is read again when it changes. "
    "ROBUSTFEAT_API_KEYS in the environment may have such lines, too.",
)
@click.option(
    "--allowed-host",
    "hosts",
    multiple=True,
    metavar="NAME",
    help="Accept this name in the Host header, besides addresses and localhost. *.NAME and * are patterns. Repeatable.",
)
@click.option(
    "--max-body",
    "max_body_bytes",
    type=ABOVE_ZERO,
    callback=lambda ctx, parameter, value: int(value * 2**20),
    default=32,
    show_default=True,
    metavar="MIB",
    help="Largest accepted request body, in MiB.",
)
@max_pixels_option
@max_items_option
@click.option(
    "--max-queue",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Most images in a worker at a time. Further requests get status 503.",
)
@click.option(
    "--max-connections", type=click.IntRange(1), default=1024, show_default=True, help="Most connections per worker."
)
@click.option(
    "--timeout",
    "timeout_s",
    type=ABOVE_ZERO,
    default=30,
    show_default=True,
    metavar="SECONDS",
    help="Longest time from a request's header to its response.",
)
@click.option(
    "--decode-timeout",
    "decode_timeout_s",
    type=ABOVE_ZERO,
    default=10,
    show_default=True,
    metavar="SECONDS",
    help="Longest time to decode one image.",
)
@click.option(
    "--drain",
    type=ABOVE_ZERO,
    default=20,
    show_default=True,
    metavar="SECONDS",
    help="Grace period for in-flight requests on shutdown.",
)
@click.option("--no-page", is_flag=True, help="Disable the page at / and /teach, which fits its heads.")
@click.option(
    "--forwarded-allow-ips",
    metavar="LIST",
    envvar="FORWARDED_ALLOW_IPS",
    default="127.0.0.1",
    show_default=True,
    help="Proxies whose X-Forwarded-For is trusted: addresses and networks, separated by commas, or *.",
)
@click.option("--log-requests", is_flag=True, help="Log each request as one line of JSON on stderr.")
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Format of stderr. With json every line is JSON. With text the address, a warning about missing keys and a "
    "failed start are text. All other events and requests are JSON.",
)
@click.option(
    "--otlp-endpoint",
    metavar="URL",
    help="Send traces of requests to this OpenTelemetry collector, by OTLP over HTTP. Needs the extra otel.",
)
@serving_options
@_collect_limits
def command(
    models: tuple[str, ...],
    heads: tuple[str, ...],
    collections: tuple[str, ...],
    reference: str | None,
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

    The page at / shows predictions for your images and teaches classifiers. /docs describes all routes.

    The server only answers this machine unless --host is set. Set --keys before you open it to others.
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
        reference=reference,
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
    """Serves until a signal, and returns the exit code.

    Args:
        options: options of all workers.
        asked: the models, heads and collections to serve now.
        watched: the watched manifest, if there is one.
        host, listener: the address to listen on.
    """
    from robustfeat.serving.http.admission import forget_worker
    from robustfeat.serving.http.manifest import Manifest
    from robustfeat.serving.http.process.log import Log
    from robustfeat.serving.http.process.supervisor import Start, Supervisor, count_places

    def run(start: Start) -> None:
        from robustfeat.serving.http.opening import open_service
        from robustfeat.serving.http.process.worker import run_worker

        def open_served() -> Service:
            manifest = asked() if start.loaded is None else Manifest.from_dict(start.loaded)
            return open_service(manifest, options, start.number)

        run_worker(open_served, listener, start, options)

    def refresh() -> bool:
        with contextlib.suppress(RobustFeatError):  # the workers report the error
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
        forget=lambda number: forget_worker(options.counts, number, count_places(options.workers)),
        reloads=options.reloads,
        log=log,
    )
    return supervisor.serve()


class _Announcements:
    """Prints the server's address, a warning if it needs no key, and later each reload."""

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
    """Accepted names in the Host header, besides addresses."""
    return ["localhost", *{socket.gethostname().lower(), host.lower()}, *(name.lower() for name in allowed)]


def _listen(host: str, port: int) -> socket.socket:
    """Opens the server's socket. `::`, all addresses, also accepts IPv4.

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
