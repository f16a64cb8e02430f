import os
from pathlib import Path

import pytest

from robustfeat.serving.cpus import available_cpus

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


def test_without_a_cgroup_the_affinity_counts(tmp_path: Path) -> None:
    assert available_cpus(tmp_path) == CORES
