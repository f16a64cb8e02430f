"""Two replicas behind nginx and HAProxy are restarted one after the other: no request is lost.

The proxies are configured as docs/deploy.md has them. ROBUSTFEAT_RESTART_MINUTES=N for another time than five minutes.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import orjson
import pytest

from load import Client, post
from tests.command_server import CommandServer
from tests.serving.http.conftest import Server
from tests.serving.http.test_proxies import Proxy, block_of, free_port, haproxy, nginx

MINUTES = float(os.environ.get("ROBUSTFEAT_RESTART_MINUTES", "5"))
MOST_PER_S = 20.0
SHARE = 0.3
"""Of the rate that both replicas reach: one of them can take the load while the other is away."""
SETTLED_S = 3.0
"""After which a proxy's health checks have found a new replica."""


class Replicas:
    """Two servers on ports that stay theirs."""

    def __init__(self, commands: CommandServer) -> None:
        self._commands = commands
        self.ports = [free_port(), free_port()]
        self._servers = [self._start(port) for port in self.ports]
        self.restarts = 0

    def _start(self, port: int) -> Server:
        return Server("--port", port, "--threads", 1, forked_from=self._commands)

    def restart_until(self, done: threading.Event) -> None:
        """One after the other, again and again; each drains and ends before its successor starts."""
        for number in itertools.cycle(range(2)):
            if done.wait(SETTLED_S):
                return
            assert self._servers[number].stop() == 0
            self._servers[number] = self._start(self.ports[number])
            self.restarts += 1

    def stop(self) -> None:
        for server in self._servers:
            assert server.stop() == 0


class CheckingClient(Client):
    """Compares each answer with the features of its photograph."""

    def __init__(self, port: int, expected: dict[bytes, np.ndarray]) -> None:
        super().__init__(port)
        self._expected = expected
        self.wrong: Counter[str] = Counter()

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        status, body = await super().ask(request)
        if status != 200:
            self.wrong[f"{status} {body[:200].decode(errors='replace')}"] += 1
        elif not np.allclose(vector_of(body), self._expected[request], rtol=1e-3, atol=1e-4):
            self.wrong["another vector"] += 1
        return status, body


def vector_of(body: bytes) -> np.ndarray:
    return np.array(orjson.loads(body)["data"][0]["embedding"], np.float32)


def behind_nginx(ports: list[int], port: int, folder: Path) -> Proxy:
    (line,) = re.findall(r"\n( +server 127.0.0.1:8000.*)", block_of("nginx"))
    lines = [line.replace("127.0.0.1:8000", f"127.0.0.1:{one}") for one in ports]
    text = block_of("nginx").replace(line, "\n".join(lines)).replace("listen 80;", f"listen {port};")
    return nginx(folder, text, port)


def behind_haproxy(ports: list[int], port: int, folder: Path) -> Proxy:
    (line,) = re.findall(r"\n( +server one 127.0.0.1:8000.*)", block_of("haproxy"))
    lines = [line.replace("one", f"r{one}").replace("127.0.0.1:8000", f"127.0.0.1:{one}") for one in ports]
    text = block_of("haproxy").replace(line, "\n".join(lines)).replace("bind :80", f"bind 127.0.0.1:{port}")
    return haproxy(folder, text, port)


@pytest.fixture
def replicas(commands: CommandServer) -> Iterator[Replicas]:
    started = Replicas(commands)
    yield started
    started.stop()


@pytest.mark.slow
@pytest.mark.parametrize("proxy", [behind_nginx, behind_haproxy])
def test_a_rolling_restart_loses_no_request(
    proxy: Callable[[list[int], int, Path], Proxy], replicas: Replicas, photos: list[bytes], tmp_path: Path
) -> None:
    port, requests = free_port(), [post("/embed", photo) for photo in photos]

    async def load() -> tuple[CheckingClient, int]:
        expected = {request: vector_of((await Client(replicas.ports[0]).ask(request))[1]) for request in requests}
        client = CheckingClient(port, expected)
        peak = (await client.closed(requests, 8, 3)).goodput
        rate = min(MOST_PER_S, SHARE * peak)
        result = await client.open(requests, rate, 60 * MINUTES)
        return client, round(60 * MINUTES * rate) - sum(map(len, result.latencies.values()))

    done = threading.Event()
    with proxy(replicas.ports, port, tmp_path):
        time.sleep(SETTLED_S)
        restarting = threading.Thread(target=replicas.restart_until, args=[done])
        restarting.start()
        try:
            client, missing = asyncio.run(load())
        finally:
            done.set()
            restarting.join()
    assert not client.wrong
    assert not missing
    assert replicas.restarts >= 6 * MINUTES
