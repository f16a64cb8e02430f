"""Starting, stopping, and dying in parts: what is lost, and what goes on."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from robustfeat import FeatureExtractor
from tests.conftest import Run
from tests.serving.http.conftest import Server, alive, children, serving, wait_until


class Load:
    """Four clients that ask without a pause, each its own photograph, and check what they get."""

    def __init__(self, server: Server, photos: list[bytes], extractor: FeatureExtractor) -> None:
        self.server = server
        self.expected = extractor.embed(photos[:4])
        self.good, self.lost = [0] * 4, [0] * 4
        self.wrong: list[tuple[int, bytes]] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(at, photos[at])) for at in range(4)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        wait_until(lambda: min(self.good) > 2)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, at: int, photo: bytes) -> None:
        while not self._stop.is_set():
            try:
                answer = self.server.post("/embed", photo)
            except (OSError, http.client.HTTPException):
                self.lost[at] += 1
                continue
            found = answer.json["data"][0].get("embedding") if answer.status == 200 else None
            if found is not None and np.allclose(found, self.expected[at], rtol=1e-4, atol=1e-5):
                self.good[at] += 1
            else:
                self.wrong.append((answer.status, answer.body[:500]))

    def goes_on(self) -> None:
        before = list(self.good)
        wait_until(lambda: all(now > then + 5 for now, then in zip(self.good, before, strict=True)))


def test_a_killed_worker_costs_its_requests_and_another_comes(photos: list[bytes], extractor: FeatureExtractor) -> None:
    with serving("--workers", 2) as server:
        wait_until(lambda: len(server.workers()) == 2)
        with Load(server, photos, extractor) as load:
            time.sleep(1.5)  # counts are written every second
            counted = server.metric("robustfeat_images_total")
            assert counted > 0
            first = server.workers()
            orphans = children(first[0])
            os.kill(first[0], signal.SIGKILL)
            wait_until(lambda: len(set(server.workers()) - {first[0]}) == 2)
            load.goes_on()
        assert not load.wrong
        assert sum(load.lost) <= 4  # what each client had on its way at that moment
        wait_until(lambda: not any(alive(pid) for pid in orphans))
        assert server.get("/health/ready").status == 200
        assert "signal 9" in next(line for line in server.said if "worker ended" in line)
        assert server.metric("robustfeat_images_total") >= counted


def test_the_only_worker_is_replaced_too(photos: list[bytes]) -> None:
    with serving() as server:
        (worker,) = server.workers()
        os.kill(worker, signal.SIGKILL)
        # The next request waits at the door until there is somebody.
        assert server.post("/embed", photos[0]).status == 200
        assert server.workers() != [worker]


def test_a_killed_decoder_costs_nothing(photos: list[bytes], extractor: FeatureExtractor) -> None:
    with serving() as server:
        (worker,) = server.workers()
        with Load(server, photos, extractor) as load:
            for _ in range(3):
                seen = children(worker)
                os.kill(seen[0], signal.SIGKILL)
                wait_until(lambda seen=seen: len(set(children(worker)) - {seen[0]}) == len(seen))
                load.goes_on()
        assert (load.wrong, sum(load.lost)) == ([], 0)


def test_a_decoder_that_stands_still_costs_its_image(photos: list[bytes]) -> None:
    with serving("--decode-timeout", 0.5) as server:
        (worker,) = server.workers()
        for decoder in children(worker):
            os.kill(decoder, signal.SIGSTOP)
        answer = server.post("/embed", photos[0])
        assert answer.status == 422
        assert "took longer than 0.5 s" in answer.json["error"]["message"]
        assert server.post("/embed", photos[0]).status in {200, 422}  # perhaps the other one that stands
        wait_until(lambda: server.post("/embed", photos[0]).status == 200)


def test_a_killed_supervisor_takes_its_workers_along(photos: list[bytes]) -> None:
    with serving() as server:
        (worker,) = server.workers()
        pids = [worker, *children(worker)]
        server.process.kill()
        server.process.wait()
        wait_until(lambda: not any(alive(pid) for pid in pids))


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(photos: list[bytes], name: signal.Signals) -> None:
    with serving("--workers", 2) as server, ThreadPoolExecutor(1) as pool:
        # A request whose body is on its way when the signal comes, and one that is being embedded.
        late = socket.create_connection(("127.0.0.1", server.port))
        head = f"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(photos[0])}\r\n\r\n"
        late.sendall(head.encode() + photos[0][:100])
        many = pool.submit(server.form, "/embed", [photos[1]] * 64)
        wait_until(lambda: server.metric("robustfeat_in_flight_requests") >= 2)
        pids = server.workers()
        pids += [child for pid in pids for child in children(pid)]
        server.process.send_signal(name)

        def refused() -> bool:
            try:
                with socket.create_connection(("127.0.0.1", server.port), timeout=1):
                    return False
            except OSError:
                return True

        wait_until(refused)
        late.sendall(photos[0][100:])
        answer = http.client.HTTPResponse(late)
        answer.begin()
        assert answer.status == 200
        assert answer.getheader("connection") == "close"
        assert many.result().status == 200
        late.close()
        assert server.process.wait(20) == 0
        assert not any(alive(pid) for pid in pids)


def test_it_ends_in_the_time_given_even_if_a_client_does_not(photos: list[bytes]) -> None:
    with serving("--drain", 1) as server, socket.create_connection(("127.0.0.1", server.port)) as slow:
        slow.sendall(b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nabc")
        wait_until(lambda: server.metric("robustfeat_in_flight_requests") >= 2)
        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < 5


def test_a_server_that_is_stopped_is_not_ready_any_more(photos: list[bytes]) -> None:
    with serving("--drain", 5) as server:
        waiting = http.client.HTTPConnection("127.0.0.1", server.port)
        waiting.connect()
        slow = socket.create_connection(("127.0.0.1", server.port))
        slow.sendall(b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nabc")
        # A request that was begun before the signal, and is asked after it.
        waiting.putrequest("GET", "/health/ready")
        waiting.putheader("X-Half", "yes")
        assert waiting.sock
        waiting.sock.sendall(b"GET /health/ready HTTP/1.1\r\nHost: localhost\r\n")
        wait_until(lambda: server.metric("robustfeat_in_flight_requests") >= 2)
        server.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(OSError, http.client.HTTPException):
            waiting.sock.sendall(b"\r\n")
            response = http.client.HTTPResponse(waiting.sock)
            response.begin()
            assert response.status == 503
        slow.close()
        assert server.process.wait(20) == 0


def test_slow_and_silent_clients_are_cut(photos: list[bytes]) -> None:
    with serving("--timeout", 1) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as slow:
            slow.sendall(b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nabc")
            said = slow.recv(4096)
            assert b" 408 " in said
            assert b'"upload_timeout"' in said
            assert slow.recv(4096) == b""
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as silent:
            silent.sendall(b"POST /embed HTTP/1.1\r\nHost:")
            assert silent.recv(4096) == b""
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as endless:
            endless.sendall(b"GET / HTTP/1.1\r\n")
            with pytest.raises(OSError):  # noqa: PT011 - reset or broken pipe, as it comes
                for _ in range(1000):
                    endless.sendall(b"X-Header: " + b"x" * 10_000 + b"\r\n")
                    time.sleep(0.001)


def test_what_is_not_http_is_told_so(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(b"hello\r\n\r\n")
        said = client.recv(4096)
    assert said.startswith(b"HTTP/1.1 400 ")
    assert b'"bad_http"' in said


def test_too_many_connections_are_refused() -> None:
    with serving("--max-connections", 4) as server:
        idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(4)]
        with socket.create_connection(("127.0.0.1", server.port)) as fifth:
            said = fifth.recv(4096)
        assert said.startswith(b"HTTP/1.1 503 ")
        assert b'"too_many_connections"' in said
        for connection in idle:
            connection.close()
        wait_until(lambda: server.get("/health/live").status == 200)


def test_a_client_that_leaves_frees_its_place(photos: list[bytes]) -> None:
    with serving("--max-queue", 64) as server:
        (worker,) = server.workers()
        for decoder in children(worker):
            os.kill(decoder, signal.SIGSTOP)
        leaving = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(64)]
        head = f"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(photos[0])}\r\n\r\n"
        for client in leaving:
            client.sendall(head.encode() + photos[0])
        wait_until(lambda: server.post("/embed", photos[0]).status == 503)
        refusal = server.post("/embed", photos[0])
        assert (refusal.json["error"]["code"], refusal.headers["retry-after"]) == ("queue_full", "1")
        for client in leaving:
            client.close()
        wait_until(lambda: server.metric("robustfeat_in_flight_requests") <= 1)
        for decoder in children(worker):
            os.kill(decoder, signal.SIGCONT)
        assert server.post("/embed", photos[0]).status == 200
        assert not any("error" in line for line in server.said)


def test_answers_come_in_time_or_503(photos: list[bytes]) -> None:
    with serving("--timeout", 1) as server:
        (worker,) = server.workers()
        for decoder in children(worker):
            os.kill(decoder, signal.SIGSTOP)
        answer = server.post("/embed", photos[0])
        assert (answer.status, answer.json["error"]["code"]) == (503, "timeout")
        assert answer.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "nowhere/at/all"], "nowhere/at/all"),
        (["--model", "a=builtin", "--model", "a=builtin"], "each name once"),
        (["--model", "a/b=builtin"], "expected NAME=PLACE"),
        (["--head", "nowhere"], "nowhere"),
        (["--keys", "nowhere"], "--keys nowhere: No such file"),
        (["--host", "256.1.1.1"], "--host 256.1.1.1"),
        (["--max-queue", "1"], "raise --max-queue"),
        (["--precision", "int8", "--device", "cuda"], "cuda"),
    ],
)
def test_what_cannot_be_served_is_one_line(robustfeat: Run, options: list[str], said: str) -> None:
    result = robustfeat("serve", "--port", "0", *options)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert said in result.stderr


def test_a_head_of_another_model_is_refused_at_the_start(robustfeat: Run, clothes: Path, model: Path) -> None:
    result = robustfeat("serve", "--port", "0", "--head", clothes, "--model", model)
    assert result.returncode == 1
    assert "--head clothes: needs features of robustfeat-resnet18" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_port_that_is_taken_is_one_line(robustfeat: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = robustfeat("serve", "--port", port)
    assert result.returncode == 1
    assert f"--port {port}: Address already in use" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_scikit_learn_is_not_loaded_without_a_head() -> None:
    with serving() as server:
        (worker,) = server.workers()
        assert "sklearn" not in Path(f"/proc/{worker}/maps").read_text()
        supervisor = Path(f"/proc/{server.process.pid}/maps").read_text()
        assert "numpy" not in supervisor
