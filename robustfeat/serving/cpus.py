"""How many processors this process may really use."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

__all__ = ["CGROUP", "MEMBERSHIP", "available_cpus", "cpu_quota", "groups", "visible_cpus"]

CGROUP = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


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


def cpu_quota(cgroup: Path = CGROUP, membership: Path = MEMBERSHIP) -> float | None:
    """Processors that this process's cgroup and those around it grant (v2 and v1); None where there is no limit.

    Args:
        cgroup: where the hierarchy is mounted.
        membership: tells which group this process is in.
    """
    quotas = [quota for folder in groups(cgroup, membership, "cpu") if (quota := _quota(folder)) is not None]
    return min(quotas, default=None)


def groups(cgroup: Path, membership: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's group, of those around it, and of the roots, in v2 and in v1's `controller`."""
    roots = {"": cgroup, controller: cgroup / controller}
    yield from roots.values()
    lines = []
    with suppress(OSError):
        lines = membership.read_text().splitlines()
    for line in lines:
        _, controllers, place = line.split(":", 2)
        for name in {"", controller} & set(controllers.split(",")):
            group = PurePosixPath(place.lstrip("/"))
            yield from (roots[name] / part for part in (group, *group.parents) if part.parts)


def _quota(group: Path) -> float | None:
    with suppress(OSError, ValueError):
        limit, period = (group / "cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    with suppress(OSError, ValueError):
        limit, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return None if int(limit) < 0 else int(limit) / int(period)
    return None
