"""Half an hour of everything that clients do, at once; ROBUSTFEAT_SOAK_MINUTES=N for another time."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import random
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from robustfeat import FeatureExtractor
from tests.serving.http.conftest import Server, anonymous_mib, form_of, serving
from tests.serving.http.test_embed import bomb

MINUTES = float(os.environ.get("ROBUSTFEAT_SOAK_MINUTES", "30"))


class Soak:
    """Clients of all kinds, each with random numbers of its own."""

    def __init__(self, server: Server, photos: list[bytes], expected: NDArray[np.float32]) -> None:
        self.server, self.photos, self.expected = server, photos, expected
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.stop = threading.Event()
        kinds = [self.good, self.good, self.form, self.openai, self.infer, self.corrupt, self.huge, self.slow, self.cut]
        self.threads = [threading.Thread(target=self.run, args=(kind, seed)) for seed, kind in enumerate(kinds)]

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
            client.sendall(self.head(photo))
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
                client.sendall(self.head(photo) + photo[: numbers.randrange(len(photo))])
            else:
                body, kind = form_of([photo] * 4)
                client.sendall(self.head(body, f"Content-Type: {kind}\r\n") + body)
                time.sleep(numbers.random() * 0.02)

    @staticmethod
    def head(body: bytes, more: str = "") -> bytes:
        return f"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n{more}\r\n".encode()


@pytest.mark.slow
def test_mixed_load_leaves_nothing_behind(example_files: list[Path]) -> None:
    photos = [file.read_bytes() for file in example_files]
    expected = FeatureExtractor.from_pretrained().embed(photos)
    memory: list[float] = []
    with serving(new=True) as server:
        (worker,) = server.workers()
        soak = Soak(server, photos, expected)
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
        assert not server.logged()
