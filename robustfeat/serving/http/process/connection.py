"""uvicorn with bounds for its connections, errors in our form, and exit code 0 after SIGTERM.

`Connection` and `Server` override methods of uvicorn that its documentation does not promise. pyproject.toml therefore
caps uvicorn's version, and a test fails where one of these methods or attributes is missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any

import httptools
import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from robustfeat.serving.http.gate import ON_DISCONNECT
from robustfeat.serving.http.process.log import Log
from robustfeat.serving.online.errors import ApiError, error_answer

__all__ = ["Connection", "Server", "connection_class"]

PATIENCE_S = 10.0
"""How long a request's head or the rest of a refused body may take to arrive, and how long a client may not read."""

SLOW_S = 5.0
"""A body that takes longer makes room for a new connection where all are taken."""

_HEAD_BYTES = 2**16
_REFUSED_BYTES = 2**26
_PARSED_AT_ONCE = 2**12
"""Bytes; 256 KiB may hold 6,000 requests."""

_LINGER_S = 1.0
"""A connection without a request gets so much time for one when the server stops: it may be on its way."""

_UNANSWERED = 32
"""Requests of one connection that wait for their answers; with more, nothing is read from it."""

_MAPPED = "::ffff:"

_TOO_LARGE = f"a request's head may have {_HEAD_BYTES:,} bytes; send less in its headers"


class Server(uvicorn.Server):
    """uvicorn without its own signal handling, which ends in exit code 143.

    Args:
        config: of uvicorn.
        closed: called when no more connections are accepted.
    """

    def __init__(self, config: uvicorn.Config, closed: Callable[[], None]) -> None:
        super().__init__(config)
        self._closed = closed

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to the worker."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accepts no more connections, answers requests that still arrive on open ones, and closes them."""
        for server in self.servers:
            server.close()
        for listener in sockets or ():
            listener.close()
        self._closed()
        connections: set[Any] = self.server_state.connections
        for connection in connections:
            connection._finish()
        loop = asyncio.get_running_loop()
        end = loop.time() + _LINGER_S
        while any(not connection._cycles for connection in connections) and loop.time() < end:
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)


