"""uvicorn with what it lacks: bounds for its connections, errors in our form, an end without a signal."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from robustfeat.serving.online.errors import ApiError, error_answer

__all__ = ["Server", "connection_class"]

PATIENCE_S = 10.0
"""How long a request's head or the rest of a refused body may take to arrive, and how long a client may not read."""

_HEAD_BYTES = 2**16
_REFUSED_BYTES = 2**26
_TOO_LARGE = f"a request's head may have {_HEAD_BYTES:,} bytes; send less in its headers"


class Server(uvicorn.Server):
    """uvicorn, whose own way with signals ends in exit code 143."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves them to the worker."""
        yield


def connection_class(most: int, count: Callable[[str], None]) -> type[HttpToolsProtocol]:
    """The class for at most so many connections at once; `count` counts errors by their code."""

    class Connection(HttpToolsProtocol):
        """One connection."""

        _timer: asyncio.TimerHandle | None = None
        """Runs while no request is being answered: before a head is complete, or in the rest of a refused body."""
        _writing: asyncio.TimerHandle | None = None
        """Runs while the client does not read."""
        _between = True
        """Whether what comes next is a head."""
        _received = 0
        _head = 0
        _body = 0
        """Bytes of the message at hand, and those of its head and its body."""

        def connection_made(self, transport: Any) -> None:
            self._cycles: deque[Any] = deque()  # requests that are not answered yet; clients may send several
            super().connection_made(transport)
            if len(self.connections) > most:
                message = "too many connections are open; try again soon"
                self._end(ApiError(503, "too_many_connections", message, retry_after_s=1))
            else:
                self._wait(PATIENCE_S)

        def data_received(self, data: bytes) -> None:
            if self._between:
                data = _without_upgrade(data)
            self._received += len(data)
            super().data_received(data)
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

        def on_header(self, name: bytes, value: bytes) -> None:
            self._head += len(name) + len(value) + 4
            super().on_header(name, value)

        def on_headers_complete(self) -> None:
            self._between = False
            head, self._head = self._head + len(self.url), 0
            if head > _HEAD_BYTES:
                self._end(ApiError(431, "head_too_large", _TOO_LARGE))
                raise ValueError("the head is too large")  # which ends the parser, too
            super().on_headers_complete()
            self._cycles.append(self.cycle)

        def on_body(self, body: bytes) -> None:
            self._body += len(body)
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._between, self._received, self._body = True, 0, 0
            super().on_message_complete()
            if self.cycle.response_complete:  # it was refused, and uvicorn's own timer has ended since
                self._wait(self.timeout_keep_alive)
            elif not self.pipeline:  # uvicorn stops reading within large bodies, and would not see the client leave
                self.flow.resume_reading()

        def on_response_complete(self) -> None:
            self._cycles.popleft()
            super().on_response_complete()
            if self.transport.is_closing():
                self._abort_soon()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._writing = self.loop.call_later(PATIENCE_S, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._writing is not None:
                self._writing.cancel()

        def connection_lost(self, exc: Exception | None) -> None:
            for timer in (self._timer, self._writing):
                if timer is not None:
                    timer.cancel()
            for cycle in self._cycles:  # uvicorn tells the last alone
                cycle.disconnected = True
            super().connection_lost(exc)
            for cycle in self._cycles:
                cycle.scope.get("robustfeat.gone", _nothing)()

        def timeout_keep_alive_handler(self) -> None:
            super().timeout_keep_alive_handler()
            self._abort_soon()

        def send_400_response(self, msg: str) -> None:
            self._end(ApiError(400, "bad_http", f"{msg} Expected HTTP/1.1."))

        def _end(self, exc: ApiError) -> None:
            """Answers without a request, and closes."""
            if self.transport.is_closing():
                return
            count(exc.code)
            body = error_answer(exc, "/")
            headers = {**exc.headers, "content-type": "application/json", "content-length": str(len(body))}
            headers |= {"connection": "close", "x-request-id": os.urandom(16).hex()}
            lines = [f"HTTP/1.1 {exc.status} {HTTPStatus(exc.status).phrase}"]
            lines += [f"{name}: {value}" for name, value in headers.items()]
            self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
            self.transport.close()
            self._abort_soon()

        def _wait(self, seconds: float) -> None:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self.loop.call_later(seconds, self.transport.abort)

        def _abort_soon(self) -> None:
            # Closing waits for the client to read, which it may never do.
            self.loop.call_later(PATIENCE_S, self.transport.abort)

    return Connection


def _nothing() -> None:
    pass


def _without_upgrade(data: bytes) -> bytes:
    """The head of a request that offers another protocol, with the offer unread.

    Clients that know HTTP/2 offer it, and expect an answer in HTTP/1.1 from servers that do not; the parser would
    take the body for the other protocol.
    """
    end = data.find(b"\r\n\r\n")
    if end < 0 or b"pgrade:" not in data[:end]:
        return data
    return re.sub(rb"(?i)\r\nupgrade:", b"\r\nx-grade:", data[:end]) + data[end:]
