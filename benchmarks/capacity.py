"""How many replicas a rate of requests needs: a simulation of `robustfeat serve`, with times measured here.

    python benchmarks/capacity.py measure --photos FOLDER --out times.json
    python benchmarks/capacity.py validate times.json --photos FOLDER
    python benchmarks/capacity.py predict --rate 10,100,1000,10000 --p99 100

- measure: the processor time of decoding each photograph and of batches of the network, alone; and of the server, the
  rate at saturation, and processor time, p50 and variation of a lone client's requests. The costs of HTTP and of
  messages to decoders are those that explain the rate and the processor time. A constant makes up for the rest of p50.
- validate: p50 and p99 at 50, 70 and 90 % of the rate at saturation, measured and simulated. Requests arrive by chance
  (Poisson), and the simulated ones at the same moments as the real ones. The server is measured before and
  after each load, since a machine's speed drifts: the simulation takes the mean of both.
- predict: the replicas that keep p99 below a limit, of one processor each, behind a balancer that sends to each in
  turn (`round-robin`) or by chance (`random`), when requests arrive by chance (Poisson). Without TIMES.json it takes
  the figures of docs/embedding.md and docs/serving.md.

A replica has one event loop, decoder processes and a model thread, which share its processors equally. A batch forms
while the model is busy with the batch before; a decoder takes up to four images that wait. This is what
robustfeat/serving/online/batching.py does. Needs two processors: one for the server, one for the client.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import os
import random
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from load import Client
from machine import hardware, processes
from robustfeat.hub.preprocessing import normalise, prepare_square
from robustfeat.serving.extractor import FeatureExtractor
from serve import raw, server

REQUESTS = 20_000
CONNECTIONS = 32
DECODED_AT_ONCE = 4
SERVER_CORE, CLIENT_CORE = 0, 1
BATCHES = (1, 2, 4, 8, 16, 32)
LOADS = (0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Times:
    """What the parts of a request cost, in seconds of a processor.

    Attributes:
        decode: of each photograph.
        batch_s, image_s: a batch of n images takes batch_s + n * image_s.
        message_s: beyond decoding, each time that a decoder takes images.
        request_s: of all the rest of a request, on the event loop.
        constant_s: of a request's latency what is no work of the replica.
        batch_size: the largest batch.
        saturated: measured requests per second of processor time of the server, at saturation.
        lone_s: measured p50 of a lone client.
        lone_work_s: processor time of the server for a request of a lone client.
        noise: how a lone client's latencies vary, as factors of mean 1, by which work takes longer.
    """

    decode: Sequence[float]
    batch_s: float
    image_s: float
    message_s: float = 0.0
    request_s: float = 0.0
    constant_s: float = 0.0
    batch_size: int = 64
    saturated: float = 0.0
    lone_s: float = 0.0
    lone_work_s: float = 0.0
    noise: Sequence[float] = (1.0,)

    def scaled(self, factor: float) -> Times:
        """With all work so many times as long."""
        costs = {name: factor * getattr(self, name) for name in ("batch_s", "image_s", "message_s", "request_s")}
        return replace(self, decode=[factor * seconds for seconds in self.decode], **costs)


PUBLISHED = Times(
    decode=[1 / 633], batch_s=0.00175, image_s=1 / 657, saturated=243, lone_s=0.00596, lone_work_s=0.00596
)
"""ONNX Runtime fp32 at 64 px on one core: decoding and the network of docs/embedding.md (two cores), and the rate, a
lone request and a call in one process (1/633 s + 3.27 ms) of docs/serving.md."""


@dataclass
class _Stage:
    """Work that is done one piece after the other."""

    width: int = 1
    left: float = 0.0
    done: Callable[[], None] | None = None


@dataclass
class Replica:
    """One server, at a time `now`; requests enter by `arrive`, and `answered` takes each when it leaves.

    Args:
        times: see there.
        answered: gets a request's number and the time.
        processors: shared equally by all that is at work.
    """

    times: Times
    answered: Callable[[int, float], None]
    processors: int = 1
    now: float = 0.0
    loop_jobs: deque[Callable[[], None]] = field(default_factory=deque)
    waiting: deque[int] = field(default_factory=deque)
    ready: deque[int] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.loop, self.model = _Stage(), _Stage(self.processors)
        self.decoders = [_Stage() for _ in range(self.processors)]
        self.stages = [self.loop, self.model, *self.decoders]
        self._draw = random.Random(0)

    def arrive(self, request: int) -> None:
        """A request comes in now: half of the loop's work on it comes before decoding, half after the network."""
        self._on_loop(lambda: self._received(request))

    def advance(self, until: float) -> None:
        """Works until a time."""
        while (event := self.next_event()) <= until:
            self._work(event - self.now)
            self.now = event
            for stage in self.stages:
                if stage.done and stage.left <= 1e-12:
                    done, stage.done = stage.done, None
                    done()
        self._work(until - self.now)
        self.now = until

    def next_event(self) -> float:
        """When the next piece of work is done; infinite where there is none."""
        speed = self._speed()
        left = [stage.left / (speed * stage.width) for stage in self.stages if stage.done]
        return self.now + max(0.0, min(left)) if left else math.inf

    def _speed(self) -> float:
        active = sum(stage.width for stage in self.stages if stage.done)
        return min(1.0, self.processors / active) if active else 1.0

    def _work(self, seconds: float) -> None:
        speed = self._speed()
        for stage in self.stages:
            if stage.done:
                stage.left -= seconds * speed * stage.width

    def _on_loop(self, job: Callable[[], None]) -> None:
        self.loop_jobs.append(job)
        self._next_job()

    def _next_job(self) -> None:
        if self.loop.done or not self.loop_jobs:
            return
        job = self.loop_jobs.popleft()

        def done() -> None:
            job()
            self._next_job()

        self._start(self.loop, self.times.request_s / 2, done)

    def _start(self, stage: _Stage, seconds: float, done: Callable[[], None]) -> None:
        # Work as long as several lone requests varies less than one of them.
        draws = max(1, round(seconds / (self.times.lone_work_s or math.inf)))
        noise = sum(self._draw.choice(self.times.noise) for _ in range(draws)) / draws
        stage.left, stage.done = seconds * noise, done

    def _received(self, request: int) -> None:
        self.waiting.append(request)
        self._feed()

    def _feed(self) -> None:
        times = self.times
        if self.ready and not self.model.done:
            batch = [self.ready.popleft() for _ in range(min(times.batch_size, len(self.ready)))]
            self._start(self.model, times.batch_s + len(batch) * times.image_s, lambda: self._ran(batch))
        for decoder in self.decoders:
            if self.waiting and not decoder.done:
                count = min(DECODED_AT_ONCE, max(1, len(self.waiting) // len(self.decoders)))
                images = [self.waiting.popleft() for _ in range(count)]
                seconds = times.message_s + sum(times.decode[image % len(times.decode)] for image in images)
                self._start(decoder, seconds, partial(self._decoded, images))

    def _decoded(self, images: list[int]) -> None:
        self.ready.extend(images)
        self._feed()

    def _ran(self, batch: list[int]) -> None:
        self._feed()
        for request in batch:
            self._on_loop(partial(self._answer, request))

    def _answer(self, request: int) -> None:
        self.answered(request, self.now)


def simulate_open(times: Times, gaps: Iterator[float], requests: int = REQUESTS, processors: int = 1) -> list[float]:
    """Latencies in seconds, where requests arrive after these gaps, whatever is answered."""
    came: list[float] = []
    latencies: list[float] = []

    def answered(request: int, now: float) -> None:
        latencies.append(now - came[request] + times.constant_s)

    replica, due = Replica(times, answered, processors), 0.0
    for request in range(requests):
        due += next(gaps)
        replica.advance(due)
        came.append(due)
        replica.arrive(request)
    while len(latencies) < requests:
        replica.advance(replica.next_event())
    return latencies


def simulate_closed(times: Times, at_once: int, requests: int = REQUESTS, processors: int = 1) -> tuple[float, float]:
    """Requests per second and the p50 in seconds, with so many requests at hand at any time."""
    came: dict[int, float] = {}
    latencies: list[float] = []

    def answered(request: int, now: float) -> None:
        latencies.append(now - came.pop(request) + times.constant_s)
        came[request + at_once] = now
        replica.arrive(request + at_once)

    replica = Replica(times, answered, processors)
    for request in range(at_once):
        came[request] = 0.0
        replica.arrive(request)
    while len(latencies) < requests:
        replica.advance(replica.next_event())
    return requests / replica.now, statistics.median(latencies)


def fit(times: Times) -> Times:
    """The times with the costs of messages and requests that explain what was measured of the server.

    A lone request has a message of its own; at saturation a decoder takes several images with each.
    """
    rest = times.lone_work_s - statistics.mean(times.decode) - times.batch_s - times.image_s
    low, high = 0.0, max(rest, 1e-5)  # of request_s; message_s is what is left
    for _ in range(12):
        middle = (low + high) / 2
        tried = replace(times, request_s=middle, message_s=max(rest - middle, 0.0))
        rate, _ = simulate_closed(tried, CONNECTIONS, 2000)
        low, high = (middle, high) if rate > times.saturated else (low, middle)
    found = (low + high) / 2
    times = replace(times, request_s=found, message_s=max(rest - found, 0.0), constant_s=0.0)
    rate, _ = simulate_closed(times, CONNECTIONS, 10_000)
    times = times.scaled(rate / times.saturated)  # waiting near saturation depends on the last percent
    _, alone = simulate_closed(times, 1, 500)
    return replace(times, constant_s=max(0.0, times.lone_s - alone))


def by_chance(rate: float, replicas: int, balance: str, seed: int = 0) -> Iterator[float]:
    """Gaps at one of some replicas where requests arrive by chance."""
    draw = random.Random(seed)
    while True:
        if balance == "random":
            yield draw.expovariate(rate / replicas)
        else:  # each replica gets every so manieth request
            yield draw.gammavariate(replicas, 1 / rate)


def quantiles(latencies: Sequence[float]) -> tuple[float, float]:
    """p50 and p99 in ms."""
    ordered = sorted(latencies)
    return 1000 * ordered[len(ordered) // 2], 1000 * ordered[int(0.99 * len(ordered))]


def replicas_needed(
    times: Times, rate: float, p99_ms: float, balance: str, requests: int = REQUESTS
) -> tuple[int, float, float]:
    """The fewest replicas whose p99 is below a limit, with their p50 and p99 in ms."""

    def found(replicas: int) -> tuple[float, float]:
        return quantiles(simulate_open(times, by_chance(rate, replicas, balance), requests))

    low, high = 0, max(1, math.ceil(rate / times.saturated / 0.95))
    while found(high)[1] > p99_ms:
        low, high = high, 2 * high
        if rate / high < 0.01 * times.saturated:
            raise SystemExit(f"no number of replicas keeps p99 below {p99_ms} ms: a lone request takes longer")
    while high - low > max(1, high // 200):
        middle = (low + high) // 2
        low, high = (middle, high) if found(middle)[1] > p99_ms else (low, middle)
    return high, *found(high)


def measure_times(photos: Sequence[Path], options: argparse.Namespace) -> Times:
    """Processor times of decoding and of the network, on the server's core."""
    os.sched_setaffinity(0, {SERVER_CORE})
    fx = FeatureExtractor.from_pretrained(options.model, engine=options.engine, precision=options.precision, threads=1)
    contract = fx.config.preprocessing
    data = [photo.read_bytes() for photo in photos]

    def seconds(work: Callable[[], object], times: int) -> float:
        work()
        costs = []
        for _ in range(times):
            began = time.process_time()
            work()
            costs.append(time.process_time() - began)
        return statistics.median(costs)

    decode = [seconds(lambda one=one: prepare_square(one, contract), 5) for one in data]  # type: ignore[misc]
    squares = np.stack([prepare_square(data[n % len(data)], contract) for n in range(max(BATCHES))])
    costs = [seconds(lambda n=n: fx.engine.run(normalise(squares[:n], contract)), 15) for n in BATCHES]  # type: ignore[misc]
    image_s, batch_s = np.polyfit(BATCHES, costs, 1, w=1 / np.array(costs))  # alike in share, so that small ones count
    os.sched_setaffinity(0, {CLIENT_CORE})
    return Times(decode, float(max(batch_s, 0)), float(image_s))


def children_seconds() -> float:
    """Processor time of all processes that this one started, and theirs."""
    return sum(
        int(file.read_text().split()[0]) / 1e9
        for pid in list(processes(os.getpid()))[1:]
        for file in Path(f"/proc/{pid}/task").glob("*/schedstat")
    )


async def measure_capacity(client: Client, requests: Sequence[bytes], seconds: float) -> float:
    """Requests per second of processor time at saturation: a client that answers late does not count."""
    began = children_seconds()
    result = await client.closed(requests, CONNECTIONS, seconds)
    return len(result.latencies[200]) / (children_seconds() - began)


async def measure_server(port: int, requests: Sequence[bytes], seconds: float, times: Times) -> Times:
    """The times with what is measured of the server: saturation, and a lone client."""
    client = Client(port)
    await client.closed(requests, CONNECTIONS, 2)
    saturated = await measure_capacity(client, requests, seconds)
    began = children_seconds()
    alone = await client.closed(requests, 1, seconds / 2)
    latencies = alone.latencies[200]
    work, lone_s = (children_seconds() - began) / len(latencies), alone.quantile(0.5) / 1000
    usual = lone_s + np.array(times.decode) - statistics.mean(times.decode)  # by photograph
    noise = np.array(latencies) / np.resize(usual, len(latencies))
    noise = (noise / noise.mean()).round(4).tolist()
    return fit(replace(times, saturated=saturated, lone_s=lone_s, lone_work_s=work, noise=noise))


async def validate(port: int, requests: Sequence[bytes], times: Times, options: argparse.Namespace) -> None:
    """Measures arrivals by chance, and prints and writes what `compare` makes of them."""
    client, seconds = Client(port), options.seconds
    runs = []
    for seed, load in itertools.product(range(options.rounds), LOADS):
        now = await measure_server(port, requests, seconds / 2, times)
        rate = load * now.saturated
        gaps = list(itertools.islice(by_chance(rate, 1, "random", seed), round(rate * seconds)))
        result = await client.arrivals(requests, gaps)
        after = await measure_capacity(client, requests, seconds / 4)
        now = now.scaled(2 * now.saturated / (now.saturated + after))
        if lost := sum(len(values) for status, values in result.latencies.items() if status != 200):
            print(f"not answered well at {load:.0%}: {lost}", file=sys.stderr)
        real = result.quantile(0.5), result.quantile(0.99)
        runs.append({"load": load, "seed": seed, "gaps": gaps, "real": real, "times": asdict(now)})
    if options.out:
        options.out.write_text(json.dumps({"hardware": hardware(), "runs": runs}) + "\n")
    compare(runs)


def compare(runs: Sequence[dict[str, Any]]) -> None:
    """Prints p50 and p99, measured and simulated, each the median of the runs at one load."""
    print("| load | p50, ms | simulated | p99, ms | range | simulated | ratio |\n|---|---|---|---|---|---|---|")
    for load in LOADS:
        real, simulated = [], []
        for run in (run for run in runs if run["load"] == load):
            times = Times(**run["times"])
            simulated.append(quantiles(simulate_open(times, iter(run["gaps"]), len(run["gaps"]))))
            real.append(run["real"])
        (a, b), (c, d) = (map(statistics.median, zip(*found, strict=True)) for found in (real, simulated))
        spread = f"{min(p99 for _, p99 in real):.1f} to {max(p99 for _, p99 in real):.1f}"
        print(f"| {load:.0%} | {a:.1f} | {c:.1f} | {b:.1f} | {spread} | {d:.1f} | {d / b:.2f} |", flush=True)


def photos_of(folder: Path) -> list[Path]:
    found = sorted(file for file in folder.rglob("*") if file.suffix.lower() in {".jpg", ".jpeg"})
    return found or sys.exit(f"{folder}: no JPEG files")


def run_server(options: argparse.Namespace) -> None:
    """`measure` and `validate`."""
    requests = [raw(photo.read_bytes()) for photo in photos_of(options.photos)]
    command = [sys.executable, "-m", "robustfeat", "serve", "--port=0", f"--model=robustfeat={options.model}"]
    command += [f"--engine={options.engine}", f"--precision={options.precision}", "--no-page"]
    os.sched_setaffinity(0, {CLIENT_CORE})
    if options.what == "measure":
        times = measure_times(photos_of(options.photos), options)
    else:
        times = Times(**json.loads(options.times.read_text()))
    with server(command) as port:
        if options.what == "validate":
            asyncio.run(validate(port, requests, times, options))
            return
        times = asyncio.run(measure_server(port, requests, options.seconds, times))
    costs = {"decode": statistics.mean(times.decode)}
    costs |= {name: value for name, value in asdict(times).items() if name.endswith("_s")}
    print(", ".join(f"{name.removesuffix('_s')} {1000 * value:.2f} ms" for name, value in costs.items()), end="; ")
    print(f"{times.saturated:.0f} requests/s at saturation")
    options.out.write_text(json.dumps(asdict(times)) + "\n")


def predict(options: argparse.Namespace) -> None:
    times = Times(**json.loads(options.times.read_text())) if options.times else fit(PUBLISHED)
    print(f"One replica has one processor and answers {times.saturated:.0f} requests/s at saturation.")
    print("| requests/s | replicas | load | p50, ms | p99, ms |\n|---|---|---|---|---|")
    for rate in map(float, options.rate.split(",")):
        replicas, p50, p99 = replicas_needed(times, rate, options.p99, options.balance)
        load = rate / replicas / times.saturated
        print(f"| {rate:,.0f} | {replicas:,} | {load:.0%} | {p50:.1f} | {p99:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    for name in ("measure", "validate"):
        command = commands.add_parser(name)
        if name == "validate":
            command.add_argument("times", type=Path, metavar="TIMES.json")
            command.add_argument("--rounds", type=int, default=3)
            command.add_argument("--out", type=Path, metavar="FILE.json")
        else:
            command.add_argument("--out", type=Path, required=True, metavar="TIMES.json")
        command.add_argument("--photos", type=Path, required=True, metavar="FOLDER", help="of JPEGs")
        command.add_argument("--model", default="builtin")
        command.add_argument("--engine", default="onnxruntime")
        command.add_argument("--precision", default="fp32")
        command.add_argument("--seconds", type=float, default=10.0, help="of each load")
    command = commands.add_parser("predict")
    command.add_argument("times", type=Path, nargs="?", metavar="TIMES.json")
    command.add_argument("--rate", default="10,100,1000,10000", metavar="REQUESTS_PER_S,...")
    command.add_argument("--p99", type=float, default=100.0, metavar="MS", help="the limit")
    command.add_argument("--balance", choices=["round-robin", "random"], default="round-robin")
    options = parser.parse_args()
    if options.what == "predict":
        predict(options)
        return
    if len(os.sched_getaffinity(0)) < 2:
        parser.error("needs two processors: one for the server, one for the client")
    run_server(options)


if __name__ == "__main__":
    main()
