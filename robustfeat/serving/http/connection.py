"""uvicorn with what it lacks: bounds for its connections, errors in our form, an end without a signal."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import deque
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from robustfeat.serving.http.errors import ApiError, error_answer

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


def connection_class(most: int) -> type[HttpToolsProtocol]:
    """The class for at most so many connections at once."""

    class Connection(HttpToolsProtocol):
        """One connection."""

        _waiting: asyncio.TimerHandle | None = None
        """Runs while no request is being answered: before a head is complete, or in the rest of a refused body."""
        _writing: asyncio.TimerHandle | None = None
        """Runs while the client does not read."""
        _received = 0
        _body = 0
        """Bytes of the message at hand, and those of its body."""

        def connection_made(self, transport: Any) -> None:
            self._cycles: deque[Any] = deque()  # requests that are not answered yet; clients may send several
            super().connection_made(transport)
            if len(self.connections) > most:
                refusal = ApiError(503, "too_many_connections", "too many connections are open; try again soon")
                self._end(503, b"Service Unavailable", refusal)
                return
            self._waiting = self.loop.call_later(PATIENCE_S, self._give_up)

        def data_received(self, data: bytes) -> None:
            if not self._received or self.cycle is None:
                data = _without_upgrade(data)
            self._received += len(data)
            super().data_received(data)
            if self._received - self._body > _HEAD_BYTES + self._body // 4:
                self._end(431, b"Request Header Fields Too Large", ApiError(431, "head_too_large", _TOO_LARGE))
            elif self.cycle is not None and not self.cycle.response_complete:
                if self._waiting is not None:
                    self._waiting.cancel()
                    self._waiting = None
            elif self._body > _REFUSED_BYTES:
                self._give_up()
            elif self._waiting is None:
                self._waiting = self.loop.call_later(PATIENCE_S, self._give_up)

        def on_headers_complete(self) -> None:
            super().on_headers_complete()
            self._cycles.append(self.cycle)

        def on_response_complete(self) -> None:
            self._cycles.popleft()
            super().on_response_complete()

        def on_message_begin(self) -> None:
            self._received = self._body = 0
            super().on_message_begin()

        def on_body(self, body: bytes) -> None:
            self._body += len(body)
            super().on_body(body)

        def on_message_complete(self) -> None:
            super().on_message_complete()
            if not self.pipeline:  # uvicorn stops reading within large bodies, and would not see the client leave
                self.flow.resume_reading()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._writing = self.loop.call_later(PATIENCE_S, self._give_up)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._writing is not None:
                self._writing.cancel()

        def connection_lost(self, exc: Exception | None) -> None:
            for timer in (self._waiting, self._writing):
                if timer is not None:
                    timer.cancel()
            for cycle in self._cycles:  # uvicorn tells the last alone
                cycle.disconnected = True
            super().connection_lost(exc)
            for cycle in self._cycles:
                cycle.scope.get("robustfeat.gone", _nothing)()

        def timeout_keep_alive_handler(self) -> None:
            # A client that does not read its answer would otherwise keep the connection for ever.
            super().timeout_keep_alive_handler()
            self.loop.call_later(PATIENCE_S, self.transport.abort)

        def send_400_response(self, msg: str) -> None:
            self._end(400, b"Bad Request", ApiError(400, "bad_http", f"{msg} Expected HTTP/1.1."))

        def _end(self, status: int, phrase: bytes, exc: ApiError) -> None:
            body = error_answer(exc, "/")
            self.transport.write(
                b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nretry-after: 1\r\n"
                b"connection: close\r\n\r\n%s" % (status, phrase, len(body), body)
            )
            self.transport.close()

        def _give_up(self) -> None:
            if not self.transport.is_closing():
                self.transport.abort()

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
