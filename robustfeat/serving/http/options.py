"""What all workers of a server have in common, whatever they serve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from robustfeat.serving.http.keys import KeyRing
from robustfeat.serving.http.limits import Limits

if TYPE_CHECKING:
    from robustfeat.serving.engines.options import RunOptions

__all__ = ["ServerOptions"]


@dataclass(frozen=True)
class ServerOptions:
    """The options of a server.

    Attributes:
        run: how models are run.
        limits: of requests.
        keys: who may ask.
        hosts: names that the Host header may have, beside addresses.
        workers: how many workers there are.
        counts: the descriptor of an empty file that all of them inherit (see `Admission`).
        page: whether there is the page at /.
        log_requests: whether there is a log line for every request.
        drain_s: grace period for requests in flight on shutdown.
    """

    run: RunOptions
    limits: Limits
    keys: KeyRing
    hosts: list[str]
    workers: int
    counts: int
    page: bool
    log_requests: bool
    drain_s: float
