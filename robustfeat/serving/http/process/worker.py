"""A worker process of a server, which loads the models, handles requests, and ends on SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from robustfeat.serving.http.options import ServerOptions
from robustfeat.serving.http.process.log import adopt_logging
from robustfeat.serving.http.process.supervisor import CLOSED, HEALTHY, HEARTBEAT_S, LOADED, RETIRE, Start, report_line
from robustfeat.serving.http.service import Service
from robustfeat.system import INHERITS, allow_open_files

if TYPE_CHECKING:
    import uvicorn

__all__ = ["run_worker"]

_FILES = 256
"""Descriptors in addition to connections."""

_KEEP_ALIVE_S = 75
"""Longer than the 60 s of common load balancers, so they close an idle connection rather than we while they use it."""


def run_worker(
    open_service: Callable[[], Service], listener: socket.socket, start: Start, options: ServerOptions
) -> None:
    """Serves until SIGTERM, and then finishes the requests in flight.

    Args:
        open_service: loads the models and heads.
        listener: the socket to accept connections from.
        start: the supervisor's instructions.
        options: options of the server.

    Raises:
        EngineError: a model does not reproduce a golden image's features, and the server has other workers.
    """
    supervisor = os.getppid()
    # Import the web framework, which takes half a second, while the models load and the decoders start.
    importing = threading.Thread(target=importlib.import_module, args=("robustfeat.serving.http.app",))
    importing.start()
    began = time.monotonic()
    service = open_service()
    os.write(start.report, report_line(LOADED, service.manifest.to_dict()))
    service.log.stage("loaded", seconds=round(time.monotonic() - began, 3))
    allow_open_files(service.limits.max_connections + _FILES)
    with ExitStack() as stack:
        for model in service.models.values():
            stack.enter_context(model)
        importing.join()
        import uvicorn

        from robustfeat.serving.http.app import create_app
        from robustfeat.serving.http.process.connection import Server, connection_class

        config = uvicorn.Config(
            create_app(service),
            http=connection_class(service.limits.max_connections, service.metrics.error, service.log),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            forwarded_allow_ips=options.proxies,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=options.drain_s,  # type: ignore[arg-type]
        )
        adopt_logging(service.log)
        if options.otlp_endpoint is not None:
            from robustfeat.serving.http.process.tracing import Tracer

            service.tracer = Tracer(options.otlp_endpoint, start.number)
        # Exclude all current objects from garbage collection, which delayed requests. The p99 of refusals under
        # overload fell from 60 to 7 ms.
        gc.collect()
        gc.freeze()
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            closed = partial(_report, start.report, CLOSED)
            runner.run(_serve(Server(config, closed), service, listener, start, supervisor))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:
        return asyncio.SelectorEventLoop  # the default of Windows cannot watch the decoders' pipes
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


async def _serve(
    server: uvicorn.Server, service: Service, listener: socket.socket, start: Start, supervisor: int
) -> None:
    def stop() -> None:
        service.draining = server.should_exit = True

    def retire() -> None:
        # The server stays ready, and each request keeps its full time.
        server.config.timeout_graceful_shutdown = None
        server.should_exit = True

    _handle_signals(stop, retire)
    for model in service.models.values():
        model.attach()
        if start.tried:
            await model.check()
        elif start.loaded is not None:  # other workers are ready, so this one must be, before it accepts connections
            await model.probe()
    background = [
        asyncio.create_task(service.maintain()),
        asyncio.create_task(_report_health(service, start.report, supervisor, stop)),
    ]

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:  # the worker needs its background tasks
            service.log.error("a background task failed", error=repr(task.exception()))
            stop()

    for task in background:
        task.add_done_callback(ended)
    try:
        await server.serve(sockets=[listener])
    finally:
        for task in background:
            task.cancel()
        service.metrics.count()
        if service.tracer is not None:
            service.tracer.close()


def _handle_signals(stop: Callable[[], None], retire: Callable[[], None]) -> None:
    """Calls `stop` on SIGTERM and `retire` on RETIRE. Without a supervisor, Ctrl+C also stops."""
    loop = asyncio.get_running_loop()
    if INHERITS:
        loop.add_signal_handler(signal.SIGTERM, stop)
        loop.add_signal_handler(RETIRE, retire)
        return
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop))


async def _report_health(service: Service, report: int, supervisor: int, stop: Callable[[], None]) -> None:
    """Reports to the supervisor while this worker is healthy, and stops the worker when the supervisor ends."""
    if INHERITS:
        os.set_blocking(report, False)
    reported = -HEARTBEAT_S
    while os.getppid() == supervisor:
        if service.ready and time.monotonic() - reported >= HEARTBEAT_S:
            reported = time.monotonic()
            _report(report, HEALTHY)
        await asyncio.sleep(1.0 if reported > 0 else 0.01)
    stop()
    shutil.rmtree(os.environ["PROMETHEUS_MULTIPROC_DIR"], ignore_errors=True)


def _report(report: int, kind: str) -> None:
    with contextlib.suppress(OSError):  # the supervisor has ended, or does not read
        os.write(report, report_line(kind))
