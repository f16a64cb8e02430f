"""How many processors this process may really use."""

from __future__ import annotations

import math
import os
from pathlib import Path

__all__ = ["available_cpus"]


def available_cpus(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Processors within the affinity mask and the cgroup's quota; at least 1.

    Engines count the host's cores by default; a container with a quota of 2 on a host of 64 then runs 64 threads
    on 2 cores and loses half its throughput.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(count, math.ceil(_quota(cgroup))))


def _quota(cgroup: Path) -> float:
    """Processors that the cgroup grants (v2, then v1); a large number where there is no limit."""
    try:
        limit, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            limit = (cgroup / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return 1e6
    if limit in {"max", "-1"}:
        return 1e6
    return int(limit) / int(period)
