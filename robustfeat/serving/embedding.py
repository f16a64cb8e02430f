"""The place of `embed_files` in version 0.1; it will go with version 0.3."""

from __future__ import annotations

import warnings

from robustfeat.serving.bulk.embedding import EmbeddingResult, embed_files

__all__ = ["EmbeddingResult", "embed_files"]

warnings.warn(
    "robustfeat.serving.embedding moved: use robustfeat.embed, or robustfeat.serving.bulk.embedding",
    DeprecationWarning,
    stacklevel=2,
)
