"""Vision models of transformers as feature networks in PyTorch.

The classes are those of the installed library, chosen by the model type; code in a repository is never run. Weights are
handed over as tensors, so that the library opens no file.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load, load_file
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from robustfeat.errors import InputError, ModelFolderError, RobustFeatError, first_line
from robustfeat.hub.config import CODE_ENTRIES
from robustfeat.hub.folder import WEIGHTS, ModelFolder
from robustfeat.hub.outputs import read_outputs
from robustfeat.hub.preprocessing import decode, preprocess
from robustfeat.serving.engines.options import AUTO
from robustfeat.serving.engines.pooling import Pooling, choose_pooling
from robustfeat.serving.verify import Check, compare
from robustfeat.training.export.network_size import limited_size, require_moderate
from robustfeat.training.export.stamp import quiet

__all__ = [
    "FeatureNetwork",
    "VisionModel",
    "build_model",
    "choose_features",
    "read_weights",
    "silent_transformers",
    "torch_features",
    "verify_with_transformers",
]

_TOWERS = {
    "clip": "CLIP",
    "clip_vision_model": "CLIP",
    "metaclip_2": "MetaClip2",
    "metaclip_2_vision_model": "MetaClip2",
}
"""Model types whose image tower may have a projection (`image_embeds`), with the start of its class's name."""

_BY_NAME = {"architecture", "backbone", "model_args"}
"""Entries of configs with a network of timm, or with a backbone of another network."""

_PROJECTION = "visual_projection.weight"
_TOKENS = 3

State = dict[str, Tensor]


@dataclass(frozen=True)
class VisionModel:
    """A vision model with its weights.

    Attributes:
        network: in eval mode and fp32.
        missing: parameters that the weights did not have.
    """

    network: Any
    missing: frozenset[str]

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json, of the image tower where there were others."""
        content = json.loads(self.network.config.to_json_string())
        kept = {key: value for key, value in content.items() if key not in CODE_ENTRIES | {"_name_or_path"}}
        return {**kept, "architectures": [self.class_name]}

    @property
    def class_name(self) -> str:
        """That of its class in transformers."""
        return type(self.network).__name__

    def outputs(self, side: int) -> dict[str, tuple[int, ...]]:
        """The shapes of what it gives for an image of S px."""
        with torch.no_grad():
            given = self.network(pixel_values=torch.zeros(1, 3, side, side))
        return {name: tuple(value.shape) for name, value in given.items() if isinstance(value, Tensor)}

    def save(self, file: Path) -> None:
        """Writes the weights under the names that transformers gives them in files, which differ from the modules'.

        Those that were missing are left out.
        """
        state = {name: value for name, value in self.network.state_dict().items() if name not in self.missing}
        with tempfile.TemporaryDirectory(dir=file.parent) as scratch, silent_transformers():
            self.network.save_pretrained(scratch, state_dict=state, max_shard_size="1TB")
            # Copy the file, since only its owner can read a file that the library writes.
            shutil.copyfile(Path(scratch, WEIGHTS), file)


class FeatureNetwork(nn.Module):
    """A vision model from (N, 3, S, S) to features, (N, D)."""

    def __init__(self, network: nn.Module, pooling: Pooling) -> None:
        super().__init__()
        self.network, self.pooling = network, pooling

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, S, S) to (N, D)."""
        values: Tensor = getattr(self.network(pixel_values=pixel_values), self.pooling.output)
        if self.pooling.name == "cls":
            return values[:, 0]
        if self.pooling.name == "mean":
            return values[:, self.pooling.prefix :].mean(1) if values.ndim == _TOKENS else values.mean((2, 3))
        return values.flatten(1)


def build_model(config: Mapping[str, Any], state: State, source: str) -> VisionModel:
    """The vision model of a config with these weights; of models for text and images, the image tower.

    Args:
        config: the content of config.json.
        state: tensors by transformers' names. Tensors of other parts are ignored.
        source: names the model in messages.

    Raises:
        InputError: transformers has no such model, it is not for images, or the weights do not fit it.
    """
    if "quantization_config" in config:
        raise InputError(f"{source}: its weights are quantised", fix="import the model that it was made of")
    if found := next(_networks_elsewhere(config), None):
        raise InputError(
            f"{source}: {found} in its config.json may name files or repositories, which are not opened",
            fix="import that network by itself, such as timm:NAME, or an ONNX file",
        )
    require_moderate(config, source)
    try:
        made = CONFIG_MAPPING[str(config.get("model_type"))].from_dict(dict(config))
        kind, made = _class_of(made, state, source)
        with silent_transformers(), limited_size(source):
            network, info = kind.from_pretrained(
                None,
                config=made,
                state_dict=state,
                dtype=torch.float32,
                attn_implementation="eager",
                ignore_mismatched_sizes=True,  # reported below
                output_loading_info=True,
            )
    except KeyError as exc:
        code = " and would need code of the repository, which is never run" if "auto_map" in config else ""
        raise InputError(
            f"{source}: transformers {transformers.__version__} has no model type {config.get('model_type')!r}{code}",
            fix="upgrade transformers, or import the model's ONNX file",
        ) from exc
    except RobustFeatError:
        raise
    except Exception as exc:  # the library checks configs and weights with errors of many kinds
        raise InputError(f"{source}: transformers cannot load it ({first_line(exc)[:300]})") from exc
    if info["mismatched_keys"]:
        name, found, expected = sorted(info["mismatched_keys"])[0]
        raise InputError(f"{source}: {name} has the shape {tuple(found)}, {kind.__name__} needs {tuple(expected)}")
    if not set(network.state_dict()) - set(info["missing_keys"]):
        raise InputError(f"{source}: its weights have other names than those of {kind.__name__}")
    return VisionModel(network.eval(), frozenset(info["missing_keys"]))


