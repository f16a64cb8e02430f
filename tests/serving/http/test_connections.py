"""Connections: clients that are slow, silent, gone, endless, or speak something else."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import select
import signal
import socket
import threading
import time

import pytest

from robustfeat.serving.http.process import connection
from tests.serving.http.conftest import Server, all_of, anonymous_mib, children, head_of, serving, wait_until

PATIENCE = f"{connection.__name__}.PATIENCE_S"


def test_a_client_that_reads_nothing_is_cut() -> None:
    with serving(constants={PATIENCE: 1.0}) as server:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(("127.0.0.1", server.port))
        client.settimeout(0.2)
        with contextlib.suppress(OSError):
            client.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1400)
        wait_until(lambda: server.metric("robustfeat_in_flight_requests") == 2)
        wait_until(lambda: server.metric("robustfeat_in_flight_requests") == 1)
        client.close()


def test_a_client_that_leaves_after_a_large_body_is_noticed(photos: list[bytes]) -> None:
    with serving("--decode-timeout", 60) as server:
        (worker,) = server.workers()
        for decoder in children(worker):
            os.kill(decoder, signal.SIGSTOP)
        body = photos[0] + bytes(500_000)
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(head_of(body) + body)
            wait_until(lambda: server.metric("robustfeat_in_flight_requests") == 2)
        wait_until(lambda: server.metric("robustfeat_in_flight_requests") == 1)


def test_trailers_without_end_are_refused(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
        client.sendall(b"POST /embed HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n")
        said, sent = b"", 0
        try:
            while not said and sent < 50_000_000:
                client.sendall(b"a: b\r\n" * 200)
                sent += 1200
                if select.select([client], [], [], 0)[0]:
                    said = client.recv(4096)
        except (BrokenPipeError, ConnectionResetError):
            said = b"HTTP/1.1 431 "  # it hung up before its answer was read
    assert said.startswith(b"HTTP/1.1 431 ")
    assert sent < 10_000_000


@pytest.mark.parametrize(
    "field",
    [b"Host: elsewhere.example", b"X-Request-ID: forged", b"Accept: application/x-npy", b"Expect: 100-continue"],
)
def test_fields_behind_a_chunked_body_are_no_headers(server: Server, photos: list[bytes], field: bytes) -> None:
    head = b"POST /embed HTTP/1.1\r\nHost: localhost\r\nX-Request-ID: mine\r\nTransfer-Encoding: chunked\r\n\r\n"
    body = b"%x\r\n%s\r\n0\r\n%s\r\n\r\n" % (len(photos[0]), photos[0], field)
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
        for _ in range(2):
            client.sendall(head + body)
            answer = http.client.HTTPResponse(client)
            answer.begin()
            assert (answer.status, answer.headers["x-request-id"]) == (200, "mine")
            assert answer.headers["content-type"] == "application/json"
            answer.read()


def test_a_head_is_bounded(server: Server) -> None:
    for size, status in ((60_000, 200), (70_000, 431), (200_000, 431)):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
            client.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nX: %s\r\n\r\n" % (b"x" * size))
            assert client.recv(4096).startswith(b"HTTP/1.1 %d " % status)


@pytest.mark.parametrize("name", [b"Upgrade", b"UPGRADE", b"uPgRaDe"])
def test_an_offer_of_http_2_is_passed_over_every_time(server: Server, photos: list[bytes], name: bytes) -> None:
    more = b"Connection: Upgrade, HTTP2-Settings\r\n" + name + b": h2c\r\nHTTP2-Settings: A\r\n\r\n"
    head = head_of(photos[0])[:-2] + more
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
        # In one piece, apart, and cut within the name.
        for cut in (0, len(head), head.index(name) + 3, len(head) - 1):
            client.sendall((head + photos[0])[:cut])
            time.sleep(0.02 if cut else 0)
            client.sendall((head + photos[0])[cut:])
            answer = http.client.HTTPResponse(client)
            answer.begin()
            assert answer.status == 200
            answer.read()


def test_slow_and_silent_clients_are_cut(photos: list[bytes]) -> None:
    with serving("--timeout", 0.5, constants={PATIENCE: 1.0}) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as slow:
            slow.sendall(b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nabc")
            said = all_of(slow)
            assert b" 408 " in said
            assert b'"upload_timeout"' in said
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as silent:
            silent.sendall(b"POST /embed HTTP/1.1\r\nHost:")
            assert silent.recv(4096) == b""
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as endless:
            endless.sendall(b"GET / HTTP/1.1\r\n")
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                for _ in range(1000):
                    endless.sendall(b"X-Header: " + b"x" * 10_000 + b"\r\n")
                    time.sleep(0.001)


def test_what_is_not_http_is_told_so(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(b"hello\r\n\r\n")
        said = all_of(client)
    assert said.startswith(b"HTTP/1.1 400 ")
    assert b'"bad_http"' in said


def test_too_many_connections_are_refused_but_idle_ones_make_room(photos: list[bytes]) -> None:
    with serving("--max-connections", 4) as server:
        idle = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(4)]
        idle[1].sendall(b"POST /embed HT")
        for place in range(5):  # new ones, one whose head does not end, and those that were used before
            idle.append(socket.create_connection(("127.0.0.1", server.port), timeout=20))
            idle[-1].sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = http.client.HTTPResponse(idle[-1])  # whose head and body may come apart
            answer.begin()
            assert (answer.status, answer.read()) == (200, b'{"status":"live"}')
            assert idle[place].recv(4096) == b""
        for client in idle:
            client.close()
        busy = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(4)]
        for client in busy:
            client.sendall(head_of(photos[0])[:-2] + b"Expect: 100-continue\r\n\r\n")
            assert client.recv(4096).startswith(b"HTTP/1.1 100 ")
        with socket.create_connection(("127.0.0.1", server.port)) as fifth:
            said = all_of(fifth)
        assert said.startswith(b"HTTP/1.1 503 ")
        assert b'"too_many_connections"' in said
        for client in busy:
            client.sendall(photos[0])
            assert client.recv(4096).startswith(b"HTTP/1.1 200 ")
        assert server.get("/health/live").status == 200
        for client in busy:
            client.close()


def test_slow_bodies_make_room_for_new_connections(photos: list[bytes]) -> None:
    with serving("--max-connections", 3, constants={f"{connection.__name__}.SLOW_S": 0.5}) as server:
        slow = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(3)]
        for client in slow:
            client.sendall(head_of(photos[0]) + photos[0][:1000])
        wait_until(lambda: server.get("/health/live").status == 200)
        assert slow[0].recv(4096) == b""
        for client in slow[1:]:  # the oldest went, and its place is free
            client.sendall(photos[0][1000:])
            assert client.recv(4096).startswith(b"HTTP/1.1 200 ")
        for client in slow:
            client.close()


def test_requests_that_nobody_answered_yet_are_bounded(server: Server) -> None:
    (worker,) = server.workers()
    request, count = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n", 10_000
    answer, answers, end = b'{"status":"live"}', 0, b""
    before = highest = anonymous_mib(worker)
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
        writer = threading.Thread(target=client.sendall, args=(request * count,))
        writer.start()
        while answers < count:
            part = client.recv(2**16)
            assert part
            answers += (end + part).count(answer)
            end = part[-len(answer) + 1 :]
            highest = max(highest, anonymous_mib(worker))
        writer.join()
    assert answers == count
    assert highest - before < 20


def test_requests_behind_one_another_are_answered_in_order(server: Server) -> None:
    """More than are taken at once, with bodies of all sizes, in pieces of all sizes."""
    heads = [
        f"POST /nothing HTTP/1.1\r\nHost: localhost\r\nX-Request-ID: n{n}\r\nContent-Length: {n * 37}\r\n\r\n"
        for n in range(150)
    ]
    said = b"".join(head.encode() + bytes(n * 37) for n, head in enumerate(heads))
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:

        def write() -> None:
            for at in range(0, len(said), 5000):
                client.sendall(said[at : at + 5000])

        writer = threading.Thread(target=write)
        writer.start()
        answers = b""
        while answers.count(b"HTTP/1.1 404 ") < len(heads) or not answers.endswith(b"}"):
            answers += client.recv(2**16)
        writer.join()
    assert re.findall(rb"x-request-id: n(\d+)", answers) == [b"%d" % n for n in range(len(heads))]


def test_a_client_that_leaves_frees_its_place(photos: list[bytes]) -> None:
    with serving("--max-queue", 64) as server:
        (worker,) = server.workers()
        for decoder in children(worker):
            os.kill(decoder, signal.SIGSTOP)
        leaving = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(64)]
        for client in leaving:
            client.sendall(head_of(photos[0]) + photos[0])
        wait_until(lambda: server.metric("robustfeat_in_flight_requests") >= 65)
        refusal = server.post("/embed", photos[0])
        assert (refusal.json["error"]["code"], refusal.headers["retry-after"]) == ("queue_full", "1")
        for client in leaving:
            client.close()
        wait_until(lambda: server.metric("robustfeat_in_flight_requests") <= 1)
        for decoder in children(worker):
            os.kill(decoder, signal.SIGCONT)
        assert server.post("/embed", photos[0]).status == 200
        assert not any("error" in line for line in server.said)
