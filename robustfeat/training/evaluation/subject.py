"""Opens the subject of an evaluation: a model folder, a training run, or a custom network."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from robustfeat.errors import InputError, first_line
from robustfeat.hub.catalog import resolve_model
from robustfeat.hub.folder import WEIGHTS, ModelFolder
from robustfeat.hub.preprocessing import Preprocessing, normalise, prepare_square, resize_and_crop
from robustfeat.serving.engines.options import RunOptions
from robustfeat.serving.extractor import FeatureExtractor, default_batch_size
from robustfeat.serving.feature_cache import FeatureMaker
from robustfeat.training.evaluation.arguments import model_kind, require_model
from robustfeat.training.loop.checkpoint import load_checkpoint, network_of
from robustfeat.training.loop.device import measuring_device
from robustfeat.training.loop.journal import final_accuracies
from robustfeat.training.network import feature_network
from robustfeat.training.recipe import Recipe
from robustfeat.training.start import state_digest

__all__ = ["FolderSubject", "NetworkSubject", "Subject", "open_network", "open_subject"]


class Subject(FeatureMaker, Protocol):
    """Computes features of images.

    Attributes:
        name: what tables call it.
        note: what the name ends with: how far training is, where it is not finished.
        training: how it was trained, where that is known: `recipe`, `data` (the fingerprint of the training images),
            and of a run also its `epoch` and final accuracies.
    """

    name: str
    note: str
    training: Mapping[str, Any]

    @property
    def contract(self) -> Preprocessing:
        """How images become squares."""

    @property
    def batch_size(self) -> int:
        """A fast number of squares per batch."""

    def prepare(self, image: bytes | Image.Image) -> NDArray[np.uint8]:
        """The (S, S, 3) uint8 square that the network sees; DecodeError where the image cannot be read."""

    def embed_prepared(self, squares: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(n, S, S, 3) uint8 to (n, D) float32."""


