"""Small networks and one thread: two workers with two threads each would wait for each other most of the time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.conftest import Share


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Each test starts with one thread where tests run side by side; a training in the process may change that."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws none at the end of a run in this process: they take half a second of a core, and few tests look at them."""
    monkeypatch.setattr("robustfeat.training.loop.trainer.draw_curves", lambda folder, concepts: None)


@pytest.fixture
def narrow_run(dataset: Path, share: Share) -> Path:
    """As `finished_run`, of a narrow network."""
    from robustfeat.training.loop.trainer import train
    from tests.training.small import recipe

    return share("narrow-run", lambda out: train(dataset, recipe(dataset), out, workers=0, threads=1, quiet=True))
