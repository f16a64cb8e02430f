"""How `robustfeat serve` behaves under load, beside `robustfeat embed`, calls in one process, and LitServe.

    python benchmarks/serve.py --photos FOLDER --out serve.json
    python benchmarks/serve.py --photos FOLDER --model FOLDER --engine openvino --precision int8 --only lone,saturation

Server, `embed` and calls in process have one core, the client another. Arrivals are constant: a request is sent when
its time has come, whether earlier ones are answered or not, and its latency counts from that time.

- lone: one client that waits for each answer, in turns with the same photographs in one process.
- saturation: 32 requests at hand at any time, beside the steady rate of the command `embed`; raw bytes to /embed,
  base64 in JSON to /v1/embeddings, and raw bytes of which 1 % are no images, in turns.
- steady: arrivals at 70 % of the rate at saturation.
- overload: arrivals at three times that rate.
- keys: two keys. One sends 15 % of the rate at saturation; the other is silent, sends its share (15 %, too), or ten
  times its share.
- peers: LitServe with the same network and base64 in JSON, one image at a time and in batches; it is run by
  `--peers-python`, an interpreter that has it.
- torchserve: TorchServe with the archive of `robustfeat torchserve`, and `robustfeat serve` beside it, raw bytes
  to both; `--torchserve-python` has this package and its extra torchserve.

Each section is measured `--rounds` times, all sections in turn; tables give medians and ranges of the ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import itertools
import json
import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import uvloop

from embed import print_table
from load import Client, Result, ask_alone, post
from machine import hardware
from robustfeat.hub.catalog import resolve_model
from robustfeat.serving.extractor import FeatureExtractor

SECTIONS = ("lone", "saturation", "steady", "overload", "keys", "peers", "torchserve")
SERVER_CORE, CLIENT_CORE = 0, 1
CONNECTIONS = 32
LITSERVE = Path(__file__).parent / "peers" / "litserve_server.py"
SHARE = 0.15
TORCHSERVE_PORT = 18080
JVM_WARM_S = 15
"""Until Java has compiled what it runs: before, TorchServe answers a quarter fewer."""
JSON = "Content-Type: application/json\r\n"


def raw(photo: bytes, key: str = "") -> bytes:
    return post("/embed", photo, f"Authorization: Bearer {key}\r\n" if key else "")


def openai(photo: bytes) -> bytes:
    uri = "data:image/jpeg;base64," + base64.b64encode(photo).decode()
    body = json.dumps({"input": uri, "model": "robustfeat", "encoding_format": "base64"}).encode()
    return post("/v1/embeddings", body, JSON)


@contextlib.contextmanager
def server(command: list[str], environment: dict[str, str] | None = None) -> Iterator[int]:
    """Runs a server on its core; its port."""
    process = subprocess.Popen(
        ["taskset", "-c", str(SERVER_CORE), *command],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    try:
        assert process.stderr
        said = ""
        for line in process.stderr:
            said += line
            if found := re.search(r"http://\S+?:(\d+)", line):
                yield int(found[1])
                break
        else:
            raise RuntimeError(said)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def children_megabytes() -> float:
    """Memory of all processes that this one started, and theirs; what several share is divided among them."""
    found, total = [os.getpid()], 0.0
    for pid in found:
        for file in Path(f"/proc/{pid}/task").glob("*/children"):
            found += map(int, file.read_text().split())
    for pid in found[1:]:
        with contextlib.suppress(OSError):
            (share,) = re.findall(r"^Pss: *(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
            total += int(share) / 1024
    return total


class Bench:
    """A model, photographs, and what was measured."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.options, self.scratch = options, scratch
        self.folder = resolve_model(options.model)
        self.photos = sorted(f.resolve() for f in options.photos.iterdir() if f.suffix.lower() in {".jpg", ".jpeg"})
        self.bytes = [photo.read_bytes() for photo in self.photos]
        self.way = [f"--{name}={getattr(options, name)}" for name in ("model", "engine", "precision", "device")]
        self.requests = [raw(photo) for photo in self.bytes]
        self.rates: dict[str, list[float]] = {}
        self.missing: list[dict[str, str]] = []

    def note(self, name: str, value: float) -> float:
        self.rates.setdefault(name, []).append(value)
        print(f"{name}: {value:.2f}", file=sys.stderr, flush=True)
        return value

    def serve(self, *more: str, environment: dict[str, str] | None = None) -> contextlib.AbstractContextManager[int]:
        model = f"--model=robustfeat={self.options.model}"
        command = [sys.executable, "-m", "robustfeat", "serve", "--port=0", model, *self.way[1:], *more]
        return server(command, environment)

    def embed_rate(self) -> float:
        """The command's steady rate on the server's core."""
        whole = len(self.photos)
        counts = {"short": whole, "long": whole * max(2, round(self.options.images / whole))}
        seconds = {}
        for name, count in counts.items():
            folder = self.scratch / name
            if not folder.exists():
                folder.mkdir()
                for number in range(count):
                    (folder / f"{number:07}.jpg").symlink_to(self.photos[number % whole])
            command = ["taskset", "-c", str(SERVER_CORE), sys.executable, "-m", "robustfeat", "embed", str(folder)]
            command += [*self.way, f"--out={self.scratch / 'feats.npy'}", "--quiet"]
            began = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds[name] = time.perf_counter() - began
        return float((counts["long"] - counts["short"]) / (seconds["long"] - seconds["short"]))

    async def lone(self) -> None:
        """p50 of one client and of calls in process, in turns of all photographs."""
        way = [text.partition("=")[2] for text in self.way]
        command = ["taskset", "-c", str(SERVER_CORE), sys.executable, __file__, "--in-process"]
        command += [*way, *map(str, self.photos)]
        apart = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        assert apart.stdin
        assert apart.stdout
        inside: list[float] = []
        outside = Result(0)
        with self.serve() as port, socket.create_connection(("127.0.0.1", port)) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for turn in range(7):
                apart.stdin.write(b"go\n")
                calls = json.loads(await apart.stdout.readline())
                found = [ask_alone(client, request) for request in self.requests]
                if turn:  # the first warms both
                    inside += calls
                    for status, seconds in found:
                        outside.add(status, seconds)
        apart.stdin.close()
        await apart.wait()
        a = self.note("lone: p50 over HTTP, ms", outside.quantile(0.5))
        b = self.note("lone: p50 in process, ms", 1000 * statistics.median(inside))
        self.note("lone: ratio", a / b)

    async def saturation(self) -> None:
        spoilt = [raw(data) for data in (self.bytes[0][: len(self.bytes[0]) // 2], b"no image\n")]
        mixed = [
            spoilt[n // 100 % 2] if n % 100 == 99 else r for n, r in zip(range(9600), itertools.cycle(self.requests))
        ]
        kinds = {"raw": self.requests, "base64": [openai(photo) for photo in self.bytes], "1 % corrupt": mixed}
        goodput: dict[str, list[float]] = {kind: [] for kind in kinds}
        with self.serve() as port:
            client = Client(port)
            await client.closed(self.requests, CONNECTIONS, 2)
            for _ in range(4):  # in turns, since the machine is not always equally fast
                for kind, requests in kinds.items():
                    result = await client.closed(requests, CONNECTIONS, self.options.seconds / 2)
                    goodput[kind].append(result.goodput)
        whole = self.note("embed, images/s", self.embed_rate())
        rates = {kind: statistics.mean(values) for kind, values in goodput.items()}
        for kind, rate in rates.items():
            self.note(f"{kind}, images/s", rate)
        self.note("raw / embed", rates["raw"] / whole)
        self.note("base64 / embed", rates["base64"] / whole)
        self.note("1 % corrupt / clean", rates["1 % corrupt"] / 0.99 / rates["raw"])

    def peak(self) -> float:
        found = self.rates.get("raw, images/s")
        if not found:
            raise SystemExit("these sections need saturation before them")
        return found[-1]

    async def steady(self) -> None:
        with self.serve() as port:
            client = Client(port)
            await client.closed(self.requests, CONNECTIONS, 2)
            result = await client.open(self.requests, 0.7 * self.peak(), 2 * self.options.seconds)
        a, b = result.quantile(0.5), result.quantile(0.99)
        self.note("70 %: p50, ms", a)
        self.note("70 %: p99, ms", b)
        self.note("70 %: p99 / p50", b / a)
        self.note("70 %: not answered well", sum(len(v) for s, v in result.latencies.items() if s != 200))

    async def overload(self) -> None:
        with self.serve() as port:
            client = Client(port)
            peak = (await client.closed(self.requests, CONNECTIONS, self.options.seconds)).goodput
            result = await client.open(self.requests, 3 * peak, self.options.seconds)
        refused = [status for status in result.latencies if status != 200]
        self.note("3 x overload: goodput / peak", result.goodput / peak)
        self.note("3 x overload: refusals, p50 ms", result.quantile(0.5, *refused))
        self.note("3 x overload: refusals, p99 ms", result.quantile(0.99, *refused))
        self.note("3 x overload: answers, p99 ms", result.quantile(0.99))
        print(Counter({s: len(v) for s, v in result.latencies.items()}), file=sys.stderr)

    async def keys(self) -> None:
        rate = SHARE * self.peak()
        environment = {"ROBUSTFEAT_API_KEYS": f"bulk bulk-key-1 rate={rate:.0f},team team-key-1"}
        mine = [raw(photo, "team-key-1") for photo in self.bytes]
        theirs = [raw(photo, "bulk-key-1") for photo in self.bytes]
        seconds, quiet = 2 * self.options.seconds, {}
        with self.serve(environment=environment) as port:
            client, other = Client(port), Client(port)
            await client.closed(mine, 4, 2)
            for name, times in {"silent": 0, "at its share": 1, "at ten times its share": 10}.items():
                loads = [client.open(mine, rate, seconds)]
                if times:
                    loads.append(other.open(theirs, times * rate, seconds))
                results = await asyncio.gather(*loads)
                quiet[name] = results[0].quantile(0.99)
                self.note(f"the other key {name}: p50, ms", results[0].quantile(0.5))
                self.note(f"the other key {name}: p99, ms", quiet[name])
                if times:
                    print({s: len(v) for s, v in results[1].latencies.items()}, file=sys.stderr)
        self.note("p99, ten times / at its share", quiet["at ten times its share"] / quiet["at its share"])
        self.note("p99, ten times / silent", quiet["at ten times its share"] / quiet["silent"])

    async def measure(self, name: str, client: Client, requests: Sequence[bytes], warm_s: float = 2) -> None:
        """What is measured of every peer."""
        seconds = self.options.seconds
        await client.closed(requests, CONNECTIONS, warm_s)
        peak = self.note(f"{name}: images/s", (await client.closed(requests, CONNECTIONS, seconds)).goodput)
        alone = await client.closed(requests, 1, seconds)
        self.note(f"{name}: lone p50, ms", alone.quantile(0.5))
        steady = await client.open(requests, 0.7 * peak, seconds)
        self.note(f"{name}: 70 %: p99 / p50", steady.quantile(0.99) / steady.quantile(0.5))
        over = await client.open(requests, 3 * peak, seconds)
        self.note(f"{name}: 3 x overload: goodput / peak", over.goodput / peak)
        self.note(f"{name}: 3 x overload: answers, p99 ms", over.quantile(0.99))

    async def torchserve(self) -> None:
        store = self.scratch / "store"
        command = [self.options.torchserve_python, "-m", "robustfeat", "torchserve", self.options.model, *self.way[1:]]
        command += [f"--out={store}", "--name=robustfeat", f"--port={TORCHSERVE_PORT}", "--run"]
        began = time.perf_counter()
        with server(command) as port:
            self.note("TorchServe: s from start to ready", time.perf_counter() - began)
            token = json.loads((store / "key_file.json").read_text())["inference"]["key"]
            headers = f"Content-Type: image/jpeg\r\nAuthorization: Bearer {token}\r\n"
            requests = [post("/predictions/robustfeat", photo, headers) for photo in self.bytes]
            await self.measure("TorchServe", Client(port), requests, JVM_WARM_S)
            self.note("TorchServe: memory, MB", children_megabytes())
        began = time.perf_counter()
        with self.serve() as port:
            self.note("robustfeat serve: s from start to ready", time.perf_counter() - began)
            await self.measure("robustfeat serve", Client(port), self.requests, JVM_WARM_S)
            self.note("robustfeat serve: memory, MB", children_megabytes())
        rates = (self.rates[f"{name}: images/s"][-1] for name in ("TorchServe", "robustfeat serve"))
        self.note("TorchServe / robustfeat serve", next(rates) / next(rates))

    async def peers(self) -> None:
        contract = self.folder.config.preprocessing
        requests = [
            post("/embed", json.dumps({"image": base64.b64encode(photo).decode()}).encode(), JSON)
            for photo in self.bytes
        ]
        for name, batch in {"LitServe": 1, "LitServe, batches": 16}.items():
            command = [self.options.peers_python, str(LITSERVE), f"--onnx={self.folder.onnx('fp32')}", "--port=8765"]
            command += [f"--side={contract.image_size}", "--mean", *map(str, contract.mean), "--std"]
            command += [*map(str, contract.std), f"--batch={batch}"]
            process = subprocess.Popen(
                ["taskset", "-c", str(SERVER_CORE), *command],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                client = Client(8765)
                for _ in range(150):
                    with contextlib.suppress(OSError):
                        if (await client.ask(requests[0]))[0] == 200:
                            break
                    await asyncio.sleep(0.2)
                else:
                    self.missing.append({"what": name, "why": "it did not answer"})
                    continue
                await self.measure(name, client, requests)
            finally:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def in_process(model: str, engine: str, precision: str, device: str, photos: list[str]) -> None:
    """Embeds all photographs, one at a time, whenever a line comes in."""
    extractor = FeatureExtractor.from_pretrained(model, engine=engine, precision=precision, device=device, threads=1)
    images = [Path(photo).read_bytes() for photo in photos]
    for _ in sys.stdin:
        seconds = []
        for image in images:
            began = time.perf_counter()
            extractor.embed([image])
            seconds.append(time.perf_counter() - began)
        print(json.dumps(seconds), flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--in-process"]:
        model, engine, precision, device, *photos = sys.argv[2:]
        in_process(model, engine, precision, device, photos)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, metavar="FOLDER", help="of JPEGs")
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--engine", default="onnxruntime")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default=",".join(SECTIONS), metavar="SECTION,...", help=", ".join(SECTIONS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each load")
    parser.add_argument("--images", type=int, default=2400, help="that `embed` gets")
    parser.add_argument("--peers-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--torchserve-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    sections = [name for name in SECTIONS if name in options.only.split(",")]
    if len(os.sched_getaffinity(0)) < 2:
        parser.error("needs two cores: one for the server, one for the client")
    os.sched_setaffinity(0, {CLIENT_CORE})
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options, Path(scratch))
        for number in range(options.rounds):
            for section in sections:
                print(f"round {number + 1}: {section}", file=sys.stderr, flush=True)
                with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                    runner.run(getattr(bench, section)())
    rows = [
        {"what": name, "median": f"{statistics.median(v):.2f}", "range": f"{min(v):.2f} to {max(v):.2f}"}
        for name, v in bench.rates.items()
    ]
    print_table(
        f"{options.model}, {options.engine} {options.precision} on {options.device}, {options.rounds} rounds", rows
    )
    report = {
        "hardware": hardware(),
        "python": platform.python_version(),
        "arguments": {name: str(value) for name, value in vars(options).items()},
        "rates": bench.rates,
        "missing": bench.missing,
    }
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
