"""Small networks and one thread: two workers with two threads each would wait for each other most of the time."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Each test starts with one thread where tests run side by side; a training in the process may change that."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(1)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks that are trained in this process are narrow."""
    from tests.training.narrow import NarrowResNet

    monkeypatch.setattr("robustfeat.training.network.resnet18", NarrowResNet)
