"""Computes a model folder's features for images, and predictions from features."""

from typing import TYPE_CHECKING, Any

__all__ = ["FeatureExtractor", "Head", "ImageFeatures"]

if TYPE_CHECKING:
    from robustfeat.serving.extractor import FeatureExtractor
    from robustfeat.serving.heads.head import Head
    from robustfeat.serving.sklearn import ImageFeatures

_HOMES = {"FeatureExtractor": "extractor", "Head": "heads.head", "ImageFeatures": "sklearn"}


def __getattr__(name: str) -> Any:
    # Import on first use, since scikit-learn takes seconds.
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"robustfeat.serving.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'robustfeat.serving' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
