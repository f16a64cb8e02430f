"""One HTTP connection without sockets: what a client sends, and whether all is as it should be afterwards."""

from __future__ import annotations

import asyncio
from functools import cache
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from robustfeat.serving.http.process.connection import _UNANSWERED, connection_class
from robustfeat.serving.http.process.log import Log

__all__ = ["converse"]


class _Transport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.written, self.closing, self.reading = 0, False, True

    def write(self, data: Any) -> None:
        self.written += len(data)

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    abort = close

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)}.get(name, default)


async def _answer(scope: Any, receive: Any, send: Any) -> None:
    """An application that reads the whole body."""
    more = True
    while more:
        message = await receive()
        more = message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@cache
def _web() -> tuple[asyncio.Runner, uvicorn.Config, type[Any]]:
    kind = connection_class(10, lambda _: None, Log("fuzzing"))
    config = uvicorn.Config(_answer, http=kind, ws="none", lifespan="off", log_config=None, access_log=False)
    config.load()
    return asyncio.Runner(), config, kind


def converse(data: bytes) -> None:
    """Sends the bytes over one connection, in pieces of a length that their first byte gives."""
    runner, config, kind = _web()

    async def talk() -> None:
        failed: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failed.append(context))
        state = ServerState()
        connection, transport = kind(config=config, server_state=state, app_state={}), _Transport()
        connection.connection_made(transport)
        step = 1 + (data[0] if data else 0) * 16
        waits = 0
        for at in range(0, len(data), step):
            while not transport.reading and waits < 1000:
                waits += 1
                await asyncio.sleep(0)
            if transport.is_closing():
                break
            connection.data_received(data[at : at + step])
            assert len(connection._cycles) <= _UNANSWERED + 1 + 2**12 // 16
            await asyncio.sleep(0)
        connection.connection_lost(None)
        for _ in range(5):
            await asyncio.sleep(0)
        for task in list(state.tasks):
            await asyncio.wait_for(task, 5)
        assert not connection.idle
        assert not failed, failed
        assert transport.written < 600 * (len(data) + 10)

    runner.run(talk())
