"""Repositories of transformers, each made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Share
from tests.transformers_models import write_repository

Repositories = Callable[[str], Path]


@pytest.fixture(scope="session")
def repositories(share: Share, example_files: list[Path]) -> Repositories:
    """The folder of a family, with weights for PyTorch and ONNX; see `write_repository`."""
    return lambda name: share(f"transformers-{name}", lambda out: write_repository(name, out, example_files[:8]))
