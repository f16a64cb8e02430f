"""Options that all workers of a server share."""

from __future__ import annotations

import importlib.util
import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from robustfeat.errors import InputError
from robustfeat.serving.http.keys import KeyRing
from robustfeat.serving.http.limits import Limits
from robustfeat.serving.http.process.reloads import Reloads

if TYPE_CHECKING:
    from robustfeat.serving.engines.options import RunOptions

__all__ = ["ServerOptions", "check_otlp_endpoint", "parse_proxies"]


@dataclass(frozen=True)
class ServerOptions:
    """The options of a server.

    Attributes:
        run: how to run models.
        limits: limits of requests.
        keys: the accepted keys.
        hosts: accepted names in the Host header, besides addresses.
        workers: number of workers.
        counts: descriptor of an empty file that all workers inherit (see `Admission`).
        reloads: whether the last reload was refused.
        reference: features that images are compared with, for the metrics of drift; None for none.
        page: whether to serve the page at /.
        proxies: addresses and networks whose X-Forwarded-For is trusted; `*` for all.
        log_requests: whether to log every request.
        log_stages: whether to log each stage of the server's life.
        otlp_endpoint: address of the collector of traces; None for none.
        drain_s: grace period for requests in flight on shutdown.
    """

    run: RunOptions
    limits: Limits
    keys: KeyRing
    hosts: list[str]
    workers: int
    counts: int
    reloads: Reloads
    reference: str | None
    page: bool
    proxies: list[str]
    log_requests: bool
    log_stages: bool
    otlp_endpoint: str | None
    drain_s: float


def parse_proxies(text: str) -> list[str]:
    """Parses addresses and networks separated by commas, or `*`.

    Raises:
        InputError: an entry is neither an address nor a network.
    """
    entries = [entry for entry in (part.strip() for part in text.split(",")) if entry]
    for entry in entries:
        try:
            if entry != "*":
                ipaddress.ip_network(entry)
        except ValueError as exc:
            raise InputError(
                f"expected addresses and networks such as 10.0.0.0/8, with commas between them, or *; got {entry!r}",
                argument="forwarded_allow_ips",
            ) from exc
    return entries


def check_otlp_endpoint(address: str | None) -> str | None:
    """Checks the address of a collector of traces.

    Raises:
        InputError: the address is invalid, or the libraries are missing.
    """
    if not address:
        return None
    parts = urlsplit(address)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise InputError("expected an address such as http://localhost:4318", argument="otlp_endpoint", value=address)
    try:
        found = importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http")
    except ModuleNotFoundError:
        found = None
    if found is None or importlib.util.find_spec("opentelemetry.sdk") is None:
        raise InputError(
            "needs the libraries of OpenTelemetry", argument="otlp_endpoint", fix="pip install 'robustfeat[otel]'"
        )
    return address
