"""Memory, disk space and time of many rows in a folder of several files: written, checked, loaded and searched.

    python benchmarks/rows.py --counts 100000 1000000 --out rows.json
    python benchmarks/rows.py --counts 10000000 --rows-per-file 1048576

Images are a few photographs at 64 px, uncompressed, over and over, and the network takes means of 8 x 8 pixels (192
features). So the time is for reading, hashing and writing. Memory is the peak of RssAnon of all processes, sampled
every 0.1 s; mapped files do not count. Disk is the peak of all that the run has written, sampled every 0.5 s.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper
from PIL import Image

from embed import print_table
from machine import hardware, peak_memory

SIDE, WINDOW = 64, 8
FEATURES = 3 * (SIDE // WINDOW) ** 2


def write_network(file: Path) -> None:
    """Means of squares of pixels as an ONNX file."""
    nodes = [
        helper.make_node("AveragePool", ["pixels"], ["means"], kernel_shape=[WINDOW] * 2, strides=[WINDOW] * 2),
        helper.make_node("Flatten", ["means"], ["features"]),
    ]
    taken = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, SIDE, SIDE])
    given = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", FEATURES])
    graph = helper.make_graph(nodes, "means", [taken], [given])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), file)


def bytes_under(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except FileNotFoundError:  # a file that was just moved or deleted
            continue
    return total


def processor_seconds() -> float:
    """Of all commands so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class DiskWatch:
    """The most bytes that lie under a folder while the block runs."""

    def __init__(self, folder: Path) -> None:
        self.peak, self._folder, self._done = 0, folder, threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> DiskWatch:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.5):
            self.peak = max(self.peak, bytes_under(self._folder))


def measure(photos: Sequence[Path], scratch: Path, count: int, rows_per_file: int) -> list[dict[str, Any]]:
    """A line for each thing that is done with `count` rows."""
    listing, out = scratch / "list.txt", scratch / "out"
    out.mkdir()
    with listing.open("w") as handle:
        handle.writelines(itertools.islice(itertools.cycle(f"{photo}\n" for photo in photos), count))
    feats, robustfeat = f"{out}/feats/", [sys.executable, "-m", "robustfeat"]
    embed = [*robustfeat, "embed", f"--files-from={listing}", f"--model={scratch / 'model'}", f"--out={feats}"]
    load = f"import robustfeat; feats = robustfeat.load({feats!r}); feats.check(); assert len(feats.paths) == {count}"
    listed = f"from robustfeat.serving.inputs.listing import list_inputs; list_inputs([], files_from={str(listing)!r})"
    commands = {
        "list": [sys.executable, "-c", listed],
        "embed": [*embed, f"--rows-per-file={rows_per_file}", "--quiet"],
        "info": [*robustfeat, "info", feats],
        "load and check": [sys.executable, "-c", load],
        "similar": [*robustfeat, "similar", feats, "5", "-k", "10", "--quiet"],
    }
    lines = []
    for what, command in commands.items():
        began = processor_seconds()
        with DiskWatch(out) as disk:
            anonymous, _, seconds = peak_memory(command)
        line: dict[str, Any] = {"what": what, "rows": f"{count:,}", "memory, MiB": round(anonymous / 1024)}
        line |= {"seconds": round(seconds, 1), "processor s": round(processor_seconds() - began, 1)}
        line["disk / output"] = f"{disk.peak / max(1, bytes_under(out)):.2f}"
        lines.append(line)
        print(line, file=sys.stderr, flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, default=Path(__file__).parents[1] / "examples" / "images")
    parser.add_argument("--counts", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--rows-per-file", type=int, default=100_000)
    parser.add_argument("--scratch", type=Path, help="a folder with room for the output; by default a temporary one")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    lines = []
    for count in options.counts:
        with tempfile.TemporaryDirectory(dir=options.scratch) as name:
            scratch = Path(name)
            photos = []
            for number, photo in enumerate(sorted(options.photos.rglob("*.jpg"))):
                photos.append(scratch / f"{number}.bmp")
                with Image.open(photo) as image:
                    image.convert("RGB").resize((SIDE, SIDE)).save(photos[-1])
            write_network(scratch / "means.onnx")
            command = [
                sys.executable,
                "-m",
                "robustfeat",
                "import",
                scratch / "means.onnx",
                "--no-int8",
                "--mean=0",
                "--std=1",
            ]
            subprocess.run([*map(str, command), "--quiet", f"--out={scratch / 'model'}"], check=True)
            lines += measure(photos, scratch, count, options.rows_per_file)
    print_table(f"{FEATURES} features, {options.rows_per_file:,} rows per file", lines)
    if options.out:
        options.out.write_text(json.dumps({"hardware": hardware(), "lines": lines}, indent=2) + "\n")


if __name__ == "__main__":
    main()
