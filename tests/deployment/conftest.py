"""Photographs to send."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def photos(example_files: list[Path]) -> list[bytes]:
    return [file.read_bytes() for file in example_files[::5]]
