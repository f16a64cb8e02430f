"""Metrics: a full disk never ends a worker, and a worker that starts never disturbs the others."""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import BinaryIO

import pytest
from prometheus_client.mmap_dict import MmapedDict

from robustfeat.files import reserve_space
from robustfeat.serving.http.process.metrics import MOST_KEYS, Metrics
from tests.serving.http.conftest import serving, wait_until
from tests.serving.http.test_life import AT_ONCE
from tests.serving.http.test_reload import reload


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    return tmp_path


def fill(metrics: Metrics, models: int) -> None:
    """Counts more than a server can: every label, with long names."""
    for number in range(models):
        counted = metrics.of_model(f"{number:096}")
        counted.add_queue(lambda: 1.0)
        counted.decoded(0.1, 0.1)
        counted.ran(0.1, 1)
        counted.answered(1, 1)
        counted.set_capacity(8)
        model = {"model": f"{number:096}", "name": "n" * 96, "revision": "0" * 40, "config_hash": "0" * 64}
        metrics.loaded("model", **model, engine="onnxruntime", precision="fp32", device="cpu")
        metrics.loaded("head", head=f"{number:096}", model=f"{number:096}", revision="0" * 40, sha256="0" * 64)
        metrics.head_images(f"{number:096}", 1)
    for route in range(10):
        for status in range(30):
            metrics.request(f"/some/long/route/{route}", status)
    for reason in range(60):
        metrics.error(f"a_reason_with_a_long_name_{reason}")
    for number in range(2 * MOST_KEYS):
        metrics.key_images(f"{number:064}", 1)
        for status in range(20):
            metrics.key_request(f"{number:064}", status)
    metrics.measure_memory()
    metrics.seconds(0.1)
    metrics.count()


@pytest.mark.parametrize("models", [1, 20])
def test_the_space_of_all_numbers_is_taken_at_the_start(folder: Path, models: int) -> None:
    metrics = Metrics(0, models=models)
    before = {file.name: file.stat().st_size for file in folder.iterdir()}
    assert sorted(before) == ["counter_0.db", "gauge_livemax_0.db", "gauge_livesum_0.db", "histogram_0.db"]
    assert all(file.stat().st_blocks * 512 >= file.stat().st_size for file in folder.iterdir())
    fill(metrics, models)
    assert {file.name: file.stat().st_size for file in folder.iterdir()} == before
    assert metrics.exposition().count(b"robustfeat_images_total{") == 2 * models


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        os.ftruncate(descriptor, length // 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)


@pytest.mark.usefixtures("full_disk")
def test_a_worker_counts_for_itself_where_there_is_no_space(folder: Path) -> None:
    metrics = Metrics(0, models=2)
    assert not metrics.shared
    fill(metrics, 2)
    assert not list(folder.iterdir())
    said = metrics.exposition()
    assert said.count(b"robustfeat_images_total{") == 4
    assert b'robustfeat_queue_images{model="' in said


def count_requests(metrics: Metrics, number: int) -> None:
    for _ in range(number):
        metrics.request("/embed", 200)
    metrics.count()


def test_a_full_disk_removes_no_counts_that_others_read(folder: Path, request: pytest.FixtureRequest) -> None:
    reader = Metrics(1)
    count_requests(Metrics(0), 3)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    request.getfixturevalue("full_disk")
    assert not Metrics(0).shared
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert b'robustfeat_requests_total{route="/embed",status="200"} 3.0' in reader.exposition()


def test_a_worker_goes_on_with_the_counts_of_its_place(folder: Path) -> None:
    count_requests(Metrics(0), 3)
    size = (folder / "counter_0.db").stat().st_size
    for _ in range(3):
        count_requests(Metrics(0), 1)
    assert b'robustfeat_requests_total{route="/embed",status="200"} 6.0' in Metrics(1).exposition()
    assert (folder / "counter_0.db").stat().st_size < 1.1 * size


@pytest.mark.parametrize("content", [b"", bytes(3), bytes(8), (4096).to_bytes(4, sys.byteorder) + bytes(60)])
def test_a_file_that_is_not_complete_is_not_read(folder: Path, content: bytes) -> None:
    metrics = Metrics(0)
    count_requests(metrics, 2)
    for kind in ("counter", "gauge_livesum"):
        (folder / f"{kind}_1.db").write_bytes(content)
    assert b'robustfeat_requests_total{route="/embed",status="200"} 2.0' in metrics.exposition()
    count_requests(Metrics(1), 1)  # starts there anew
    assert b'robustfeat_requests_total{route="/embed",status="200"} 3.0' in metrics.exposition()


def test_a_file_appears_when_it_is_complete(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[int]()

    def watched(file: BinaryIO, size: int) -> None:
        reserve_space(file, size)
        seen.append(len(list(folder.glob("*.db"))))

    monkeypatch.setattr("robustfeat.serving.http.process.metrics.reserve_space", watched)
    metrics = Metrics(0)
    assert seen == [0, 0, 0, 0]
    values = {file.name: list(MmapedDict.read_all_values_from_file(str(file))) for file in folder.glob("*.db")}
    assert len(values) == 4
    assert metrics.shared


def test_metrics_are_answered_while_workers_start(clothes: Path) -> None:
    """Each start makes files that the others read: what is asked meanwhile must not meet half of one."""
    with serving("--head", clothes, "--workers", 2, constants=AT_ONCE) as server:
        wait_until(lambda: server.metric("robustfeat_ready_workers") == 2)
        stop, statuses = threading.Event(), Counter[int]()

        def ask() -> None:
            while not stop.is_set():
                statuses[server.get("/metrics").status] += 1

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            for _ in range(2):
                reload(server)
            asked = statuses.total()
            wait_until(lambda: statuses.total() > asked + 10)
        finally:
            stop.set()
            asking.join()
    assert set(statuses) == {200}
