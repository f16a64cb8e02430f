"""Extends uvicorn with limits for connections, errors in our format, and exit code 0 after SIGTERM.

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
"""Longest time for a request's header or the rest of a refused body to arrive, and for a client not to read."""

SLOW_S = 5.0
"""Time after which a slow body may lose its connection to a new one."""

_HEAD_BYTES = 2**16
_REFUSED_BYTES = 2**26
_PARSED_AT_ONCE = 2**12
"""Bytes to parse at a time: 256 KiB may contain 6,000 requests."""

_LINGER_S = 1.0
"""Grace period for a connection without a request on shutdown, since a request may be on its way."""

_UNANSWERED = 32
"""Most unanswered requests of one connection. Beyond it, nothing is read."""

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
        """Stops accepting connections, handles requests that still arrive on open ones, and closes them."""
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
    """One connection. `connection_class` makes a class with limits.

    Attributes:
        max_connections: open at once. One more takes the place of the one that has been idle longest,
            or else of the longest upload beyond `SLOW_S`, or gets 503.
        count_error: counts an error by its code.
        log: logs responses without a request, if requests are logged.
        idle: idle connections, the longest idle first.
        uploading: connections with an incomplete body, and its start time, the oldest first.
    """

    max_connections: int
    count_error: Callable[[str], None]
    log: Log
    idle: dict[Connection, None]
    uploading: dict[Connection, float]

    _timer: asyncio.TimerHandle | None = None
    """Timer while no request is handled: before a header is complete, or in the rest of a refused body."""
    _writing: asyncio.TimerHandle | None = None
    """Timer while the client does not read."""
    _between = True
    """Whether a header comes next."""
    _received = 0
    _head = 0
    _body = 0
    """Bytes of the current message's header and body."""
    _unparsed = b""
    """Data that arrived while too many requests were unanswered."""
    _offered = False
    """Whether the current header offers another protocol."""
    _last = False
    """Whether the next response is the last one."""

    def connection_made(self, transport: Any) -> None:
        """Makes room for a connection beyond the limit or refuses it, and starts the timer of the first header."""
        self._cycles: deque[Any] = deque()  # unanswered requests, of which clients may send several
        super().connection_made(transport)
        if self.client and self.client[0].startswith(_MAPPED):  # an IPv4 address on a dual-stack socket
            self.client = (self.client[0].removeprefix(_MAPPED), self.client[1])
        self.flow = _Flow(transport, self._full)
        if len(self.connections) > self.max_connections and not (self._close_idle() or self._close_slow()):
            message = "too many connections are open; try again soon"
            self._end(ApiError(503, "too_many_connections", message, retry_after_s=1))
        else:
            self.idle[self] = None
            self._wait(PATIENCE_S)

    def _full(self) -> bool:
        """Whether too many requests are unanswered to read more."""
        return len(self._cycles) >= _UNANSWERED or bool(self._unparsed)

    def data_received(self, data: bytes) -> None:
        """Parses in small steps while not too many requests are unanswered."""
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
        """Closes the connection after the next response, which announces it."""
        self._last = True
        if self.cycle is not None:
            self.cycle.keep_alive = False

    def _parse(self, data: memoryview) -> None:
        """Limits the bytes and the time of the header and of the rest of a refused body."""
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
        """Parses a header without its offer of another protocol, then the bytes after it.

        Clients that support HTTP/2 offer it, and expect HTTP/1.1 from servers without it. The parser would treat the
        body after such a header as the other protocol.
        """
        version, method = self.parser.get_http_version().encode(), self.parser.get_method()
        lines = [b"%s %s HTTP/%s" % (method, self.url, version)]
        lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        self._offered = False
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # uvicorn sets it, too
        self.parser.feed_data(b"\r\n".join([*lines, b"", b""]))
        self.parser.feed_data(rest)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Counts the header's bytes. Trailers of a chunked body do not belong to it: RFC 9110, 6.5.1."""
        if not self._between:
            return
        self._head += len(name) + len(value) + 4
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Refuses a header that is too large, or else registers the request."""
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
        """Waits for the next header."""
        if self._offered:
            return
        self._between, self._received, self._body = True, 0, 0
        self.uploading.pop(self, None)
        super().on_message_complete()
        if self.cycle.response_complete:  # the request was refused, and uvicorn's own timer has ended
            self._wait(self.timeout_keep_alive)
        elif not self.pipeline:  # uvicorn pauses in large bodies, and would not notice a disconnect
            self.flow.resume_reading()

    def on_response_complete(self) -> None:
        """Ends a closing connection within a time limit, or else reads more requests."""
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
        """Gives the client limited time to read."""
        super().pause_writing()
        self._writing = self.loop.call_later(PATIENCE_S, self.transport.abort)

    def resume_writing(self) -> None:
        """Stops the timer of `pause_writing`."""
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        """Reports the disconnect to every unanswered request."""
        self.idle.pop(self, None)
        self.uploading.pop(self, None)
        for timer in (self._timer, self._writing):
            if timer is not None:
                timer.cancel()
        for cycle in self._cycles:  # uvicorn only reports it to the last one
            cycle.disconnected = True
        super().connection_lost(exc)
        for cycle in self._cycles:
            cycle.scope.get(ON_DISCONNECT, _nothing)()

    def timeout_keep_alive_handler(self) -> None:
        """Ends an idle connection within a time limit."""
        super().timeout_keep_alive_handler()
        self._abort_soon()

    def send_400_response(self, msg: str) -> None:
        """Responds to invalid HTTP in our format."""
        self._end(ApiError(400, "bad_http", f"{msg} Expected HTTP/1.1."))

    def _end(self, exc: ApiError) -> None:
        """Responds without a request, and closes."""
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
        """Closes the longest idle connection. Returns whether there was one."""
        other = next(iter(self.idle), None)
        if other is None:
            return False
        self.count_error("too_many_connections")
        del self.idle[other]
        other.transport.abort()
        return True

    def _close_slow(self) -> bool:
        """Closes the connection with the oldest slow upload. Returns whether there was one."""
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
        # Closing would wait for the client to read, which may never happen.
        self.loop.call_later(PATIENCE_S, self.transport.abort)


def connection_class(max_connections: int, count_error: Callable[[str], None], log: Log) -> type[Connection]:
    """Makes the class of a server's connections.

    Args:
        max_connections, count_error, log: see `Connection`.
    """
    own = {"max_connections": max_connections, "count_error": staticmethod(count_error), "log": log}
    return type("BoundedConnection", (Connection,), {**own, "idle": {}, "uploading": {}})


class _Flow(FlowControl):
    """Flow control that does not resume reading while the connection is full."""

    def __init__(self, transport: Any, full: Callable[[], bool]) -> None:
        super().__init__(transport)
        self._full = full

    def resume_reading(self) -> None:
        """Resumes reading if more requests are allowed."""
        if not self._full():
            super().resume_reading()


def _nothing() -> None:
    pass
