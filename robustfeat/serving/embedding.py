"""Keeps the import of `embed_files` from version 0.1. Version 0.3 will remove it."""

from __future__ import annotations

import warnings

from robustfeat.serving.bulk.embedding import EmbeddingResult, embed_files

__all__ = ["EmbeddingResult", "embed_files"]

warnings.warn(
    "robustfeat.serving.embedding moved: use robustfeat.embed, or robustfeat.serving.bulk.embedding",
    DeprecationWarning,
    stacklevel=2,
)
