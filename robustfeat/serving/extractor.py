"""`FeatureExtractor`: images to features."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from robustfeat.errors import DecodeError, EngineError, ModelFolderError
from robustfeat.hub.folder import ModelFolder, resolve_model
from robustfeat.hub.preprocessing import decode, normalise, resize_and_crop, to_rgb
from robustfeat.serving.engine import OnnxRuntimeEngine

__all__ = ["FeatureExtractor", "cosine"]

BATCH_SIZE = 32
MIN_INT8_COSINE = 0.99
"""int8 saturates on some processors; a model whose golden images fall below this is refused on this machine."""


class FeatureExtractor:
    """Turns images into features with one model; make it with `from_pretrained`.

    Attributes:
        config: the model's `ModelConfig`.
        precision: fp32 or int8.
        engine: the engine that runs it.
    """

    def __init__(self, folder: ModelFolder, engine: OnnxRuntimeEngine, precision: str) -> None:
        self.folder, self.engine, self.precision = folder, engine, precision
        self.config = folder.config

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str] | None = None,
        *,
        precision: str = "fp32",
        engine: str = "auto",
        device: str = "auto",
        threads: int | None = None,
    ) -> FeatureExtractor:
        """Loads a model.

        Args:
            name: None or `builtin` for the model that the package carries, or a model folder.
            precision: fp32, or int8 where the folder holds it.
            engine: auto or onnxruntime.
            device: auto, cpu or cuda.
            threads: processors for the model; by default what the cgroup grants.

        Raises:
            ModelFolderError: the folder is missing, damaged, altered or of a newer format.
            EngineError: no engine is installed, it cannot run as asked, or int8 is too far off on this machine.
        """
        if engine not in {"auto", "onnxruntime"}:
            raise EngineError(f"engine must be auto or onnxruntime; got {engine!r}")
        extractor = cls.open(resolve_model(name), precision, device=device, threads=threads)
        if precision == "int8":
            worst = extractor.golden_cosine()
            if not worst >= MIN_INT8_COSINE:
                raise EngineError(
                    f"{extractor.folder.path}: int8 is too inexact on this processor (cosine {worst:.4f} on a golden "
                    f"image, {MIN_INT8_COSINE} needed); use fp32"
                )
        return extractor

    @classmethod
    def open(
        cls, folder: ModelFolder, precision: str = "fp32", *, device: str = "auto", threads: int | None = None
    ) -> FeatureExtractor:
        """As `from_pretrained`, without asking whether int8 is exact enough."""
        engine = OnnxRuntimeEngine(folder.onnx(precision), device=device, threads=threads)
        side, size = folder.config.preprocessing.image_size, folder.config.feature_size
        if engine.input_shape[1:] != [3, side, side] or engine.output_shape[1:] != [size]:
            raise ModelFolderError(
                f"{folder.path}: config.json promises {side} px in and {size} features out, the ONNX file has "
                f"{engine.input_shape} and {engine.output_shape}; export the model again"
            )
        expected = folder.config.preprocessing.hash
        if engine.preprocessing_hash != expected:
            raise ModelFolderError(
                f"{folder.path}: the ONNX file was exported for preprocessing "
                f"{str(engine.preprocessing_hash)[:12]}..., config.json says {expected[:12]}...; export the model again"
            )
        return cls(folder, engine, precision)

    @property
    def feature_size(self) -> int:
        """D, the length of a feature vector."""
        return self.config.feature_size

    def embed(self, images: Iterable[Any], *, on_error: str = "raise") -> NDArray[np.float32]:
        """Features of images.

        Args:
            images: each a path, the bytes of an image file, a Pillow image, or a (H, W, 3) uint8 RGB array.
            on_error: `raise`, or `nan` for a row of NaN in place of an image that cannot be read.

        Returns:
            (n, D) float32, row i for image i.

        Raises:
            DecodeError: an image cannot be read, and `on_error` is `raise`; the message holds its number.
            TypeError: an image is of another kind.
        """
        if on_error not in {"raise", "nan"}:
            raise ValueError(f"on_error must be raise or nan; got {on_error!r}")
        if isinstance(images, (str, bytes, os.PathLike, Image.Image)):
            raise TypeError(f"images must be a list of images; got one {type(images).__name__}: put it in a list")
        parts: list[NDArray[np.float32]] = []
        for first, group in _groups(images, BATCH_SIZE):
            squares: list[NDArray[np.uint8] | None] = []
            for offset, image in enumerate(group):
                try:
                    squares.append(self.prepare(image))
                except DecodeError as exc:
                    if on_error == "raise":
                        raise DecodeError(f"image {first + offset}: {exc}") from exc
                    squares.append(None)
            parts.append(self.embed_prepared(squares))
        return np.concatenate(parts) if parts else np.empty((0, self.feature_size), np.float32)

    def prepare(self, image: Any) -> NDArray[np.uint8]:
        """The (S, S, 3) uint8 square that the network sees of one image (see `embed` for the kinds).

        Raises:
            DecodeError: it cannot be read.
        """
        return resize_and_crop(_pixels(image), self.config.preprocessing)

    def embed_prepared(self, squares: Sequence[NDArray[np.uint8] | None]) -> NDArray[np.float32]:
        """One batch of squares from `prepare` to (n, D) float32; None gives a row of NaN."""
        features = np.full((len(squares), self.feature_size), np.nan, np.float32)
        good = [row for row, square in enumerate(squares) if square is not None]
        if good:
            stacked = np.stack([square for square in squares if square is not None])
            features[good] = self.engine.run(normalise(stacked, self.config.preprocessing))
        return features

    def golden_cosine(self) -> float:
        """The smallest cosine, over the folder's golden images, between this engine's features and PyTorch's."""
        images, expected = self.folder.golden()
        return float(cosine(self.embed(images), expected).min())


def cosine(a: NDArray[np.floating[Any]], b: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Row-wise cosine similarity of two (n, D) arrays: (n,) float64, NaN where a row is zero."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore"):
        similarity: NDArray[np.float64] = (x * y).sum(1) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1))
    return similarity


def _pixels(image: Any) -> NDArray[np.uint8]:
    if isinstance(image, (str, os.PathLike)):
        try:
            return decode(Path(image).read_bytes())
        except OSError as exc:
            raise DecodeError(f"{image}: {exc.strerror}") from exc
        except DecodeError as exc:
            raise DecodeError(f"{image}: {exc}") from exc
    if isinstance(image, (bytes, bytearray, memoryview)):
        return decode(bytes(image))
    if isinstance(image, Image.Image):
        try:
            return to_rgb(image)
        except (OSError, SyntaxError, ValueError) as exc:  # an open image is read from its file only now
            raise DecodeError(f"damaged: {exc}") from exc
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise DecodeError(f"an array must be (H, W, 3) uint8 RGB; got {image.shape} {image.dtype}")
        return image
    raise TypeError(f"an image must be a path, bytes, a Pillow image or an array; got {type(image).__name__}")


def _groups(images: Iterable[Any], size: int) -> Iterator[tuple[int, list[Any]]]:
    group: list[Any] = []
    first = 0
    for image in images:
        group.append(image)
        if len(group) == size:
            yield first, group
            first, group = first + size, []
    if group:
        yield first, group
