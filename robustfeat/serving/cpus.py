"""How many processors this process may really use."""

from __future__ import annotations

import math
import os
from pathlib import Path

__all__ = ["CGROUP", "available_cpus", "cpu_quota", "visible_cpus"]

CGROUP = Path("/sys/fs/cgroup")


def available_cpus(cgroup: Path = CGROUP) -> int:
    """Processors within the affinity mask and the cgroup's quota; at least 1.

    Engines count the host's cores by default; a container with a quota of 2 on a host of 64 then runs 64 threads
    on 2 cores and loses half its throughput.
    """
    quota = cpu_quota(cgroup)
    return max(1, visible_cpus() if quota is None else min(visible_cpus(), math.ceil(quota)))


def visible_cpus() -> int:
    """Processors in the affinity mask: what programs see that do not know of quotas."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota(cgroup: Path = CGROUP) -> float | None:
    """Processors that the cgroup grants (v2, then v1); None where there is no limit."""
    try:
        limit, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            limit = (cgroup / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    return None if limit in {"max", "-1"} else int(limit) / int(period)
