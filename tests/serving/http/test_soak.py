"""Half an hour of all that clients and attackers do, at once; ROBUSTFEAT_SOAK_MINUTES=N for another time."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import random
import signal
import socket
import statistics
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from robustfeat import FeatureExtractor
from tests.serving.http.conftest import Server, anonymous_mib, blank_webp, children, form_of, serving
from tests.serving.http.test_embed import bomb

GOOD, BULK = "good-key-1", "bulk-key-1"
CONNECTIONS = 200
KEYS_READ = ("keys left as they were", "keys read again")
MINUTES = float(os.environ.get("ROBUSTFEAT_SOAK_MINUTES", "30"))


class Soak:
    """Clients of all kinds, each with random numbers of its own."""

    def __init__(self, server: Server, photos: list[bytes], expected: NDArray[np.float32]) -> None:
        self.server, self.photos, self.expected = server, photos, expected
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=self.run, args=(kind, seed)) for seed, kind in enumerate(self.kinds())]

    def kinds(self) -> list[Callable[[random.Random], None]]:
        """What goes on at once."""
        return [self.good, self.good, self.form, self.openai, self.infer, self.corrupt, self.huge, self.slow, self.cut]

    def run(self, kind: Callable[[random.Random], None], seed: int) -> None:
        numbers = random.Random(seed)
        while not self.stop.is_set():
            try:
                kind(numbers)
                self.counts[kind.__name__] += 1
            except Exception as exc:
                self.wrong.append(f"{kind.__name__}: {exc!r}")
            time.sleep(numbers.random() * 0.05)

    def check(self, at: int, found: object) -> None:
        np.testing.assert_allclose(np.asarray(found, np.float32), self.expected[at], rtol=1e-3, atol=1e-4)

    def good(self, numbers: random.Random) -> None:
        at = numbers.randrange(len(self.photos))
        answer = self.server.post("/embed", self.photos[at])
        assert answer.status == 200, answer.body
        self.check(at, answer.json["data"][0]["embedding"])

    def form(self, numbers: random.Random) -> None:
        places = [numbers.randrange(len(self.photos)) for _ in range(numbers.randint(1, 12))]
        images = [
            self.photos[at] if numbers.random() < 0.8 else self.photos[at][: numbers.randrange(2000)] for at in places
        ]
        answer = self.server.form("/embed", images, accept="application/octet-stream")
        if answer.status == 422:
            assert all(len(image) < 2000 for image in images)
            return
        assert answer.status == 200, answer.body
        for at, image, row in zip(places, images, np.frombuffer(answer.body, "<f4").reshape(-1, 512), strict=True):
            if len(image) < 2000:
                assert np.isnan(row).all()
            else:
                self.check(at, row)

    def openai(self, numbers: random.Random) -> None:
        at = numbers.randrange(len(self.photos))
        uri = "data:image/jpeg;base64," + base64.b64encode(self.photos[at]).decode()
        answer = self.server.post("/v1/embeddings", {"input": uri, "encoding_format": "base64"})
        assert answer.status == 200, answer.body
        self.check(at, np.frombuffer(base64.b64decode(answer.json["data"][0]["embedding"]), "<f4"))

    def infer(self, numbers: random.Random) -> None:
        at = numbers.randrange(len(self.photos))
        given = {"name": "images", "datatype": "BYTES", "shape": [1]}
        given["data"] = [base64.b64encode(self.photos[at]).decode()]
        answer = self.server.post("/v2/models/robustfeat/infer", {"inputs": [given]})
        assert answer.status == 200, answer.body
        self.check(at, answer.json["outputs"][0]["data"])

    def corrupt(self, numbers: random.Random) -> None:
        photo = bytearray(numbers.choice(self.photos))
        kind = numbers.randrange(3)
        if kind == 0:
            photo = photo[: numbers.randrange(1, 2000)]
        elif kind == 1:
            photo = bytearray(numbers.randbytes(5000))
        else:
            for _ in range(50):  # may still be an image
                photo[numbers.randrange(len(photo))] = numbers.randrange(256)
        status = self.server.post("/embed", bytes(photo)).status
        assert status == 422 or (kind == 2 and status == 200), status

    def huge(self, numbers: random.Random) -> None:
        kind = numbers.randrange(4)
        if kind == 0:
            assert self.server.post("/embed", bomb(40_000, 40_000)).status == 422
        elif kind == 1:
            assert self.server.post("/embed", bytes(20_000_000)).status == 422
        elif kind == 2:
            picture = io.BytesIO()
            Image.effect_noise((3000, 3000), 50).save(picture, "JPEG")
            assert self.server.post("/embed", picture.getvalue()).status == 200
        else:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it hung up
                assert self.server.post("/embed", bytes(40_000_000)).status == 413
        time.sleep(0.5)

    def slow(self, numbers: random.Random) -> None:
        at = numbers.randrange(len(self.photos))
        photo = self.photos[at]
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=30) as client:
            client.sendall(self.head(photo, self.credentials(GOOD)))
            step = len(photo) // 10 + 1
            for first in range(0, len(photo), step):
                client.sendall(photo[first : first + step])
                time.sleep(0.1)
            answer = http.client.HTTPResponse(client)
            answer.begin()
            assert answer.status == 200
            self.check(at, json.loads(answer.read())["data"][0]["embedding"])

    def cut(self, numbers: random.Random) -> None:
        photo = numbers.choice(self.photos)
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=30) as client:
            if numbers.random() < 0.5:
                client.sendall(self.head(photo, self.credentials(GOOD)) + photo[: numbers.randrange(len(photo))])
            else:
                body, kind = form_of([photo] * 4)
                more = f"{self.credentials(GOOD)}Content-Type: {kind}\r\n"
                client.sendall(self.head(body, more) + body)
                time.sleep(numbers.random() * 0.02)

    @staticmethod
    def credentials(key: str) -> str:
        return f"Authorization: Bearer {key}\r\n"

    @staticmethod
    def head(body: bytes, more: str = "") -> bytes:
        return f"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n{more}\r\n".encode()


class Attacks(Soak):
    """The same clients under one key, and all that an enemy does without a key or under another one.

    Args:
        keys: the server's file of keys.
    """

    def __init__(self, server: Server, photos: list[bytes], expected: NDArray[np.float32], keys: Path) -> None:
        self.keys = keys
        self.idle: deque[socket.socket] = deque(maxlen=2 * CONNECTIONS)
        super().__init__(server, photos, expected)

    def kinds(self) -> list[Callable[[random.Random], None]]:
        attacks = [self.odd_bodies, self.pipelined, self.idle_connections, self.bombs, self.unfinished]
        return [*super().kinds(), *attacks, self.trailers, self.upgrades, self.hurt_decoders, self.odd_keys]

    def odd_bodies(self, numbers: random.Random) -> None:
        count = 4 * 2**20
        pixels = b'{"name":"images","datatype":"BYTES","shape":[1],'
        binary = b'{"inputs":[%s"parameters":{"binary_data_size":%d}}]}' % (pixels, count)
        path, body, headers = [
            (
                "/embed",
                b"--b\r\n\r\n\r\n" * (count // 9) + b"--b--\r\n",
                {"content-type": "multipart/form-data; boundary=b"},
            ),
            ("/v2/models/robustfeat/infer", b'{"inputs":[%s"data":[""%s]}]}' % (pixels, b',""' * (count // 3)), {}),
            (
                "/v2/models/robustfeat/infer",
                binary + bytes(count),
                {"inference-header-content-length": str(len(binary))},
            ),
            ("/v1/embeddings", b'{"input":[""%s]}' % (b',""' * (count // 3)), {}),
        ][numbers.randrange(4)]
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before the body
            status = self.server.ask("POST", path, body, {"authorization": f"Bearer {BULK}", **headers}).status
            assert status in {400, 413, 422, 429, 503}, (path, status)
        time.sleep(0.5)

    def pipelined(self, numbers: random.Random) -> None:
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=30) as client:
            count = 2000
            writer = threading.Thread(
                target=send, args=(client, b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n" * count)
            )
            writer.start()
            with contextlib.suppress(OSError):
                while client.recv(2**16) and numbers.random() < 0.99:
                    pass
        writer.join()
        time.sleep(0.5)

    def idle_connections(self, numbers: random.Random) -> None:
        with contextlib.suppress(OSError):
            client = socket.create_connection(("127.0.0.1", self.server.port), timeout=30)
            client.sendall(b"POST /embed HTTP/1.1\r\nHost"[: numbers.randrange(30)])
            if len(self.idle) == self.idle.maxlen:
                self.idle.popleft().close()
            self.idle.append(client)

    def bombs(self, numbers: random.Random) -> None:
        answer = self.server.form("/embed", [blank_webp(5500, 5500)] * 4, authorization=f"Bearer {BULK}")
        assert answer.status in {200, 422, 429, 503}, answer.body

    def unfinished(self, numbers: random.Random) -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(8):
                client = stack.enter_context(socket.create_connection(("127.0.0.1", self.server.port), timeout=30))
                head = f"POST /embed HTTP/1.1\r\nHost: localhost\r\n{self.credentials(BULK)}"
                send(client, f"{head}Content-Length: {32 * 2**20}\r\n\r\n".encode() + bytes(2**20))
            time.sleep(2)

    def trailers(self, numbers: random.Random) -> None:
        at = numbers.randrange(len(self.photos))
        photo = self.photos[at]
        field = numbers.choice([b"Host: elsewhere.example", b"Authorization: Bearer none", b"Accept: image/png"])
        head = f"POST /embed HTTP/1.1\r\nHost: localhost\r\n{self.credentials(GOOD)}Transfer-Encoding: chunked\r\n\r\n"
        self.ask(at, head.encode() + b"%x\r\n%s\r\n0\r\n%s\r\n\r\n" % (len(photo), photo, field))

    def upgrades(self, numbers: random.Random) -> None:
        at = numbers.randrange(len(self.photos))
        name = "".join(numbers.choice([letter, letter.upper()]) for letter in "upgrade")
        head = self.head(self.photos[at], f"{self.credentials(GOOD)}Connection: Upgrade\r\n{name}: h2c\r\n")
        self.ask(at, head + self.photos[at])

    def ask(self, at: int, said: bytes) -> None:
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=30) as client:
            client.sendall(said)
            answer = http.client.HTTPResponse(client)
            answer.begin()
            body = answer.read()
            assert answer.status == 200, body
            self.check(at, json.loads(body)["data"][0]["embedding"])

    def hurt_decoders(self, numbers: random.Random) -> None:
        (worker,) = self.server.workers()
        with contextlib.suppress(ProcessLookupError, IndexError):  # it is being replaced
            os.kill(numbers.choice(children(worker)), numbers.choice([signal.SIGSTOP, signal.SIGKILL]))
        time.sleep(5)

    def odd_keys(self, numbers: random.Random) -> None:
        right, odd = self.keys.with_suffix(".right"), self.keys.with_suffix(".odd")
        right.write_bytes(self.keys.read_bytes())
        os.mkfifo(odd)
        odd.replace(self.keys)
        time.sleep(3)
        right.replace(self.keys)
        time.sleep(3)


def send(client: socket.socket, said: bytes) -> None:
    with contextlib.suppress(OSError):  # it hung up
        client.sendall(said)


@pytest.mark.slow
@pytest.mark.parametrize("attacked", [False, True])
def test_mixed_load_leaves_nothing_behind(example_files: list[Path], tmp_path: Path, attacked: bool) -> None:
    photos = [file.read_bytes() for file in example_files]
    expected = FeatureExtractor.from_pretrained().embed(photos)
    memory: list[float] = []
    keys = tmp_path / "keys"
    keys.write_text(f"good {GOOD}\nbulk {BULK}\n")
    options = ("--keys", keys, "--max-connections", CONNECTIONS, "--decode-timeout", 3) if attacked else ()
    with serving(*options, new=True) as server:
        (worker,) = server.workers()
        server.headers["authorization"] = f"Bearer {GOOD}"
        soak = Attacks(server, photos, expected, keys) if attacked else Soak(server, photos, expected)
        for thread in soak.threads:
            thread.start()
        end = time.monotonic() + 60 * MINUTES
        while time.monotonic() < end:
            time.sleep(1)
            memory.append(anonymous_mib(server.process.pid))
            assert server.get("/health/ready").status == 200
        soak.stop.set()
        for thread in soak.threads:
            thread.join()
        if isinstance(soak, Attacks):
            for client in soak.idle:
                client.close()
        time.sleep(2)
        files = len(list(Path(f"/proc/{worker}/fd").iterdir()))
        third = len(memory) // 3
        before, after = (statistics.median(part) for part in (memory[third // 3 : third], memory[-third:]))
        print(f"\n{dict(soak.counts)}; MiB {before:.0f} then {after:.0f}, peak {max(memory):.0f}; {files} files open")
        assert not soak.wrong, soak.wrong[:5]
        assert server.workers() == [worker]
        assert server.get("/health/ready").status == 200
        assert server.metric("robustfeat_in_flight_requests") == 1
        assert files < 100
        assert after <= 1.1 * before
        assert {line["event"] for line in server.logged()} <= set(KEYS_READ if attacked else ())
