"""Metrics: a full disk never ends a worker."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from robustfeat.serving.http.process.metrics import MOST_KEYS, Metrics


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


def test_a_worker_counts_for_itself_where_there_is_no_space(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        os.ftruncate(descriptor, length // 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    metrics = Metrics(0, models=2)
    assert not metrics.shared
    fill(metrics, 2)
    assert not list(folder.iterdir())
    said = metrics.exposition()
    assert said.count(b"robustfeat_images_total{") == 4
    assert b'robustfeat_queue_images{model="' in said
