"""`robustfeat duplicates` on copies that are planted among photographs, beside imagededup.

    python benchmarks/duplicates.py --images photos/ DATA.parquet --out duplicates.json [--peers-python PYTHON]

Of --count photographs, --copies each are copied in one of these ways; the rest has no copy:

- re-encoded: JPEG of quality 50; half size: both sides halved;
- cropped: 5 % of both sides cut off; mirrored; brightened: by 1.3; rotated: by 5 degrees, black corners;
- watermarked: a white text over the lower third, half transparent.

Each --threshold is tried. Recall is the share of copies that are in one group with their photograph. Precision is the
share of images to drop whose group's kept image is their photograph or copy: photographs that were alike before count
as errors. Times are seconds of wall clock and of processors. --rows also times the search on so many rows: those of
the photographs, each repeated with noise that leaves them less alike than the threshold.

imagededup is run by --peers-python, an interpreter of an environment that has it, at its default thresholds: PHash
and, with --peer-weights, its CNN with EfficientNet-lite0 (the file of tf_efficientnet_lite0 that timm takes).
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from machine import hardware
from robustfeat import Features
from robustfeat.hub.preprocessing import decode
from robustfeat.serving.collections.directions import Directions
from robustfeat.serving.collections.duplicates import find_duplicates
from robustfeat.serving.inputs.listing import list_inputs
from robustfeat.serving.inputs.parquet import ParquetSources

ROBUSTFEAT = [sys.executable, "-m", "robustfeat"]
PEER = Path(__file__).parent / "peers" / "imagededup_pairs.py"
Pair = tuple[str, str]


def cropped(image: Image.Image) -> Image.Image:
    width, height = image.size
    return image.crop((0, 0, round(width * 0.95), round(height * 0.95)))


def watermarked(image: Image.Image) -> Image.Image:
    layer = Image.new("RGBA", image.size)
    font = ImageFont.load_default(max(6, image.width // 6))
    place = (image.width * 0.05, image.height * 0.7)
    ImageDraw.Draw(layer).text(place, "© sample", (255, 255, 255, 128), font)
    return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")


def half_size(image: Image.Image) -> Image.Image:
    return image.resize((max(1, image.width // 2), max(1, image.height // 2)), Image.Resampling.LANCZOS)


COPIES: dict[str, tuple[Callable[[Image.Image], Image.Image], int]] = {
    "re-encoded": (lambda image: image, 50),
    "half size": (half_size, 95),
    "cropped": (cropped, 95),
    "mirrored": (lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), 95),
    "brightened": (lambda image: ImageEnhance.Brightness(image).enhance(1.3), 95),
    "watermarked": (watermarked, 95),
    "rotated": (lambda image: image.rotate(5, Image.Resampling.BICUBIC), 95),
}
"""How a copy is made, and the quality of its JPEG file."""


def plant(options: argparse.Namespace, folder: Path) -> dict[Pair, str]:
    """Writes photographs and copies to `folder`; gives the kind of each pair of names."""
    rng = np.random.default_rng(0)
    with list_inputs(options.images) as found:
        chosen = set(rng.permutation(len(found))[options.skip :][: options.count].tolist())
        sources = [source for number, source in enumerate(found) if number in chosen]
    parquet, planted = ParquetSources(), {}
    kinds = [kind for kind in COPIES for _ in range(options.copies)]
    copied = dict(zip(rng.permutation(len(sources)).tolist(), kinds, strict=False))
    for number, source in enumerate(sources):
        data = parquet.read(source) if source.kind == "parquet" else source.read()
        assert isinstance(data, bytes), data
        name = f"{number:05}.jpg"
        (folder / name).write_bytes(data)
        if kind := copied.get(number):
            make, quality = COPIES[kind]
            copy = f"{number:05} {kind}.jpg"
            make(decode(data)).save(folder / copy, "JPEG", quality=quality)
            planted[min(name, copy), max(name, copy)] = kind
    return planted


def timed(command: Iterable[Any]) -> tuple[dict[str, float], str]:
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processors = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": time.monotonic() - began, "processor_s": processors}, done.stdout


def rate(pairs: set[Pair], planted: dict[Pair, str]) -> dict[str, Any]:
    """Precision, recall, and recall by kind; pairs have the smaller name first."""
    right = Counter(planted[pair] for pair in pairs if pair in planted)
    totals = Counter(planted.values())
    return {
        "pairs": len(pairs),
        "precision": sum(right.values()) / max(len(pairs), 1),
        "recall": sum(right.values()) / len(planted),
        "by_kind": {kind: right[kind] / count for kind, count in totals.items()},
    }


def pairs_of(text: str) -> set[Pair]:
    """Each image to drop with the image that its group keeps."""
    groups: dict[str, list[str]] = defaultdict(list)
    for row in csv.DictReader(io.StringIO(text)):
        groups[row["group"]].append(row["path"])
    return {(min(kept, other), max(kept, other)) for kept, *others in groups.values() for other in others}


def ours(options: argparse.Namespace, folder: Path, planted: dict[Pair, str]) -> dict[str, Any]:
    feats = folder.parent / "feats.npy"
    run = [*ROBUSTFEAT, "embed", folder, "--out", feats, "--quiet", "--model", options.model, *options.embed]
    found: dict[str, Any] = {"embed": timed(run)[0]}
    values = np.load(feats).astype(np.float64)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    names = [json.loads(line)["path"] for line in feats.with_suffix(".index.jsonl").read_text().splitlines()]
    place = {name: row for row, name in enumerate(names)}
    cosines: dict[str, list[float]] = defaultdict(list)
    for (a, b), kind in planted.items():
        cosines[kind].append(float(values[place[a]] @ values[place[b]]))
    found["cosines"] = {
        kind: dict(zip(("5%", "50%", "95%"), np.percentile(of_kind, [5, 50, 95]).round(4).tolist(), strict=True))
        for kind, of_kind in cosines.items()
    }
    mean = values.mean(0)
    found["mean_cosine"] = float(mean @ mean)
    for threshold in ("default", *options.threshold):
        given = [] if threshold == "default" else ["--threshold", threshold]
        seconds, said = timed([*ROBUSTFEAT, "duplicates", feats, "--quiet", *given])
        found[f"threshold {threshold}"] = {**seconds, **rate(pairs_of(said), planted)}
    if options.rows:
        found["rows"] = search_rows(np.load(feats), options)
    return found


def search_rows(values: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the search itself on many rows."""
    rng = np.random.default_rng(0)
    many = np.empty((options.rows, values.shape[1]), np.float32)
    spread = values.std(0)
    for start in range(0, options.rows, 10_000):
        part = many[start : start + 10_000]
        part[:] = values[rng.integers(0, len(values), len(part))]
        part += np.float32(0.3) * spread * rng.standard_normal(part.shape, dtype=np.float32)
    collection = Directions(Features("rows", many, range(options.rows), {}, None))  # type: ignore[arg-type]
    found = {}
    for threshold in map(float, options.threshold):
        before, began = time.process_time(), time.monotonic()
        groups = find_duplicates(collection, threshold, np.arange(options.rows), threads=options.threads)
        dropped = int((groups.kept != np.arange(options.rows)).sum())
        seconds = {"wall_s": time.monotonic() - began, "processor_s": time.process_time() - before}
        found[str(threshold)] = {**seconds, "dropped": dropped}
        print(f"{options.rows:,} rows, threshold {threshold}: {found[str(threshold)]}", flush=True)
    return found


