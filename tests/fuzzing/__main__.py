"""`python -m tests.fuzzing PARSER SECONDS SEED FOLDER`: writes what it finds to the folder, a line for each to stdout.

The input that is tried lies in FOLDER/PARSER.trying, also when it has ended the process.
"""

from __future__ import annotations

import faulthandler
import hashlib
import mmap
import resource
import sys
from pathlib import Path

from tests.fuzzing.engine import fuzz
from tests.fuzzing.parsers import PARSERS

MEMORY_BYTES = 2**31
"""More than an input of 128 KiB should take, above what the process has."""


def main(name: str, seconds: float, seed: int, folder: Path) -> None:
    faulthandler.enable()
    parser = PARSERS[name]()
    for data in parser.seeds:
        parser.run(data)
    trying = folder / f"{name}.trying"
    trying.write_bytes(bytes(2**18))
    with open(trying, "r+b") as handle:
        shared = mmap.mmap(handle.fileno(), 0)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES, resource.RLIM_INFINITY))
    tried, known = 0, set[object]()

    def note(data: bytes) -> None:
        nonlocal tried
        tried += 1
        shared[: 4 + len(data)] = len(data).to_bytes(4, "little") + data

    for finding in fuzz(parser, seed=seed, seconds=seconds, note=note):
        error, _, where = finding.what.rpartition(" in ")
        kind = (error.partition(":")[0], where) if error else "time"
        if kind in known:
            continue
        known.add(kind)
        file = folder / f"{name}-{hashlib.sha256(finding.data).hexdigest()[:12]}"
        file.write_bytes(finding.data)
        print(f"{file.name}: {finding.what}", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{name}: {tried:,} inputs, {len(known)} kinds of findings, at most {peak:,} MiB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