def _networks_elsewhere(config: Mapping[str, Any]) -> Iterator[str]:
    """Entries from which transformers or timm would make a network by a name, which may be a path or an address."""
    for name, value in config.items():
        if name in _BY_NAME and value:
            yield name
        elif isinstance(value, Mapping):
            yield from _networks_elsewhere(value)


def _class_of(config: Any, state: State, source: str) -> tuple[Any, Any]:
    """The class of the image tower, and its config."""
    kind = config.model_type
    vision = getattr(config, "vision_config", None)
    if kind in _TOWERS and _PROJECTION in state:
        tower = config if vision is None else vision
        if vision is not None:
            tower.projection_dim = config.projection_dim
        return getattr(transformers, f"{_TOWERS[kind]}VisionModelWithProjection"), tower
    config = config if vision is None else vision
    found: Any = MODEL_MAPPING.get(type(config), None)
    if isinstance(found, tuple):
        found = found[0]
    if found is None:
        raise InputError(f"{source}: transformers has no model for the images of the model type {kind!r} (AutoModel)")
    if found.main_input_name != "pixel_values":
        raise InputError(
            f"{source}: {found.__name__} takes {found.main_input_name}, not images", fix="use a model for images"
        )
    return found, config


def choose_features(model: VisionModel, side: int, asked: str | None, source: str) -> FeatureNetwork:
    """The features that a user asks for, or those that are usual for the model type.

    Raises:
        EngineError: the model has no such output, or which one is usual is not known.
        InputError: it does not take images of S px, or the features depend on weights that are missing.
    """
    try:
        shapes = model.outputs(side)
    except Exception as exc:  # networks fail in ways of their own
        raise InputError(
            f"{source}: {model.class_name} fails on images of {side} px ({first_line(exc)[:300]})"
        ) from exc
    pooling = choose_pooling(asked or AUTO, read_outputs(model.config), shapes, Path(source))
    network = FeatureNetwork(model.network, pooling)
    if absent := _missing_influence(network, model.missing, side):
        raise InputError(
            f"{source}: its weights lack {absent[0]}" + (f" and {len(absent) - 1} more" if absent[1:] else ""),
            fix="pass another `pooling`, or use complete weights",
        )
    return network


def _missing_influence(network: FeatureNetwork, missing: frozenset[str], side: int) -> list[str]:
    """The missing parameters on which the features depend."""
    if not missing:
        return []
    parameters = dict(network.network.named_parameters())
    images = torch.linspace(-1, 1, 3 * side * side).view(1, 3, side, side)
    gradients = torch.autograd.grad(network(images).sum(), list(parameters.values()), allow_unused=True)
    reached = {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
    return sorted(name for name in missing if name in reached or name not in parameters)


def torch_features(network: FeatureNetwork, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n, 3, S, S) to (n, D)."""
    with torch.no_grad():
        features: NDArray[np.float32] = network(torch.from_numpy(inputs)).numpy()
    return features


def read_weights(files: list[Path], source: str) -> State:
    """The tensors of safetensors files, by name.

    Raises:
        InputError: one cannot be read.
    """
    state: State = {}
    for file in files:
        try:
            state |= load_file(file)
        except Exception as exc:  # what the reader raises on damaged files has no common base
            raise InputError(
                f"{source}: {file.name} cannot be read ({first_line(exc)[:200]})", fix="download it again"
            ) from exc
    return state


def verify_with_transformers(folder: ModelFolder) -> Check:
    """The network of transformers with the weights of a folder that was imported from it.

    Raises:
        ModelFolderError: a file was altered, or the weights do not fit the network.
    """
    config = folder.config
    images, expected = folder.golden()
    try:
        model = build_model(config.transformers, load(folder.read(WEIGHTS)), str(folder.path))
        side = config.preprocessing.image_size
        network = choose_features(model, side, config.pooling, str(folder.path))
    except RobustFeatError as exc:
        raise ModelFolderError(exc.what) from exc
    contract = config.preprocessing
    inputs = preprocess([decode(image, version=contract.version) for image in images], contract)
    return compare(torch_features(network, inputs), expected, engine="pytorch")


@contextmanager
def silent_transformers() -> Iterator[None]:
    """The library's bars and reports; what matters of them becomes an error of ours."""
    logs: Any = transformers.utils.logging
    bars = logs.is_progress_bar_enabled()
    logs.disable_progress_bar()
    try:
        with quiet():
            yield
    finally:
        if bars:
            logs.enable_progress_bar()