def peers(options: argparse.Namespace, folder: Path, planted: dict[Pair, str]) -> dict[str, Any]:
    found = {}
    for method in ("PHash", *(["CNN"] if options.peer_weights else [])):
        weights = [options.peer_weights] if method == "CNN" else []
        seconds, said = timed([options.peers_python, PEER, method, folder, *weights])
        pairs = {(min(pair), max(pair)) for pair in json.loads(said.splitlines()[-1])}
        found[method] = {**seconds, **rate(pairs, planted)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", nargs="+", required=True, help="as `robustfeat embed` takes them")
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--skip", type=int, default=0, help="leave out so many, which an earlier run drew")
    parser.add_argument("--copies", type=int, default=500)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--embed", nargs="*", default=[], help="further options of `robustfeat embed`, without --")
    parser.add_argument("--threshold", nargs="*", default=["0.95", "0.97", "0.98", "0.99"])
    parser.add_argument("--rows", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers-python")
    parser.add_argument("--peer-weights")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.embed = [part if number % 2 else f"--{part}" for number, part in enumerate(options.embed)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "images")
        folder.mkdir()
        planted = plant(options, folder)
        images = {"images": len(list(folder.iterdir())), "copies": len(planted)}
        result = {"hardware": hardware(), "model": options.model, **images, "ours": ours(options, folder, planted)}
        if options.peers_python:
            result["imagededup"] = peers(options, folder, planted)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
