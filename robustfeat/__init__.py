"""Robust image features that anyone can train, publish, download and serve."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["FeatureExtractor", "__version__"]

if TYPE_CHECKING:
    from robustfeat.serving.extractor import FeatureExtractor


def __getattr__(name: str) -> Any:
    # Lazy, so that `robustfeat --help` does not pay for NumPy and an inference engine.
    if name == "FeatureExtractor":
        from robustfeat.serving.extractor import FeatureExtractor

        return FeatureExtractor
    raise AttributeError(f"module 'robustfeat' has no attribute {name!r}")
