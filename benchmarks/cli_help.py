"""Time until `robustfeat --help` has answered, beside a bare interpreter and one that imports click.

    python benchmarks/cli_help.py --runs 20 --json out.json

Prints the median and the ratio to the bare interpreter. Target: 0.15 s with a warm disk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = {
    "python": [sys.executable, "-c", "pass"],
    "python + click": [sys.executable, "-c", "import click"],
    "robustfeat --help": [sys.executable, "-m", "robustfeat", "--help"],
}


def seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    for command in COMMANDS.values():
        seconds(command)
    # In turn, so that a drift of the machine's speed meets all of them.
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(options.runs):
        for name, command in COMMANDS.items():
            times[name].append(seconds(command))
    bare = statistics.median(times["python"])
    rows = [
        {
            "command": name,
            "median_s": round(statistics.median(values), 4),
            "ratio": round(statistics.median(values) / bare, 2),
        }
        for name, values in times.items()
    ]
    for row in rows:
        print(f"{row['command']:20}{row['median_s']:8.3f} s{row['ratio']:8.2f} x")
    if options.json:
        Path(options.json).write_text(json.dumps({"runs": options.runs, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
