"""Loads on an HTTP server, from connections that are kept: so many requests at hand, or arrivals that do not wait."""

from __future__ import annotations

import asyncio
import itertools
import re
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any


class Connection(asyncio.Protocol):
    """One request after the other."""

    def __init__(self) -> None:
        self.buffer = bytearray()
        self.answer: asyncio.Future[tuple[int, bytes]] | None = None
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", self.buffer[:end])
        assert length
        if len(self.buffer) >= end + 4 + int(length[1]):
            status, body = int(self.buffer[9:12]), bytes(self.buffer[end + 4 :])
            if re.search(rb"(?i)\r\nconnection: *close", self.buffer[: end + 2]):
                self.transport.close()
            self.buffer.clear()
            if self.answer and not self.answer.done():
                self.answer.set_result((status, body))

    def connection_lost(self, exc: Exception | None) -> None:
        if self.answer and not self.answer.done():
            self.answer.set_result((0, b""))

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        self.answer = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return await self.answer


@dataclass
class Result:
    """What a load gave."""

    seconds: float
    latencies: dict[int, list[float]] = field(default_factory=dict)

    def add(self, status: int, seconds: float) -> None:
        self.latencies.setdefault(status, []).append(seconds)

    @property
    def goodput(self) -> float:
        return len(self.latencies.get(200, [])) / self.seconds

    def quantile(self, share: float, *statuses: int) -> float:
        """Of latencies, in ms."""
        values = sorted(itertools.chain.from_iterable(self.latencies.get(status, []) for status in statuses or [200]))
        return 1000 * values[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


class Client:
    """Loads a server from connections that it keeps."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.free: list[Connection] = []

    async def connect(self) -> Connection:
        while self.free:
            connection = self.free.pop()
            if not connection.transport.is_closing():
                return connection
        loop = asyncio.get_running_loop()
        return (await loop.create_connection(Connection, "127.0.0.1", self.port))[1]

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        connection = await self.connect()
        answer = await connection.ask(request)
        self.free.append(connection)
        return answer

    async def closed(self, requests: Sequence[bytes], at_once: int, seconds: float) -> Result:
        """So many requests at hand at any time."""
        source = itertools.cycle(requests)
        result, end = Result(seconds), time.perf_counter() + seconds

        async def loop() -> None:
            while (began := time.perf_counter()) < end:
                status, _ = await self.ask(next(source))
                if time.perf_counter() < end:
                    result.add(status, time.perf_counter() - began)

        await asyncio.gather(*(loop() for _ in range(at_once)))
        return result

    async def open(self, requests: Sequence[bytes], rate: float, seconds: float) -> Result:
        """Constant arrivals."""
        return await self.arrivals(requests, itertools.repeat(1 / rate, round(rate * seconds)))

    async def arrivals(self, requests: Sequence[bytes], gaps: Iterable[float]) -> Result:
        """A request after each of these gaps, in seconds."""
        result, began = Result(0), time.perf_counter()
        waiting: set[asyncio.Task[None]] = set()

        async def one(request: bytes, due: float) -> None:
            status, _ = await self.ask(request)
            result.add(status, time.perf_counter() - due)

        due = began
        for number, gap in enumerate(gaps):
            due += gap
            if (pause := due - time.perf_counter()) > 0:
                await asyncio.sleep(pause)
            task = asyncio.create_task(one(requests[number % len(requests)], due))
            waiting.add(task)
            task.add_done_callback(waiting.discard)
        # The rate is of what was answered while the load lasted and by those who still waited at its end.
        await asyncio.gather(*waiting)
        result.seconds = time.perf_counter() - began
        return result


def ask_alone(client: socket.socket, request: bytes) -> tuple[int, float]:
    """By a client that does nothing else: status and seconds."""
    began = time.perf_counter()
    client.sendall(request)
    said = client.recv(2**20)
    while (end := said.find(b"\r\n\r\n")) < 0:
        said += client.recv(2**20)
    length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", said[:end])
    assert length
    while len(said) < end + 4 + int(length[1]):
        said += client.recv(2**20)
    return int(said[9:12]), time.perf_counter() - began


def post(path: str, body: bytes, headers: str = "") -> bytes:
    """A request, as it goes over the wire."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    return head.encode() + body
