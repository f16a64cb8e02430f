"""Finds the processors and the memory available to this process, and starts child processes."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

__all__ = [
    "INHERITS",
    "NOT_BLOCKING",
    "allow_open_files",
    "anonymous_bytes",
    "anonymous_memory",
    "available_cpus",
    "available_memory",
    "child_processes",
    "cpu_quota",
    "die_with_parent",
    "offer_to_die_first",
    "open_standard_streams",
    "python_command",
    "visible_cpus",
]

CGROUP = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
_PR_SET_PDEATHSIG = 1

INHERITS = hasattr(os, "fork")
"""Whether processes inherit open files by number. On Windows they do not: decoders are threads, and `serve` is one
process."""

NOT_BLOCKING = getattr(os, "O_NONBLOCK", 0)
"""Opens a pipe without waiting for its writer. Windows has no such flag, and no such pipes in folders."""


def available_cpus(cgroup: Path = CGROUP) -> int:
    """Number of processors within the affinity mask and the cgroup's quota, at least 1.

    By default, engines count the host's cores. A container with a quota of 2 on a host of 64 cores then runs 64 threads
    on 2 cores and loses half its throughput.
    """
    quota = cpu_quota(cgroup)
    return max(1, visible_cpus() if quota is None else min(visible_cpus(), math.ceil(quota)))


def visible_cpus() -> int:
    """Number of processors in the affinity mask, which programs see that ignore quotas."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota(cgroup: Path = CGROUP, membership: Path = MEMBERSHIP) -> float | None:
    """Processors that this process's cgroup (v2 or v1) and its parents allow; None without a limit.

    Args:
        cgroup: the mount point of the hierarchy.
        membership: the file that names this process's group.
    """
    quotas = [quota for folder in _groups(cgroup, membership, "cpu") if (quota := _quota(folder)) is not None]
    return min(quotas, default=None)


def available_memory(
    cgroup: Path = CGROUP, membership: Path = MEMBERSHIP, meminfo: Path = Path("/proc/meminfo")
) -> int | None:
    """Memory available without swapping, in bytes, within the limits of the cgroups.

    None if the system does not report it. A cgroup's file cache counts as available, since it can be dropped.
    """
    rooms = []
    with suppress(OSError, ValueError, StopIteration):
        line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
        rooms.append(int(line.split()[1]) * 1024)
    for folder in _groups(cgroup, membership, "memory"):
        for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            with suppress(OSError, ValueError):  # "max", which is not a number, means no limit
                allowed, used = int((folder / limit).read_text()), int((folder / usage).read_text())
                rooms.append(max(0, allowed - used + _file_cache(folder)))
    return min(rooms, default=None)


def allow_open_files(count: int) -> None:
    """Raises this process's limit of open files so that `count` more fit, as far as its hard limit allows."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 512
    if soft != resource.RLIM_INFINITY and soft < wanted:
        new = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, new), hard))


def open_standard_streams() -> None:
    """Connects closed standard streams, as some daemons leave them, to the null device.

    Otherwise the next file or socket would get their numbers, and then the output for a terminal.
    """
    for number, (name, mode) in enumerate({"stdin": "r", "stdout": "w", "stderr": "w"}.items()):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def python_command(code: str, *arguments: str) -> list[str]:
    """A command line that runs `code` with this process's module search path."""
    return [sys.executable, "-P", "-c", f"import sys; sys.path[:] = {sys.path!r}\n{code}", *arguments]


def die_with_parent(number: signal.Signals, parent: int) -> None:
    """Makes the system signal this process, also after `exec`, when its parent ends. Linux only.

    Args:
        number: the signal.
        parent: the parent's process id from before this process started. If the parent has changed, this process
            ends.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os._exit(1)


def anonymous_memory() -> int:
    """Opens an empty, nameless file in memory. It leaves nothing behind and does not depend on disk space."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("robustfeat")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def anonymous_bytes(pid: int) -> int:
    """Resident memory of a process that no file backs and no other process shares; 0 where the system does not tell."""
    with suppress(OSError, ValueError):
        _, resident, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
        return (resident - shared) * os.sysconf("SC_PAGE_SIZE")
    return 0


def child_processes(pid: int) -> list[int]:
    """The processes that a process has started; empty where the system does not tell."""
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError, ValueError):
            found += map(int, file.read_text().split())
    return found


def offer_to_die_first() -> None:
    """Makes the system kill this process first when memory runs out. Linux only."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _groups(cgroup: Path, membership: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's cgroup, its parents and the roots, in v2 and in v1's `controller`."""
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


def _file_cache(folder: Path) -> int:
    with suppress(OSError, ValueError):
        numbers = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(numbers.get("inactive_file", numbers.get("total_inactive_file", 0)))
    return 0
