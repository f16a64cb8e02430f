"""How much memory this process may still take."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from robustfeat.serving.cpus import CGROUP, MEMBERSHIP, groups

__all__ = ["available_memory"]


def available_memory(
    cgroup: Path = CGROUP, membership: Path = MEMBERSHIP, meminfo: Path = Path("/proc/meminfo")
) -> int | None:
    """Bytes that can be had without swapping: the host's, and at most what its cgroups still grant.

    None where the system does not tell. What a cgroup holds as file cache counts as available: it can be dropped.
    """
    rooms = []
    with suppress(OSError, ValueError, StopIteration):
        line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
        rooms.append(int(line.split()[1]) * 1024)
    for folder in groups(cgroup, membership, "memory"):
        for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            with suppress(OSError, ValueError):  # "max" is no number: no limit
                allowed, used = int((folder / limit).read_text()), int((folder / usage).read_text())
                rooms.append(max(0, allowed - used + _file_cache(folder)))
    return min(rooms, default=None)


def _file_cache(folder: Path) -> int:
    with suppress(OSError, ValueError):
        numbers = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(numbers.get("inactive_file", numbers.get("total_inactive_file", 0)))
    return 0
