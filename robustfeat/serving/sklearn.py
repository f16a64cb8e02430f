"""Defines `ImageFeatures`, which embeds images as a step of a scikit-learn pipeline."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import Tags

from robustfeat.errors import DecodeError
from robustfeat.serving.engines.options import MAX_PIXELS, RunOptions
from robustfeat.serving.extractor import FeatureExtractor
from robustfeat.serving.feature_cache import Content, FeatureCache, embed_contents
from robustfeat.serving.identity import ModelIdentity

__all__ = ["ImageFeatures"]


class ImageFeatures(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """A transformer that embeds images. It learns nothing.

    Images are paths, encoded bytes, Pillow images or (H, W, 3) uint8 RGB arrays, in a list or an array.

    Parameters are stored as given, as scikit-learn requires. The model is loaded on first use, in every process of a
    search.

    Args:
        model: `builtin`, a model folder, or ORG/NAME on the Hub.
        revision: a branch, tag or commit on the Hub.
        precision, engine, device, threads, decoding, max_pixels, pooling: see `FeatureExtractor.from_pretrained`.
        on_error: `raise`, or `nan` for a row of NaN for each image that cannot be read.
        cache: a file that caches features by image content. Searches and later runs then embed each image once.

    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.svm import LinearSVC
    >>> pipeline = make_pipeline(ImageFeatures(), LinearSVC(dual=False))
    """

    __module__ = "robustfeat.serving"  # pickles look the class up here

    def __init__(
        self,
        model: str | os.PathLike[str] = "builtin",
        *,
        revision: str | None = None,
        precision: str = "fp32",
        engine: str = "auto",
        device: str = "auto",
        threads: int | None = None,
        decoding: str = "exact",
        max_pixels: int = MAX_PIXELS,
        pooling: str = "auto",
        on_error: str = "raise",
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        self.model = model
        self.revision = revision
        self.precision = precision
        self.engine = engine
        self.device = device
        self.threads = threads
        self.decoding = decoding
        self.max_pixels = max_pixels
        self.pooling = pooling
        self.on_error = on_error
        self.cache = cache

    def fit(self, X: Iterable[Any], y: Any = None) -> ImageFeatures:
        """Loads the model.

        Raises:
            ModelFolderError, HubError, EngineError: see `FeatureExtractor.from_pretrained`.
            TypeError: X is not a list of images.
        """
        _images(X)
        self._open()
        return self

    def transform(self, X: Iterable[Any]) -> NDArray[np.float32]:
        """Embeds images to (n, D) float32.

        Raises:
            DecodeError: an image cannot be read and `on_error` is `raise`.
            TypeError: X is not a list of images.
        """
        images = _images(X)
        extractor = self._open()
        if self.cache is None:
            return extractor.embed(images, on_error=self.on_error)
        cache = FeatureCache(self.cache, extractor)
        features = np.full((len(images), extractor.feature_size), np.nan, np.float32)
        for start in range(0, len(images), extractor.batch_size):
            batch = images[start : start + extractor.batch_size]
            features[start : start + len(batch)] = self._embed_batch(start, batch, extractor, cache)
        return features

    def _embed_batch(
        self, start: int, batch: list[Any], extractor: FeatureExtractor, cache: FeatureCache
    ) -> NDArray[np.float32]:
        # Read each image once, so the key belongs to the embedded bytes.
        contents = [_content_or_error(image, extractor) for image in batch]

        def refuse(place: int, error: DecodeError) -> DecodeError:
            image = batch[place]
            is_named = isinstance(contents[place], DecodeError) or not isinstance(image, (str, os.PathLike))
            return DecodeError(f"image {start + place}: {error if is_named else f'{image}: {error}'}")

        return embed_contents(extractor, contents, cache, refuse=refuse if self.on_error == "raise" else None)

    @property
    def identity(self) -> ModelIdentity:
        """The model's identity, for heads on its features."""
        return self._open().identity

    def _open(self) -> FeatureExtractor:
        if self.on_error not in {"raise", "nan"}:
            raise ValueError(f"on_error must be raise or nan; got {self.on_error!r}")
        options = RunOptions(
            precision=self.precision,
            engine=self.engine,
            device=self.device,
            decoding=self.decoding,
            max_pixels=self.max_pixels,
            pooling=self.pooling,
            threads=self.threads,
            revision=self.revision,
        )
        if getattr(self, "_loaded", None) != (self.model, options):
            self._extractor = FeatureExtractor.load(self.model, options)
            self._loaded = self.model, options
        return self._extractor

    @property
    def _n_features_out(self) -> int:
        return self._open().feature_size

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        tags.no_validation = True
        tags.input_tags.two_d_array = False
        tags.input_tags.string = True
        return tags

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = dict(super().__getstate__())
        return {name: value for name, value in state.items() if name not in {"_extractor", "_loaded"}}


def _images(X: Any) -> list[Any]:
    if isinstance(X, (str, bytes, os.PathLike, Image.Image)) or not hasattr(X, "__iter__"):
        raise TypeError(f"X must be a list of images; got one {type(X).__name__}: put it in a list")
    if isinstance(X, np.ndarray) and X.dtype.kind not in "OUS" and not (X.ndim == 4 and X.dtype == np.uint8):
        raise TypeError(f"X must be a list of images, or (n, H, W, 3) uint8; got {X.shape} {X.dtype}")
    if hasattr(X, "to_numpy"):  # a column of a data frame
        X = X.to_numpy()
    images = list(X)
    # A column of a table has one path per row.
    if isinstance(X, np.ndarray) and X.ndim == 2 and X.shape[1] == 1:
        images = [row[0] for row in images]
    return [str(image) if isinstance(image, np.str_) else image for image in images]


def _content_or_error(image: Any, extractor: FeatureExtractor) -> Content | DecodeError:
    try:
        return _content(image, extractor)
    except DecodeError as exc:
        return exc


def _content(image: Any, extractor: FeatureExtractor) -> Content:
    """The bytes of an image file, or the network's square of another image.

    Raises:
        DecodeError: the image cannot be read.
    """
    if isinstance(image, (str, os.PathLike)):
        try:
            return Path(image).read_bytes()
        except OSError as exc:
            raise DecodeError(f"{image}: {exc.strerror}") from exc
    if isinstance(image, (bytes, bytearray, memoryview)):
        return bytes(image)
    return extractor.prepare(image)
