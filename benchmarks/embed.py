"""How fast `robustfeat embed` is: beside its own limit, other programs, corrupt files; its memory; and other resizings.

    python benchmarks/embed.py --photos FOLDER --model builtin --model resnet18-224=FOLDER --out embed.json
    python benchmarks/embed.py --photos FOLDER --only memory
    python benchmarks/embed.py --photos FOLDER --only speed --device cuda

- speed: M is the model alone and D decoding alone (file to square, one process a core), both on all cores, so that
  1 / (1/M + 1/D) = B is what both can reach together. With `--device cuda` B is the smaller of M and D: the GPU leaves
  the cores to the decoders. The steady rate of the real command leaves start-up apart:
  (long - short run's images) / (long - short run's seconds).
- peers: the same photographs and network through other programs (peers/loops.py), at their steady rate.
- drift: cosine of the features to those behind timm's own preprocessing; photographs rotated by EXIF, which timm
  ignores, are left out.
- corrupt: every 100th file is a truncated JPEG, a text or empty.
- memory (takes minutes; only with --memory or --only): peak anonymous memory of all processes, sampled every 0.1 s,
  with the first model and small photographs.

Rates are measured in turn, round by round; tables give the median over the rounds, and that of ratios within a round.
fastembed and lightly-train are run by `--peers-python`, an interpreter of an environment that has them. They need no
download: fastembed is given the network under a name that it knows, lightly-train a checkpoint made of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from machine import hardware, peak_memory
from robustfeat.errors import RobustFeatError
from robustfeat.hub.catalog import resolve_model
from robustfeat.hub.folder import ModelFolder
from robustfeat.hub.preprocessing import Preprocessing, normalise, prepare_square
from robustfeat.serving.engines.options import RunOptions
from robustfeat.serving.extractor import FeatureExtractor
from robustfeat.serving.verify import cosine
from robustfeat.system import available_cpus

SECTIONS = ("speed", "peers", "drift", "corrupt", "memory")
ENGINES = {
    "cpu": [
        ("onnxruntime", "fp32"),
        ("onnxruntime", "int8"),
        ("openvino", "fp32"),
        ("openvino", "bf16"),
        ("openvino", "int8"),
    ],
    "cuda": [("onnxruntime", "fp32"), ("onnxruntime", "fp16"), ("tensorrt", "fp32"), ("tensorrt", "fp16")],
}
LOOPS = Path(__file__).parent / "peers" / "loops.py"
PEERS = {
    "torchvision": "torch + torchvision, DataLoader",
    "timm": "timm's loader and model",
    "onnxruntime": "Pillow + ONNX Runtime in one loop",
    "fastembed": "fastembed",
    "fastembed, parallel": "fastembed, parallel = cores",
    "lightly-train": "lightly_train.embed",
}
RESIZINGS = {
    "not antialiased": "torchvision on tensors, antialias=False",
    "OpenCV": "OpenCV, INTER_LINEAR",
    "squashed": "Pillow, whole image to a square",
}
VERSIONS = (
    "robustfeat",
    "numpy",
    "pillow",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt-cu13-libs",
    "openvino",
    "torch",
    "torchvision",
    "timm",
)
OFFLINE = {"HF_HUB_OFFLINE": "1", "LIGHTLY_TRAIN_EVENTS_DISABLED": "1", "NO_ALBUMENTATIONS_UPDATE": "1"}
CORES = available_cpus()
MIN_SECONDS = 3


class Way(NamedTuple):
    """A way of running `robustfeat embed`."""

    engine: str
    precision: str
    decoding: str = "exact"
    device: str = "cpu"

    def __str__(self) -> str:
        place = " on cuda" if self.device == "cuda" else ""
        return f"{self.engine} {self.precision}{place}" + (", scaled" if self.decoding == "scaled" else "")

    @property
    def run_options(self) -> RunOptions:
        """For the most images per second."""
        return RunOptions(self.precision, self.engine, self.device, self.decoding, threads=CORES, streams=CORES)


@dataclass
class Bench:
    """One model and the folders of photographs that it is measured on."""

    name: str
    folder: ModelFolder
    photos: list[Path]
    scratch: Path
    images: int
    peers_python: str
    device: str = "cpu"
    ways: list[Way] = field(default_factory=list)
    fastest: Way = field(init=False)
    missing: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scratch.mkdir()
        caches = dict.fromkeys(("LIGHTLY_TRAIN_CACHE_DIR", "FASTEMBED_CACHE_PATH"), str(self.scratch / "cache"))
        self.environment = {**os.environ, **OFFLINE, **caches}
        whole = len(self.photos)
        # Whole repetitions, so that long and short runs are of the same mixture.
        long = whole * math.ceil(self.images * 64 / max(64, self.contract.image_size) / whole)
        short = whole * math.ceil(long / 8 / whole)
        self.counts = {"short": short, "long": max(long, short + whole)}
        rates = {}
        for engine, precision in ENGINES[self.device]:
            way = Way(engine, precision, device=self.device)
            try:
                FeatureExtractor.load(self.folder.path, way.run_options)
                self.ways.append(way)
                rates[way] = self.model_rate(way, 0.5)
            except RobustFeatError as exc:
                self.missing[f"{self.name}: {way}"] = str(exc)
        if not rates:
            raise SystemExit(f"{self.name}: nothing runs on {self.device} here: {'; '.join(self.missing.values())}")
        self.fastest = max(rates, key=lambda way: rates[way])

    @property
    def contract(self) -> Preprocessing:
        """The model's preprocessing."""
        return self.folder.config.preprocessing

    def links(self, kind: str, size: str) -> Path:
        """A folder of links to the photographs: `clean` or `corrupt`, `short` or `long`."""
        folder = self.scratch / f"{kind}-{size}"
        if not folder.exists():
            folder.mkdir()
            whole = self.photos[0].read_bytes()
            for number, content in enumerate((whole[: len(whole) // 2], b"no image\n", b"")):
                (self.scratch / f"broken-{number}").write_bytes(content)
            for number in range(self.counts[size]):
                photo = self.photos[number % len(self.photos)]
                if kind == "corrupt" and number % 100 == 99:
                    photo = self.scratch / f"broken-{number // 100 % 3}"
                (folder / f"{number:07}.jpg").symlink_to(photo)
        return folder

    def model_rate(self, way: Way, seconds: float) -> float:
        """M: images a second of the engine alone, one thread a stream."""
        extractor = FeatureExtractor.open(self.folder, way.run_options)
        files = itertools.islice(itertools.cycle(self.photos), extractor.batch_size)
        batch = normalise(np.stack([extractor.prepare(file) for file in files]), self.contract)

        def loop(_: int) -> float:
            own = extractor.engine.new_input(batch.shape)
            own[:] = batch
            extractor.engine.run(own)
            began, count = time.perf_counter(), 0
            while time.perf_counter() - began < seconds:
                extractor.engine.run(own)
                count += len(batch)
            return count / (time.perf_counter() - began)

        streams = extractor.engine.streams
        with ThreadPoolExecutor(streams) as pool:
            return sum(pool.map(loop, range(streams)))

    def decode_rate(self, pool: ProcessPoolExecutor, decoding: str, seconds: float) -> float:
        """D: images a second of reading and preparing alone, one process a core."""
        parts = [self.photos[first : first + 8] for first in range(0, len(self.photos), 8)]
        work = partial(prepare_files, contract=self.contract, scaled=decoding == "scaled")

        def passes(count: int) -> float:
            began = time.perf_counter()
            list(pool.map(work, parts * count))
            return time.perf_counter() - began

        passes(1)  # imports, page cache
        count = max(1, round(seconds / passes(1)))
        return count * len(self.photos) / passes(count)

    def embed(self, way: Way, *inputs: str | Path) -> list[str]:
        """The command."""
        options = {"model": self.folder.path, **way._asdict(), "out": self.scratch / "feats.npy"}
        named = [f"--{name}={value}" for name, value in options.items()]
        return [sys.executable, "-m", "robustfeat", "embed", *map(str, inputs), *named, "--quiet"]

    def embed_rate(self, way: Way, kind: str) -> float:
        """The command's steady rate."""
        return self._steady(lambda folder: self._run(self.embed(way, folder))[0], kind)

    def peer_rate(self, peer: str) -> float:
        """The same of another program."""
        return self._steady(lambda folder: self._run(self._peer(peer, folder))[0], "clean")

    def peer_features(self, peer: str) -> NDArray[np.float32] | None:
        """Another program's features of the upright photographs; None where it cannot run here."""
        folder = self.scratch / "upright"
        if not folder.exists():
            folder.mkdir()
            for number, photo in enumerate(self.upright()):
                (folder / f"{number:07}.jpg").symlink_to(photo)
        try:
            self.versions |= json.loads(self._run(self._peer(peer, folder))[1].splitlines()[-1])
        except RuntimeError as exc:
            self.missing[f"{self.name}: {peer}"] = str(exc)
            return None
        features: NDArray[np.float32] = np.load(self.scratch / "peer.npy")
        return features

    def upright(self) -> list[Path]:
        """The photographs without an EXIF rotation."""
        upright = []
        for photo in self.photos:
            with Image.open(photo) as image:
                if image.getexif().get(0x0112, 1) == 1:
                    upright.append(photo)
        return upright

    def _peer(self, peer: str, folder: Path) -> list[str]:
        python = self.peers_python if peer.startswith(("fastembed", "lightly")) else sys.executable
        options = {"model": self.folder.path, "onnx": self.folder.onnx("fp32"), "work": self.scratch, "workers": CORES}
        named = [f"--{name}={value}" for name, value in options.items()]
        return [python, str(LOOPS), peer, str(folder), *named, f"--out={self.scratch / 'peer.npy'}"]

    def _steady(self, seconds: Callable[[Path], float], kind: str) -> float:
        short, long = seconds(self.links(kind, "short")), seconds(self.links(kind, "long"))
        if long - short < MIN_SECONDS:
            self.missing[f"{self.name}: {kind}"] = f"runs differ by under {MIN_SECONDS} s: raise --images"
        return (self.counts["long"] - self.counts["short"]) / (long - short)

    def _run(self, command: list[str]) -> tuple[float, str]:
        began = time.perf_counter()
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - began
        if done.returncode not in {0, 3}:  # 3: some images failed
            raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
        return seconds, done.stdout


def prepare_files(files: Sequence[Path], contract: Preprocessing, scaled: bool) -> None:
    for file in files:
        prepare_square(file.read_bytes(), contract, scaled=scaled)


# By model, kind and way.
Jobs = dict[tuple[str, str, str], Callable[[], float]]
Rates = dict[tuple[str, str, str], list[float]]


def jobs_of(bench: Bench, sections: set[str], seconds: float, pool: ProcessPoolExecutor) -> Jobs:
    """What to measure of one model."""
    jobs: Jobs = {}
    ways: list[Way] = []
    if "speed" in sections:
        ways += [*bench.ways, bench.fastest._replace(decoding="scaled")]
        for way in bench.ways:
            jobs[bench.name, "M", str(way)] = partial(bench.model_rate, way, seconds)
        for decoding in ("exact", "scaled"):
            jobs[bench.name, "D", decoding] = partial(bench.decode_rate, pool, decoding, seconds)
    if "peers" in sections:
        ways += [bench.ways[0], bench.fastest]
        for peer in PEERS:
            if bench.peer_features(peer) is not None:  # also a warm-up
                jobs[bench.name, "peer", peer] = partial(bench.peer_rate, peer)
    if "corrupt" in sections:
        ways.append(bench.fastest)
        jobs[bench.name, "corrupt", str(bench.fastest)] = partial(bench.embed_rate, bench.fastest, "corrupt")
    return jobs | {(bench.name, "clean", str(way)): partial(bench.embed_rate, way, "clean") for way in ways}


def measure(jobs: Jobs, rounds: int) -> Iterator[Rates]:
    """Images a second, after each round those of all rounds so far."""
    rates: Rates = {key: [] for key in jobs}
    for number in range(rounds):
        for key, job in jobs.items():
            rates[key].append(job())
            print(f"round {number + 1}:", *key, f"{rates[key][-1]:.1f}/s", file=sys.stderr, flush=True)
        yield rates


def ratio(a: Sequence[float], b: Sequence[float]) -> str:
    """Median of a / b over the rounds, and its range."""
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


Rows = list[dict[str, Any]]


def speed_rows(bench: Bench, rates: Rates) -> Rows:
    rows = []
    for way in [*bench.ways, bench.fastest._replace(decoding="scaled")]:
        model = rates[bench.name, "M", str(way._replace(decoding="exact"))]
        decode, steady = rates[bench.name, "D", way.decoding], rates[bench.name, "clean", str(way)]
        both = zip(model, decode, strict=True)
        limit = [min(m, d) if way.device == "cuda" else 1 / (1 / m + 1 / d) for m, d in both]
        values = {"M": model, "D": decode, "B": limit, "embed": steady}
        medians = {name: round(statistics.median(value)) for name, value in values.items()}
        rows.append({"way": str(way), **medians, "embed / B": ratio(steady, limit)})
    return rows


def peer_rows(bench: Bench, rates: Rates) -> Rows:
    ours = {str(way): rates[bench.name, "clean", str(way)] for way in (bench.ways[0], bench.fastest)}
    rows: Rows = []
    for peer, label in PEERS.items():
        theirs = rates.get((bench.name, "peer", peer))
        if theirs is not None:
            times = {f"robustfeat, {way}, is so many times as fast": ratio(rate, theirs) for way, rate in ours.items()}
            rows.append({"program": label, "images/s": round(statistics.median(theirs)), **times})
    return rows


def drift_rows(bench: Bench) -> Rows:
    expected = bench.peer_features("timm")
    if expected is None:
        return []
    files, rows = bench.upright(), []
    for way in [*bench.ways, bench.ways[0]._replace(decoding="scaled")]:
        extractor = FeatureExtractor.from_pretrained(bench.folder.path, **way._asdict())
        rows.append((f"robustfeat, {way}", extractor.embed(files)))
    for peer, label in {**PEERS, **RESIZINGS}.items():
        if peer not in {"timm", "fastembed, parallel"} and (features := bench.peer_features(peer)) is not None:
            rows.append((label, features))
    similar = {label: cosine(features, expected) for label, features in rows}
    return [
        {"features of": label, "mean": f"{value.mean():.5f}", "min": f"{value.min():.5f}", "n": len(value)}
        for label, value in similar.items()
    ]


def memory_rows(bench: Bench, counts: Sequence[int]) -> Rows:
    way = next((way for way in bench.ways if way.precision == "int8"), bench.ways[0])
    small = bench.scratch / "small"
    small.mkdir()
    for number, photo in enumerate(bench.photos):
        with Image.open(photo) as image:
            image.convert("RGB").resize((96, 72)).save(small / f"{number}.jpg", quality=90)
    names = [f"{file}\n" for file in sorted(small.iterdir())]
    rows: Rows = []
    for count in counts:
        listing = bench.scratch / "list.txt"
        with listing.open("w") as handle:
            handle.writelines(itertools.islice(itertools.cycle(names), count))
        anonymous, shared, seconds = peak_memory(bench.embed(way, f"--files-from={listing}"))
        peaks = {"anonymous MiB": round(anonymous / 1024, 1), "shared MiB": round(shared / 1024, 1)}
        rows.append({"way": str(way), "images": count, **peaks, "seconds": round(seconds)})
    return rows


def print_table(title: str, rows: Rows) -> None:
    if rows:
        lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
        print(f"\n### {title}\n", *("| " + " | ".join(map(str, line)) + " |" for line in lines), sep="\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, metavar="FOLDER", help="of JPEGs, repeated as needed")
    parser.add_argument("--model", action="append", metavar="NAME=FOLDER", help="builtin by default; may be repeated")
    parser.add_argument("--only", default="speed,peers,drift,corrupt", metavar="SECTION,...", help=", ".join(SECTIONS))
    parser.add_argument("--memory", action="store_true", help="also the section memory")
    parser.add_argument("--memory-counts", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each M and D")
    parser.add_argument(
        "--images",
        type=int,
        default=4800,
        help="in a long run at 64 px; fewer at larger sizes, in proportion to the side; a short run has an eighth",
    )
    parser.add_argument("--device", choices=list(ENGINES), default="cpu", help="of the sections speed, drift, corrupt")
    parser.add_argument("--peers-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    sections = {*options.only.split(","), *(["memory"] if options.memory else [])}
    if not sections <= set(SECTIONS):
        parser.error(f"--only takes {', '.join(SECTIONS)}")
    photos = sorted(file.resolve() for file in options.photos.iterdir() if file.suffix.lower() in {".jpg", ".jpeg"})
    models = [text.partition("=") for text in options.model or ["builtin"]]
    installed = {found.metadata["Name"].lower(): found.version for found in metadata.distributions()}
    report: dict[str, Any] = {
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), **{n: installed[n] for n in VERSIONS if n in installed}},
        "photos": len(photos),
        "rounds": options.rounds,
        "seconds": options.seconds,
        "images": {},
        "versions_of_peers": {},
        "tables": {},
        "rates": {},
    }

    def save() -> None:
        if options.out:
            options.out.write_text(json.dumps(report, indent=2) + "\n")

    def add(title: str, rows: Rows) -> None:
        report["tables"][title] = rows
        print_table(title, rows)
        save()

    spawn = get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(CORES, mp_context=spawn) as pool:
        benches = [
            Bench(
                name,
                resolve_model(place or name),
                photos,
                Path(scratch, name),
                options.images,
                options.peers_python,
                options.device,
            )
            for name, _, place in models
        ]
        for bench in benches:
            report["images"][bench.name] = {"side": bench.contract.image_size, **bench.counts}
            if "drift" in sections:
                add(f"{bench.name}: cosine to the features behind timm's preprocessing", drift_rows(bench))
        jobs = [jobs_of(bench, sections, options.seconds, pool) for bench in benches]
        rates: Rates = {}
        for rates in measure({key: job for some in jobs for key, job in some.items()}, options.rounds):
            report["rates"] = {": ".join(key): [round(rate, 2) for rate in values] for key, values in rates.items()}
            save()
        for bench in benches:
            if "speed" in sections:
                add(f"{bench.name}: images/s", speed_rows(bench, rates))
            if "peers" in sections:
                add(f"{bench.name}: other programs", peer_rows(bench, rates))
            if "corrupt" in sections:
                kinds = {kind: rates[bench.name, kind, str(bench.fastest)] for kind in ("clean", "corrupt")}
                medians = {kind: round(statistics.median(values)) for kind, values in kinds.items()}
                row = {"way": str(bench.fastest), **medians, "ratio": ratio(kinds["corrupt"], kinds["clean"])}
                add(f"{bench.name}: 1 % corrupt files, images/s", [row])
        if "memory" in sections:
            add(f"{benches[0].name}: peak memory", memory_rows(benches[0], options.memory_counts))
        for bench in benches:
            report["versions_of_peers"] |= bench.versions
        add(
            "Not measured, or too short to trust",
            [{"what": what, "why": why} for bench in benches for what, why in bench.missing.items()],
        )


if __name__ == "__main__":
    main()
