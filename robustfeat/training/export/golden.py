"""A model folder's golden images through PyTorch, from model.safetensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from safetensors.torch import load
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn

from robustfeat.errors import ModelFolderError, first_line
from robustfeat.hub.folder import WEIGHTS, ModelFolder
from robustfeat.hub.preprocessing import decode, preprocess
from robustfeat.serving.verify import Check, compare
from robustfeat.training.export.libraries import rebuild_features
from robustfeat.training.export.stamp import quiet

__all__ = ["verify_with_timm", "verify_with_torch"]

_MIN_COSINE_TIMM = 0.999
"""timm resizes whole images, and its pixels differ from ours by up to one of 255 levels."""


def verify_with_torch(folder: ModelFolder) -> Check:
    """The folder's network, made by its library, with the folder's weights.

    Raises:
        ModelFolderError: a file was altered, or the weights do not fit the architecture.
    """
    config = folder.config
    images, expected = folder.golden()
    weights = folder.read(WEIGHTS)
    try:
        network = rebuild_features(config, load(weights))
    except LookupError as exc:
        raise ModelFolderError(f"{folder.path}: {exc.args[0]}", fix="do not use this model") from exc
    except Exception as exc:  # the libraries' and PyTorch's errors share no base class
        raise ModelFolderError(
            f"{folder.path / WEIGHTS}: does not fit the network {config.architecture} ({first_line(exc)})"
        ) from exc
    contract = config.preprocessing
    inputs = torch.from_numpy(preprocess([decode(image, version=contract.version) for image in images], contract))
    return compare(_features(network, inputs), expected, engine="pytorch")


def verify_with_timm(folder: ModelFolder) -> Check:
    """Checks the card's promise that timm loads the folder, and resizes and normalises as we do.

    The images are decoded by us, since timm drops their alpha. `verify_with_torch` comes first: it looks at the hashes.

    Raises:
        ModelFolderError: timm cannot load it.
    """
    images, expected = folder.golden()
    try:
        with quiet():
            outputs = folder.config.feature_outputs
            network = timm.create_model(f"local-dir:{folder.path}", pretrained=True, num_classes=outputs).eval()
        transform = create_transform(**resolve_model_data_config(network))
        decoded = [decode(image, version=folder.config.preprocessing.version) for image in images]
        features = _features(network, torch.stack([transform(image) for image in decoded]))
    except Exception as exc:  # timm's and PyTorch's errors share no base class
        raise ModelFolderError(f"{folder.path}: timm cannot load it ({first_line(exc)})") from exc
    return replace(compare(features, expected, engine="timm"), needed=_MIN_COSINE_TIMM)


def _features(network: nn.Module, inputs: Tensor) -> NDArray[np.floating[Any]]:
    with torch.no_grad():
        features: NDArray[np.floating[Any]] = network.eval()(inputs).numpy()
    return features
