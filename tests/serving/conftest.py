"""Photographs and the built-in model."""

from __future__ import annotations

from pathlib import Path

import pytest

from robustfeat import FeatureExtractor


@pytest.fixture(scope="session")
def photos(example_files: list[Path]) -> list[bytes]:
    return [file.read_bytes() for file in example_files[::5]]


@pytest.fixture(scope="session")
def extractor() -> FeatureExtractor:
    return FeatureExtractor.from_pretrained()
