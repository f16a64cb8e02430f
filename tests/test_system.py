import os
from pathlib import Path

import pytest

from robustfeat.system import available_cpus, cpu_quota

CORES = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("content", "expected"),
    [("100000 100000", 1), ("50000 100000", 1), ("max 100000", CORES), ("9900000 100000", CORES)],
)
def test_the_quota_of_cgroup_v2_counts(tmp_path: Path, content: str, expected: int) -> None:
    (tmp_path / "cpu.max").write_text(content + "\n")
    assert available_cpus(tmp_path) == expected


def test_the_quota_of_cgroup_v1_counts(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("100000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert available_cpus(tmp_path) == 1


def test_the_quota_of_a_group_within_counts_and_so_do_those_around_it(tmp_path: Path) -> None:
    inner = tmp_path / "system.slice" / "job.service"
    inner.mkdir(parents=True)
    membership = tmp_path / "membership"
    membership.write_text("0::/system.slice/job.service\n")
    assert cpu_quota(tmp_path, membership) is None
    (inner / "cpu.max").write_text("400000 100000\n")
    assert cpu_quota(tmp_path, membership) == 4
    (inner.parent / "cpu.max").write_text("250000 100000\n")
    assert cpu_quota(tmp_path, membership) == 2.5


def test_the_quota_of_a_group_of_version_1_counts(tmp_path: Path) -> None:
    group = tmp_path / "cpu" / "docker" / "abc"
    group.mkdir(parents=True)
    (group / "cpu.cfs_quota_us").write_text("150000\n")
    (group / "cpu.cfs_period_us").write_text("100000\n")
    membership = tmp_path / "membership"
    membership.write_text("5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n")
    assert cpu_quota(tmp_path, membership) == 1.5


def test_without_a_cgroup_the_affinity_counts(tmp_path: Path) -> None:
    assert available_cpus(tmp_path) == CORES
