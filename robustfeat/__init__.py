"""Train, publish, download and serve robust image features.

The names in `__all__` are the public interface (docs/python.md). All other modules are internal.
"""

import importlib
from typing import TYPE_CHECKING, Any

from robustfeat.errors import (
    CheckpointError,
    DataError,
    DecodeError,
    DivergedError,
    EngineError,
    ExportError,
    HeadError,
    HubError,
    InputError,
    ModelFolderError,
    NotFiniteError,
    RobustFeatError,
    StoppedError,
    TrainingError,
    UnreachableError,
)

if TYPE_CHECKING:
    from robustfeat.serving.bulk.calls import embed
    from robustfeat.serving.bulk.embedding import EmbeddingResult
    from robustfeat.serving.extractor import FeatureExtractor
    from robustfeat.serving.heads.features import Features, load
    from robustfeat.serving.heads.head import Head
    from robustfeat.serving.sklearn import ImageFeatures

__version__ = "0.2.0"
__all__ = [
    "CheckpointError",
    "DataError",
    "DecodeError",
    "DivergedError",
    "EmbeddingResult",
    "EngineError",
    "ExportError",
    "FeatureExtractor",
    "Features",
    "Head",
    "HeadError",
    "HubError",
    "ImageFeatures",
    "InputError",
    "ModelFolderError",
    "NotFiniteError",
    "RobustFeatError",
    "StoppedError",
    "TrainingError",
    "UnreachableError",
    "__version__",
    "embed",
    "load",
]

# Import on first use, so `robustfeat --help` does not load NumPy, an inference engine and scikit-learn.
_MODULES = {
    "EmbeddingResult": "robustfeat.serving.bulk.embedding",
    "FeatureExtractor": "robustfeat.serving.extractor",
    "Features": "robustfeat.serving.heads.features",
    "Head": "robustfeat.serving.heads.head",
    "ImageFeatures": "robustfeat.serving.sklearn",
    "embed": "robustfeat.serving.bulk.calls",
    "load": "robustfeat.serving.heads.features",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'robustfeat' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
