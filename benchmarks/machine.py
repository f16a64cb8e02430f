"""What benchmarks say of the machine, and how they watch a command's memory."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from robustfeat.system import available_cpus

__all__ = ["hardware", "peak_memory"]

FLAGS = "avx2 avx512f avx512_vnni avx_vnni avx512_bf16 amx_tile amx_int8 amx_bf16 asimddp i8mm bf16 sve"


def peak_memory(command: list[str]) -> tuple[int, int, float]:
    """Peaks in KiB over a command's run: RssAnon of all its processes, RssShmem of the largest; and its seconds."""
    anonymous = shared = 0
    began = time.perf_counter()
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            parts = [memory_of(pid) for pid in processes(process.pid)]
            anonymous = max(anonymous, sum(part[0] for part in parts))
            shared = max(shared, *(part[1] for part in parts))
            time.sleep(0.1)
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}")
    return anonymous, shared, time.perf_counter() - began


def processes(pid: int) -> Iterator[int]:
    yield pid
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = file.read_text().split()
        except OSError:  # the thread has ended
            continue
        for child in children:
            yield from processes(int(child))


def memory_of(pid: int) -> tuple[int, int]:
    try:
        found = dict(re.findall(r"(RssAnon|RssShmem):\s+(\d+)", Path(f"/proc/{pid}/status").read_text()))
    except OSError:
        found = {}
    return int(found.get("RssAnon", 0)), int(found.get("RssShmem", 0))


def hardware() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text()
    name = re.search(r"model name\s*:\s*(.*)", info)
    flags = set(" ".join(re.findall(r"(?:flags|Features)\s*:\s*(.*)", info)[:1]).split())
    return {
        "cpu": name[1] if name else platform.machine(),
        "flags": [flag for flag in FLAGS.split() if flag in flags],
        "cores": available_cpus(),
        "load_before": os.getloadavg()[0],
    }