class FolderSubject:
    """A model folder, run as `robustfeat embed` runs it, by ONNX."""

    note = ""

    def __init__(self, extractor: FeatureExtractor) -> None:
        self._extractor = extractor
        self.name = extractor.config.name
        data = extractor.config.provenance.get("data")
        fingerprint = data.get("fingerprint") if isinstance(data, Mapping) else None
        recipe = dict(extractor.config.recipe)
        self.training: Mapping[str, Any] = {"recipe": recipe, "data": fingerprint} if recipe else {}
        self.fingerprint: Sequence[Any] = extractor.fingerprint
        self.feature_size = extractor.feature_size
        self.contract = extractor.config.preprocessing
        self.batch_size = extractor.batch_size

    def prepare(self, image: bytes | Image.Image) -> NDArray[np.uint8]:
        """See `Subject`."""
        return self._extractor.prepare(image)

    def embed_prepared(self, squares: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See `Subject`."""
        return self._extractor.embed_prepared(squares)


class NetworkSubject:
    """A PyTorch network from (n, 3, S, S) to (n, D) features, in fp32 and evaluation mode.

    Args:
        network: moved to the device.
        contract: how images become its input.
        name: what tables call it.
        device: where it runs.
        note: what they add to that.
        training: see `Subject`.

    Raises:
        InputError: it does not give one vector for each image.
    """

    def __init__(
        self,
        network: nn.Module,
        contract: Preprocessing,
        name: str,
        device: torch.device,
        note: str = "",
        training: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            network.eval()
            self.network = network.to(device).to(memory_format=torch.channels_last)
            weights = state_digest(network.state_dict())
        except Exception as exc:  # whatever a network of somebody's raises
            raise InputError(f"{name}: cannot be used as a network ({type(exc).__name__}: {first_line(exc)})") from exc
        self.contract, self.name, self.note, self.device = contract, name + note, note, device
        self.training = training or {}
        self.batch_size = default_batch_size(contract.image_size, device.type)
        side = contract.image_size
        squares = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8)
        self.feature_size = 0
        features = self._run(squares)
        self.feature_size = features.shape[1]
        self._run(squares[:1])
        # A network's code may change its features without changing its weights.
        digest = hashlib.sha256(features.float().cpu().numpy().tobytes()).hexdigest()
        self.fingerprint: Sequence[Any] = [
            "torch", torch.__version__, weights, digest, contract.hash, device.type
        ]  # fmt: skip

    def prepare(self, image: bytes | Image.Image) -> NDArray[np.uint8]:
        """See `Subject`."""
        if isinstance(image, Image.Image):
            return resize_and_crop(image, self.contract)
        return prepare_square(image, self.contract)

    def embed_prepared(self, squares: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See `Subject`."""
        features: NDArray[np.float32] = self._run(squares).float().cpu().numpy()
        return features

    def _run(self, squares: NDArray[np.uint8]) -> Tensor:
        pixels = torch.from_numpy(normalise(squares, self.contract)).to(self.device)
        side, count = self.contract.image_size, len(pixels)
        try:
            with torch.no_grad():
                features = self.network(pixels.contiguous(memory_format=torch.channels_last))
        except (Exception, SystemExit) as exc:  # whatever a network of somebody's raises
            raise InputError(
                f"{self.name}: fails on {count} images of {side} px ({type(exc).__name__}: {first_line(exc)})",
                fix="pass `image_size` if it needs another size",
            ) from exc
        expected = f"({count}, {self.feature_size or 'D'})"
        if not isinstance(features, Tensor) or features.is_complex():
            kind = features.dtype if isinstance(features, Tensor) else type(features).__name__
            raise InputError(f"{self.name}: must give real numbers in a tensor, {expected}; got {kind}")
        shape = tuple(features.shape)
        if len(shape) != 2 or shape[0] != count or not shape[1] or self.feature_size not in (0, shape[1]):
            raise InputError(f"{self.name}: must give one vector an image, {expected}; got {shape} for {count} images")
        return features


def open_subject(
    model: str, *, image_size: int | None = None, crop_pct: float | None = None, device: str = "auto"
) -> Subject:
    """Opens a MODEL of `robustfeat evaluate`.

    Args:
        model: a run of `robustfeat train` (its folder, checkpoint.pt or best.pt), `package.module:build` (called
            without arguments; returns a torch module from (n, 3, S, S) to (n, D)), or what
            `FeatureExtractor.from_pretrained` takes.
        image_size, crop_pct: settings of the preprocessing, for runs and custom networks; by default the recipe's, and
            224 px and 0.875. A model folder has its own.
        device: auto, cpu or cuda.

    Raises:
        CheckpointError, ModelFolderError, HubError, EngineError, InputError: it cannot be used; see the message.
    """
    require_model(model, image_size, crop_pct)
    if model_kind(model) == "folder":
        return FolderSubject(FeatureExtractor.load(model, RunOptions(device=device)))
    return open_network(model, image_size=image_size, crop_pct=crop_pct, device=device)


def open_network(
    model: str, *, image_size: int | None = None, crop_pct: float | None = None, device: str = "auto"
) -> NetworkSubject:
    """Opens a MODEL in PyTorch. timm builds a model folder's network from its safetensors file.

    Raises:
        As `open_subject`; InputError where timm does not know the folder's architecture.
    """
    chosen, kind, path, note = measuring_device(device), model_kind(model), Path(model), ""
    training: dict[str, Any] = {}
    try:
        if kind == "folder":
            require_model(model, image_size, crop_pct)
            folder = resolve_model(model)
            network, contract, name = _network_of_folder(folder), folder.config.preprocessing, folder.config.name
        elif kind == "run":
            checkpoint = load_checkpoint(path)
            network = feature_network(network_of(checkpoint))
            recipe = Recipe.from_dict(checkpoint.recipe)
            contract = recipe.preprocessing(image_size, crop_pct)
            run = path if path.is_dir() else path.parent
            name = run.resolve().name
            training = {"recipe": checkpoint.recipe, "data": checkpoint.data["fingerprint"], "epoch": checkpoint.epoch}
            training |= final_accuracies(run)
            if checkpoint.epoch < recipe.epochs:
                note = f" at epoch {checkpoint.epoch} of {recipe.epochs}"
        else:
            network = _build(model, *model.split(":", 1))
            contract = Preprocessing(224 if image_size is None else image_size, 0.875 if crop_pct is None else crop_pct)
            name = model
    except ValueError as exc:
        raise InputError(f"{model}: {exc}") from exc
    return NetworkSubject(network, contract, name, chosen, note, training)


def _network_of_folder(folder: ModelFolder) -> nn.Module:
    import timm
    from safetensors.torch import load

    weights = load(folder.read(WEIGHTS))
    config = folder.config
    if ":" in config.architecture:
        raise InputError(f"{folder.path}: its architecture {config.architecture!r} is no network that timm has itself")
    try:
        network: Any = timm.create_model(config.architecture, num_classes=config.num_classes)
        network.load_state_dict({name: value.float() for name, value in weights.items()})
    except RuntimeError as exc:
        raise InputError(f"{folder.path}: timm cannot make its {config.architecture} ({first_line(exc)})") from exc
    if not config.feature_outputs:
        network.reset_classifier(0)
    made: nn.Module = network
    return made


def _build(model: str, module_name: str, attribute: str) -> nn.Module:
    if module_name in {"timm", "torchvision"}:
        raise InputError(f"{model}: is no MODEL yet", fix=f"make one of it: `robustfeat import {model} --out FOLDER`")
    try:
        build = getattr(importlib.import_module(module_name), attribute)
    except (Exception, SystemExit) as exc:  # whatever a module of somebody's raises
        what = f"{model}: cannot be imported ({first_line(exc)})"
        raise InputError(what, fix="put its folder on PYTHONPATH") from exc
    try:
        network = build()
    except (Exception, SystemExit) as exc:  # whatever a builder of somebody's raises
        raise InputError(f"{model}: failed when it was called without arguments ({first_line(exc)})") from exc
    if not isinstance(network, nn.Module):
        raise InputError(f"{model}: must return a torch.nn.Module; got {type(network).__name__}")
    return network