class Connection(HttpToolsProtocol):
    """One connection; `connection_class` makes a class with its own bounds.

    Attributes:
        max_connections: open at once. One more takes the place of the one that has been idle longest,
            or else of the longest upload beyond `SLOW_S`, or gets 503.
        count_error: counts an error by its code.
        log: has a line for each answer without a request, if it has lines for requests.
        idle: connections without a request to answer, the one that has been idle longest first.
        uploading: those whose body is not complete, and since when, the first to begin first.
    """

    max_connections: int
    count_error: Callable[[str], None]
    log: Log
    idle: dict[Connection, None]
    uploading: dict[Connection, float]

    _timer: asyncio.TimerHandle | None = None
    """Runs while no request is being answered: before a head is complete, or in the rest of a refused body."""
    _writing: asyncio.TimerHandle | None = None
    """Runs while the client does not read."""
    _between = True
    """Whether a head comes next."""
    _received = 0
    _head = 0
    _body = 0
    """Bytes of the current message, of its head and of its body."""
    _unparsed = b""
    """Came while too many requests were unanswered."""
    _offered = False
    """Whether the current head offers another protocol."""
    _last = False
    """Whether the next answer is the last one."""

    def connection_made(self, transport: Any) -> None:
        """Makes room for a connection beyond the bound, or refuses it; gives the first head its time."""
        self._cycles: deque[Any] = deque()  # requests that are not answered yet; clients may send several
        super().connection_made(transport)
        if self.client and self.client[0].startswith(_MAPPED):  # of IPv4, at a socket for both
            self.client = (self.client[0].removeprefix(_MAPPED), self.client[1])
        self.flow = _Flow(transport, self._full)
        if len(self.connections) > self.max_connections and not (self._close_idle() or self._close_slow()):
            message = "too many connections are open; try again soon"
            self._end(ApiError(503, "too_many_connections", message, retry_after_s=1))
        else:
            self.idle[self] = None
            self._wait(PATIENCE_S)

    def _full(self) -> bool:
        """Whether so many requests are unanswered that no more are read."""
        return len(self._cycles) >= _UNANSWERED or bool(self._unparsed)

    def data_received(self, data: bytes) -> None:
        """Parses a little at a time, as long as not too many requests are unanswered."""
        if self._unparsed:
            self._unparsed += data
            return
        self._unset_keepalive_if_required()
        view = memoryview(data)
        for start in range(0, len(data), _PARSED_AT_ONCE):
            if self.transport.is_closing():
                return
            if self._full():
                self._unparsed = data[start:]
                self.flow.pause_reading()
                return
            self._parse(view[start : start + _PARSED_AT_ONCE])

    def _finish(self) -> None:
        """Closes the connection after the next answer, which says so."""
        self._last = True
        if self.cycle is not None:
            self.cycle.keep_alive = False

    def _parse(self, data: memoryview) -> None:
        """Bounds the head and the rest of a refused body, in bytes and in time."""
        self._received += len(data)
        try:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as exc:
                self._parse_again(data[exc.args[0] :])
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.send_400_response("Invalid HTTP request received.")
        if self._received - self._body > _HEAD_BYTES + self._body // 4:
            self._end(ApiError(431, "head_too_large", _TOO_LARGE))
        elif self.cycle is not None and not self.cycle.response_complete:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        elif self._body > _REFUSED_BYTES:
            self.transport.abort()
        elif self._timer is None:
            self._wait(PATIENCE_S)

    def _parse_again(self, rest: memoryview) -> None:
        """Parses a head without its offer of another protocol, and then the bytes behind it.

        Clients that know HTTP/2 offer it, and expect an answer in HTTP/1.1 from servers that do not. The parser takes
        the body behind such a head for the other protocol.
        """
        version, method = self.parser.get_http_version().encode(), self.parser.get_method()
        lines = [b"%s %s HTTP/%s" % (method, self.url, version)]
        lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        self._offered = False
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self.parser.feed_data(b"\r\n".join([*lines, b"", b""]))
        self.parser.feed_data(rest)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Counts the head's bytes. A chunked body ends in fields, too, which are not the request's: RFC 9110, 6.5.1."""
        if not self._between:
            return
        self._head += len(name) + len(value) + 4
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Refuses a head that is too large; otherwise notes the request."""
        if self.parser.should_upgrade() and any(name == b"upgrade" for name, _ in self.headers):
            self._offered, self._head = True, 0
            return  # `_parse_again` comes next
        self._between = False
        self.idle.pop(self, None)
        head, self._head = self._head + len(self.url), 0
        if head > _HEAD_BYTES:
            self._end(ApiError(431, "head_too_large", _TOO_LARGE))
            raise ValueError("the head is too large")  # which ends the parser, too
        super().on_headers_complete()
        if self._last:
            self.cycle.keep_alive = False
        self._cycles.append(self.cycle)
        self.uploading[self] = self.loop.time()

    def on_body(self, body: bytes) -> None:
        """Counts the body's bytes."""
        self._body += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Waits for the next head."""
        if self._offered:
            return
        self._between, self._received, self._body = True, 0, 0
        self.uploading.pop(self, None)
        super().on_message_complete()
        if self.cycle.response_complete:  # it was refused, and uvicorn's own timer has ended since
            self._wait(self.timeout_keep_alive)
        elif not self.pipeline:  # uvicorn stops reading within large bodies, and would not see the client leave
            self.flow.resume_reading()

    def on_response_complete(self) -> None:
        """Ends the connection within a bounded time if it is closing; otherwise takes more requests."""
        self._cycles.popleft()
        super().on_response_complete()
        if self.transport.is_closing():
            self._abort_soon()
        elif self._unparsed:
            if len(self._cycles) == _UNANSWERED // 2:
                self.loop.call_soon(self._parse_more)
        elif not self._cycles:
            self.idle[self] = None

    def _parse_more(self) -> None:
        data, self._unparsed = self._unparsed, b""
        self.data_received(data)
        self.flow.resume_reading()

    def pause_writing(self) -> None:
        """Gives the client a bounded time to read."""
        super().pause_writing()
        self._writing = self.loop.call_later(PATIENCE_S, self.transport.abort)

    def resume_writing(self) -> None:
        """Stops the timer of `pause_writing`."""
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        """Reports the loss to every request that is not answered yet."""
        self.idle.pop(self, None)
        self.uploading.pop(self, None)
        for timer in (self._timer, self._writing):
            if timer is not None:
                timer.cancel()
        for cycle in self._cycles:  # uvicorn reports it to the last one only
            cycle.disconnected = True
        super().connection_lost(exc)
        for cycle in self._cycles:
            cycle.scope.get(ON_DISCONNECT, _nothing)()

    def timeout_keep_alive_handler(self) -> None:
        """Ends an idle connection within a bounded time."""
        super().timeout_keep_alive_handler()
        self._abort_soon()

    def send_400_response(self, msg: str) -> None:
        """Answers in our form what is not HTTP."""
        self._end(ApiError(400, "bad_http", f"{msg} Expected HTTP/1.1."))

    def _end(self, exc: ApiError) -> None:
        """Answers without a request, and closes."""
        if self.transport.is_closing():
            return
        self.count_error(exc.code)
        body = error_answer(exc, "/")
        headers = {**exc.headers, "content-type": "application/json", "content-length": str(len(body))}
        request_id = os.urandom(16).hex()
        headers |= {"connection": "close", "x-request-id": request_id}
        if self.log.requests:
            client = self.client[0] if self.client else None
            self.log.info("request", request_id=request_id, status=exc.status, code=exc.code, client=client)
        lines = [f"HTTP/1.1 {exc.status} {HTTPStatus(exc.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.transport.close()
        self._abort_soon()

    def _close_idle(self) -> bool:
        """Closes the connection that has been idle longest; whether there was one."""
        other = next(iter(self.idle), None)
        if other is None:
            return False
        self.count_error("too_many_connections")
        del self.idle[other]
        other.transport.abort()
        return True

    def _close_slow(self) -> bool:
        """Closes the connection whose body began to come longest ago, if that is long; whether there was one."""
        other = next(iter(self.uploading), None)
        if other is None or self.loop.time() - self.uploading[other] < SLOW_S:
            return False
        self.count_error("too_many_connections")
        del self.uploading[other]
        other.transport.abort()
        return True

    def _wait(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(seconds, self.transport.abort)

    def _abort_soon(self) -> None:
        # Closing waits for the client to read, which it may never do.
        self.loop.call_later(PATIENCE_S, self.transport.abort)


def connection_class(max_connections: int, count_error: Callable[[str], None], log: Log) -> type[Connection]:
    """The class of a server's connections.

    Args:
        max_connections, count_error, log: see `Connection`.
    """
    own = {"max_connections": max_connections, "count_error": staticmethod(count_error), "log": log}
    return type("BoundedConnection", (Connection,), {**own, "idle": {}, "uploading": {}})


class _Flow(FlowControl):
    """Does not resume reading while the connection is full, whoever asks for it."""

    def __init__(self, transport: Any, full: Callable[[], bool]) -> None:
        super().__init__(transport)
        self._full = full

    def resume_reading(self) -> None:
        """Resumes reading, if more requests are welcome."""
        if not self._full():
            super().resume_reading()


def _nothing() -> None:
    pass
