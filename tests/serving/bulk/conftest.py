"""Embedding in small batches and shards, so that few images are several of each."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from robustfeat import FeatureExtractor
from robustfeat.serving.bulk.embedding import EmbeddingResult, embed_files
from robustfeat.serving.bulk.storage import LocalFolder
from robustfeat.serving.inputs.listing import list_inputs

Embed = Callable[..., EmbeddingResult]


def fill_disk_after(moved: int, patch: pytest.MonkeyPatch) -> None:
    """The disk is full when some files of a new output have been moved to their places."""
    move, count = LocalFolder.move, itertools.count()

    def move_some(self: LocalFolder, name: str, target: str) -> None:
        if next(count) >= moved:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        move(self, name, target)

    patch.setattr(LocalFolder, "move", move_some)


@pytest.fixture(scope="module")
def extractor(model: Path) -> FeatureExtractor:
    return FeatureExtractor.from_pretrained(model, threads=2, streams=2)


@pytest.fixture(scope="module")
def folder(example_files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 images of which two are broken: 8 shards of 4 rows."""
    root = tmp_path_factory.mktemp("images")
    for number in range(30):
        shutil.copy(example_files[number], root / f"{number:02}.jpg")
    (root / "05.jpg").write_bytes(b"\xff\xd8\xff junk")
    (root / "29.jpg").write_bytes(b"")
    (root / "notes.txt").write_text("left out")
    return root


@pytest.fixture(scope="module")
def embed(extractor: FeatureExtractor) -> Embed:
    def call(place: Path, out: Path, **options: Any) -> EmbeddingResult:
        options = {"batch_size": 4, "shard_rows": 4, "workers": 1, "quiet": True, **options}
        with list_inputs([place]) as inputs:
            return embed_files(extractor, inputs, out, **options)

    return call
