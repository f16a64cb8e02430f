"""uvicorn with what it lacks: bounds for its connections, errors in our form, an end without a signal."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from robustfeat.serving.http.errors import ApiError, error_answer

__all__ = ["Server", "connection_class"]

HEAD_S = 10.0
"""How long a request's head, or the rest of a refused body, may take to arrive."""

_HEAD_BYTES = 2**16
_REFUSED_BYTES = 2**26


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

        _timer: asyncio.TimerHandle | None = None
        _unasked = 0
        """Bytes that came while no request was being answered: of a head, or of a body that was refused."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > most:
                refusal = ApiError(503, "too_many_connections", "too many connections are open; try again soon")
                self._end(503, b"Service Unavailable", refusal)
                return
            self._timer = self.loop.call_later(HEAD_S, self._give_up)

        def data_received(self, data: bytes) -> None:
            refused = self.cycle is not None
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._unasked = 0
                if self._timer is not None:
                    self._timer.cancel()
                    self._timer = None
                return
            self._unasked += len(data)
            if self._timer is None:
                self._timer = self.loop.call_later(HEAD_S, self._give_up)
            if self._unasked > (_REFUSED_BYTES if refused else _HEAD_BYTES):
                self._give_up()

        def connection_lost(self, exc: Exception | None) -> None:
            if self._timer is not None:
                self._timer.cancel()
            gone: Any = (self.scope or {}).get("robustfeat.gone")
            super().connection_lost(exc)
            if gone is not None:
                gone()

        def timeout_keep_alive_handler(self) -> None:
            # A client that does not read its answer would otherwise keep the connection for ever.
            super().timeout_keep_alive_handler()
            self.loop.call_later(HEAD_S, self.transport.abort)

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
