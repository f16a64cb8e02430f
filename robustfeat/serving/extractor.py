"""Defines `FeatureExtractor`, which embeds images with one model."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

import robustfeat
from robustfeat.errors import DecodeError, EngineError, ModelFolderError
from robustfeat.hub.catalog import BUILTIN, resolve_model
from robustfeat.hub.folder import ModelFolder, weights_sha256
from robustfeat.hub.heif import decoder_versions
from robustfeat.hub.preprocessing import normalise, prepare_square, resize_and_crop, to_rgb
from robustfeat.hub.remote import HubAccess
from robustfeat.serving.engines.engine import Engine, open_engine
from robustfeat.serving.engines.options import AUTO, MAX_PIXELS, RunOptions
from robustfeat.serving.engines.text import TextEncoder
from robustfeat.serving.identity import ModelIdentity
from robustfeat.serving.verify import check_golden

__all__ = ["FeatureExtractor", "default_batch_size"]


_MOST_FEATURES = 2**20
"""Largest feature vector, 4 MB per image."""


class FeatureExtractor:
    """Embeds images with one model. Use `from_pretrained` to make one.

    Attributes:
        folder: the model.
        config: its `ModelConfig`.
        engine: the engine that runs it.
        options: how it runs, with the choices made for automatic options.
    """

    def __init__(self, folder: ModelFolder, engine: Engine, options: RunOptions) -> None:
        self.folder, self.engine, self.config = folder, engine, folder.config
        self._texts: TextEncoder | None = None
        self.options = replace(
            options,
            engine=engine.name,
            device=engine.device,
            threads=engine.threads,
            streams=engine.streams,
            pooling=engine.pooling.name or AUTO,
        )

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str] | None = None,
        *,
        revision: str | None = None,
        config_hash: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        endpoint: str | None = None,
        precision: str = "fp32",
        engine: str = "auto",
        device: str = "auto",
        threads: int | None = None,
        streams: int | None = None,
        decoding: str = "exact",
        max_pixels: int = MAX_PIXELS,
        pooling: str = "auto",
    ) -> FeatureExtractor:
        """Loads a model.

        Args:
            name: None or `builtin` for the model inside the package, a model folder, or ORG/NAME on the Hub. From the
                Hub only the files that the engine needs are downloaded. The layout of Optimum and transformers.js is
                accepted, too (docs/hub.md).
            revision: a branch, tag or commit on the Hub; main by default. A cached commit needs no network request.
            config_hash: the expected config hash, which pins all files; `robustfeat info` prints it.
            token: a token for the Hub; by default the token of `hf auth login` or HF_TOKEN. False sends none.
            cache_dir: folder of the downloads; by default the cache of the Hub's libraries.
            local_files_only: use only the cache, without network requests, as HF_HUB_OFFLINE=1 does.
            endpoint: the address of a mirror or a private Hub; by default HF_ENDPOINT or huggingface.co.
            precision: fp32; fp16, meant for GPUs; int8 if the folder has it; bf16 with OpenVINO on processors that
                support it.
            engine: auto (ONNX Runtime, or OpenVINO for bf16), onnxruntime, openvino or tensorrt.
            device: auto, cpu or cuda.
            threads: number of processors for the model; by default all that the cgroup allows.
            streams: number of parallel batches, each on `threads / streams` processors. The default of one has the
                lowest latency. One per thread has the best throughput, and `embed_files` requires it.
            decoding: exact or scaled. Scaled decodes JPEGs of at least four times the needed size at a fraction of
                their size, which is several times as fast and changes features slightly.
            max_pixels: largest accepted image; larger ones are refused from their header. Above 178,956,970 pixels
                this raises Pillow's limit for the process.
            pooling: how the output of a transformers model becomes features: auto (by its model type), embeds,
                pooler, cls or mean.

        Raises:
            ModelFolderError: the folder is missing, damaged, altered or of a newer format, or has robustfeat's layout
                and contains a pickle or code.
            HubError: the model is not in the cache, and the Hub refuses, fails or cannot be reached.
            EngineError: no engine is installed, the engine cannot run as requested, or the precision is too inexact
                on this machine.
        """
        access = HubAccess(token=token, cache_dir=cache_dir, local_files_only=local_files_only, endpoint=endpoint)
        options = RunOptions(
            precision=precision,
            engine=engine,
            device=device,
            decoding=decoding,
            max_pixels=max_pixels,
            threads=threads,
            streams=streams,
            revision=revision,
            config_hash=config_hash,
            pooling=pooling,
        )
        return cls.load(name, options, access)

    @classmethod
    def load(
        cls,
        name: str | os.PathLike[str] | None = None,
        options: RunOptions = RunOptions(),
        access: HubAccess | None = None,
    ) -> FeatureExtractor:
        """Loads a model like `from_pretrained`, with the options as one value."""
        folder = resolve_model(name, revision=options.revision, config_hash=options.config_hash, access=access)
        extractor = cls.open(folder, options)
        exact = options.precision == "fp32" and extractor.engine.name != "tensorrt"  # TensorRT's fp32 may be TF32
        if not exact and folder.is_own:  # other layouts have no golden images
            check = check_golden(extractor)
            if check.short:
                raise EngineError(
                    f"{folder.path}: {options.precision} is too inexact on this processor (cosine {check.cosine:.4f} "
                    f"on a golden image, {check.needed} needed)",
                    fix="pass `precision=fp32`" if options.precision != "fp32" else "pass `engine=onnxruntime`",
                )
        return extractor

    @classmethod
    def open(cls, folder: ModelFolder, options: RunOptions = RunOptions()) -> FeatureExtractor:
        """Opens a folder without the check of its golden images. Ignores `revision` and `config_hash`.

        Raises:
            ModelFolderError, EngineError: see `from_pretrained`.
        """
        content = folder.read_onnx(options.stored_precision)
        side = folder.config.preprocessing.image_size
        session = open_engine(folder.path, content, options, folder.config.outputs, side)
        if not folder.is_own:
            extractor = cls(folder, session, options)
            size = _feature_size(folder, session)
            _require_length(folder, size)
            extractor.config = folder.config.replace(feature_size=size)
            return extractor
        size = folder.config.feature_size
        _require_length(folder, size)
        if session.input_shape[1:] != [3, side, side] or session.output_shape[1:] != [size]:
            raise ModelFolderError(
                f"{folder.path}: config.json states {side} px and {size} features, but the ONNX file has the shapes "
                f"{session.input_shape} and {session.output_shape}",
                fix="export the model again",
            )
        expected = folder.config.preprocessing.hash
        if session.preprocessing_hash != expected:
            found = str(session.preprocessing_hash)
            raise ModelFolderError(
                f"{folder.path}: the ONNX file was exported for preprocessing {found[:12]}..., "
                f"config.json says {expected[:12]}...",
                fix="export the model again",
            )
        return cls(folder, session, options)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the model's place and options. Unpickling opens the same model from there.

        The pickle omits the token, so unpickling uses the token of its own user.
        """
        access = self.folder.access and replace(self.folder.access, token=None)
        options = replace(self.options, revision=self.folder.revision, config_hash=self.folder.config_hash)
        return _reopen, (self.folder.source, options, access)

    @property
    def precision(self) -> str:
        """fp32, fp16, bf16 or int8."""
        return self.options.precision

    @property
    def decoding(self) -> str:
        """Exact or scaled; see `from_pretrained`."""
        return self.options.decoding

    @property
    def feature_size(self) -> int:
        """D, the length of a feature vector."""
        return self.config.feature_size

    @property
    def identity(self) -> ModelIdentity:
        """The model, and how it runs."""
        config, engine = self.config, self.engine
        return ModelIdentity(
            name=config.name,
            revision=self.folder.revision,
            weights_sha256=weights_sha256(config.files),
            preprocessing_hash=config.preprocessing.hash,
            feature_size=self.feature_size,
            precision=self.precision,
            engine=engine.name,
            decoding=self.decoding,
            device=engine.device,
            threads=engine.threads,
            files=dict(config.files),
            pooling=engine.pooling.name,
            source=self.folder.source if self.folder.source == BUILTIN or self.folder.revision else None,
            skipped_tokens=engine.pooling.skipped_tokens,
            versions={
                "robustfeat": robustfeat.__version__,
                engine.name: engine.version,
                "numpy": np.__version__,
                "pillow": PIL.__version__,
                **decoder_versions(),
            },
        )

    @property
    def fingerprint(self) -> list[Any]:
        """See `ModelIdentity.fingerprint`."""
        return self.identity.fingerprint

    @property
    def batch_size(self) -> int:
        """See `default_batch_size`."""
        return default_batch_size(self.config.preprocessing.image_size, self.engine.device)

    def embed(self, images: Iterable[Any], *, on_error: str = "raise") -> NDArray[np.float32]:
        """Embeds images.

        Args:
            images: paths, bytes of image files, Pillow images, or (H, W, 3) uint8 RGB arrays.
            on_error: `raise`, or `nan` for a row of NaN for each image that cannot be read.

        Returns:
            (n, D) float32; row i belongs to image i.

        Raises:
            DecodeError: an image cannot be read and `on_error` is `raise`. The message has its number.
            TypeError: an image has another type.
        """
        if on_error not in {"raise", "nan"}:
            raise ValueError(f"on_error must be raise or nan; got {on_error!r}")
        if isinstance(images, (str, bytes, os.PathLike, Image.Image)):
            raise TypeError(f"images must be a list of images; got one {type(images).__name__}: put it in a list")
        parts: list[NDArray[np.float32]] = []
        side = self.config.preprocessing.image_size
        for first, group in _groups(images, self.batch_size):
            squares = np.zeros((len(group), side, side, 3), np.uint8)
            failed: list[int] = []
            for offset, image in enumerate(group):
                try:
                    squares[offset] = self.prepare(image)
                except DecodeError as exc:
                    if on_error == "raise":
                        raise DecodeError(f"image {first + offset}: {exc}") from exc
                    failed.append(offset)
            parts.append(self.embed_prepared(squares, failed))
        return np.concatenate(parts) if parts else np.empty((0, self.feature_size), np.float32)

    def prepare(self, image: Any) -> NDArray[np.uint8]:
        """Decodes, resizes and crops one image to the network's (S, S, 3) uint8 square (see `embed` for its types).

        Raises:
            DecodeError: the image cannot be read.
        """
        contract, scaled, most = self.config.preprocessing, self.decoding == "scaled", self.options.max_pixels
        if isinstance(image, (str, os.PathLike)):
            try:
                return prepare_square(Path(image).read_bytes(), contract, scaled=scaled, max_pixels=most)
            except OSError as exc:
                raise DecodeError(f"{image}: {exc.strerror}") from exc
            except DecodeError as exc:
                raise DecodeError(f"{image}: {exc}") from exc
        if isinstance(image, (bytes, bytearray, memoryview)):
            return prepare_square(bytes(image), contract, scaled=scaled, max_pixels=most)
        if isinstance(image, Image.Image):
            try:
                return resize_and_crop(to_rgb(image, version=contract.version, max_pixels=most), contract)
            except (OSError, SyntaxError, ValueError) as exc:  # Pillow reads the file of an open image only now
                raise DecodeError(f"damaged: {exc}") from exc
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
                raise DecodeError(f"an array must be (H, W, 3) uint8 RGB; got {image.shape} {image.dtype}")
            return resize_and_crop(Image.fromarray(image), contract)
        raise TypeError(f"an image must be a path, bytes, a Pillow image or an array; got {type(image).__name__}")

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embeds n texts to (n, D) float32, comparable by cosine with image features, by the model's text tower.

        Raises:
            InputError: the model has no text tower, or a text is empty.
            ModelFolderError, HubError, EngineError: the text tower cannot be loaded or run.
        """
        self._texts = self._texts or TextEncoder(self.folder, self.options, self.feature_size)
        return self._texts.embed(texts)

    def embed_prepared(self, squares: NDArray[np.uint8], failed: Sequence[int] = ()) -> NDArray[np.float32]:
        """Embeds one batch of squares from `prepare`, (n, S, S, 3) uint8, to (n, D) float32.

        A failed image keeps its slot with arbitrary pixels, so its neighbours' vectors do not depend on it. Its own row
        is NaN.
        """
        values = self.engine.new_input((len(squares), 3, *squares.shape[1:3]))
        features = _interruptibly(self.engine.run, normalise(squares, self.config.preprocessing, out=values))
        features[list(failed)] = np.nan
        return features


def _reopen(source: str, options: RunOptions, access: HubAccess | None) -> FeatureExtractor:
    return FeatureExtractor.open(
        resolve_model(source, revision=options.revision, config_hash=options.config_hash, access=access), options
    )


def _feature_size(folder: ModelFolder, session: Engine) -> int:
    """D of a transformers network. If its file does not state D, the network runs once.

    Raises:
        ModelFolderError: the network does not accept images of the contract's size.
    """
    side = folder.config.preprocessing.image_size
    batch, *fixed = session.input_shape or [None]
    wanted = [3, side, side]
    if isinstance(batch, int):
        raise ModelFolderError(
            f"{folder.path}: the ONNX file takes batches of exactly {batch}", fix="export it with a free batch size"
        )
    if fixed and (len(fixed) != 3 or any(isinstance(a, int) and a != b for a, b in zip(fixed, wanted, strict=True))):
        raise ModelFolderError(
            f"{folder.path}: the image processor makes {wanted}, but the ONNX file takes {fixed}",
            fix="import the ONNX file with your own size (robustfeat import)",
        )
    size = session.output_shape[-1]
    return size if isinstance(size, int) else session.run(np.zeros((1, *wanted), np.float32)).shape[1]


def _require_length(folder: ModelFolder, size: int) -> None:
    """Refuses huge vectors: the output is then not one vector per image, and a few thousand would fill the memory."""
    if size > _MOST_FEATURES:
        raise ModelFolderError(
            f"{folder.path}: features must have at most {_MOST_FEATURES:,} numbers; got {size:,}",
            fix="choose another output of the network with robustfeat import",
        )


def _interruptibly(run: Callable[[NDArray[np.float32]], NDArray[np.float32]], values: Any) -> NDArray[np.float32]:
    """Runs a network in a thread, so Ctrl+C ends the wait at once."""
    if threading.current_thread() is not threading.main_thread():
        return run(values)
    result: Future[NDArray[np.float32]] = Future()

    def work() -> None:
        try:
            result.set_result(run(values))
        except BaseException as exc:
            result.set_exception(exc)

    threading.Thread(target=work, name="model", daemon=True).start()
    return result.result()


def default_batch_size(side: int, device: str) -> int:
    """Default number of S-pixel images per batch: enough to be fast, few enough to fit the processor's cache."""
    return 128 if device == "cuda" else min(64, max(8, 2**17 // side**2))


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
