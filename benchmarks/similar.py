"""The search of `robustfeat similar` beside NumPy's own product and faiss, in one run.

    python benchmarks/similar.py --features feats.npy --out similar.json [--rows 1000000] [--approximate]

The collection has --rows rows: mixtures of two rows of --features each, with noise of a tenth of their deviation; the
queries are further ones. It lies in a file that is memory-mapped, and each contender is warm.

- lone: milliseconds of one query, the median over --rounds, in which contenders take turns;
- many: queries per second, of 1,000 queries at once.

NumPy only multiplies, in blocks, and chooses nothing. faiss is IndexFlatIP on rows of length 1 in memory; it is left
out where it is not installed. Both of these hold the rows in memory, ours does not. The nearest rows of faiss and of
ours are compared. --approximate measures the index of `robustfeat similar --approximate` instead: how long it takes
to make, its bytes, its recall of the 10 nearest, and milliseconds of a lone query.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from machine import hardware
from robustfeat import Features
from robustfeat.serving.collections.approximate import index_place, make_index, open_index
from robustfeat.serving.collections.directions import Directions, to_units
from robustfeat.serving.collections.neighbours import find_neighbours

K = 10
_PART = 10_000
_BLOCK = 8192
Rows = NDArray[np.float32]
Search = Callable[[Rows], Any]


def mixtures(source: Rows, count: int, seed: int) -> Rows:
    """(count, D) rows like those of `source`."""
    rng = np.random.default_rng(seed)
    made = np.empty((count, source.shape[1]), np.float32)
    spread = np.float32(0.1) * source.std(0)
    for start in range(0, count, _PART):
        part = made[start : start + _PART]
        share = rng.uniform(0.5, 1, (len(part), 1)).astype(np.float32)
        part[:] = share * source[rng.integers(0, len(source), len(part))]
        part += (1 - share) * source[rng.integers(0, len(source), len(part))]
        part += spread * rng.standard_normal(part.shape, dtype=np.float32)
    return made


def contenders(collection: Features, threads: int) -> dict[str, Search]:
    directions = Directions(collection)
    values = np.asarray(collection.values)

    def product(queries: Rows) -> None:
        for start in range(0, len(values), _BLOCK):
            queries @ held[start : start + _BLOCK].T

    found: dict[str, Search] = {"robustfeat": lambda queries: find_neighbours(directions, queries, K).rows}
    held = np.array(values)
    held /= np.linalg.norm(held, axis=1, keepdims=True)
    found["NumPy's product"] = product
    if importlib.util.find_spec("faiss"):
        import faiss

        faiss.omp_set_num_threads(threads)
        index = faiss.IndexFlatIP(held.shape[1])
        index.add(held)
        found["faiss flat"] = lambda queries: index.search(queries, K)[1]
    return found


def timed(search: Search, queries: Rows) -> tuple[float, float]:
    """Seconds of wall clock and of processors."""
    before, began = time.process_time(), time.perf_counter()
    search(queries)
    return time.perf_counter() - began, time.process_time() - before


def measure(searches: dict[str, Search], queries: Rows, rounds: int) -> dict[str, dict[str, float]]:
    lone: dict[str, list[tuple[float, float]]] = {name: [] for name in searches}
    for search in searches.values():
        search(queries[:1])
    for number in range(rounds):
        for name, search in searches.items():
            lone[name].append(timed(search, queries[number : number + 1]))
    found = {}
    for name, search in searches.items():
        wall, processor = timed(search, queries)
        found[name] = {
            "lone_ms": 1000 * statistics.median(one for one, _ in lone[name]),
            "lone_processor_ms": 1000 * statistics.median(one for _, one in lone[name]),
            "many_per_s": len(queries) / wall,
            "many_per_processor_s": len(queries) / processor,
        }
        print(name, found[name], flush=True)
    return found


def compare(searches: dict[str, Search], queries: Rows, rounds: int) -> dict[str, Any]:
    result: dict[str, Any] = measure(searches, queries, rounds)
    if "faiss flat" in searches:
        ours, theirs = (searches[name](queries) for name in ("robustfeat", "faiss flat"))
        result["same_rows"] = float(np.mean(np.sort(ours, 1) == np.sort(theirs, 1)))
        for key in ("lone_processor_ms", "lone_ms"):
            result[f"ratio_{key}"] = result["faiss flat"][key] / result["robustfeat"][key]
        for key in ("many_per_processor_s", "many_per_s"):
            result[f"ratio_{key}"] = result["robustfeat"][key] / result["faiss flat"][key]
    return result


def approximate(collection: Features, queries: Rows, rounds: int, threads: int) -> dict[str, float]:
    none = np.full(len(queries), -1)
    before, began = time.process_time(), time.perf_counter()
    make_index(collection, threads=threads)
    made = {"made_s": time.perf_counter() - began, "made_processor_s": time.process_time() - before}
    made["bytes_per_row"] = Path(index_place(collection)).stat().st_size / len(collection)
    index = open_index(collection, threads=threads)
    found = index.search(queries, K, none).rows
    exact = find_neighbours(Directions(collection), queries, K).rows
    made["recall"] = float(np.mean([len(set(a) & set(b)) / K for a, b in zip(found, exact, strict=True)]))
    lone = [timed(lambda one: index.search(one, K, none[:1]), queries[at : at + 1]) for at in range(rounds)]
    made["lone_ms"] = 1000 * statistics.median(one for one, _ in lone)
    made["lone_processor_ms"] = 1000 * statistics.median(one for _, one in lone)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=Path, required=True, help="a .npy file of `robustfeat embed`")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--approximate", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    source = np.load(options.features)
    source = source[np.isfinite(source).all(1)]
    with tempfile.TemporaryDirectory() as scratch, threadpool_limits(options.threads):
        place = Path(scratch, "rows.npy")
        np.save(place, mixtures(source, options.rows, 0))
        values = np.load(place, mmap_mode="r")
        paths = [str(row) for row in range(options.rows)]
        collection = Features(str(place), values, paths, {}, None, meta_sha256="0" * 64)
        queries = to_units(mixtures(source, max(options.queries, options.rounds), 1)).astype(np.float32)
        result: dict[str, Any] = {"hardware": hardware(), "shape": list(values.shape), "threads": options.threads}
        if options.approximate:
            result["approximate"] = approximate(collection, queries, options.rounds, options.threads)
        else:
            result |= compare(contenders(collection, options.threads), queries, options.rounds)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
