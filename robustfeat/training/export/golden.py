"""A model folder's golden images through PyTorch, from model.safetensors."""

from __future__ import annotations

import timm
import torch
from safetensors.torch import load

from robustfeat.errors import ModelFolderError, first_line
from robustfeat.hub.folder import WEIGHTS, ModelFolder
from robustfeat.hub.preprocessing import decode, preprocess
from robustfeat.serving.verify import Check, compare

__all__ = ["verify_with_torch"]


def verify_with_torch(folder: ModelFolder) -> Check:
    """The network of timm's namesake with the folder's weights.

    Raises:
        ModelFolderError: a file was altered, or the weights do not fit the architecture.
    """
    config = folder.config
    images, expected = folder.golden()
    weights = folder.read(WEIGHTS)
    if not timm.is_model(config.architecture):  # it may be an address, which timm would follow
        raise ModelFolderError(
            f"{folder.path}: timm has no network called {config.architecture!r}", fix="do not use this model"
        )
    try:
        network = timm.create_model(config.architecture, pretrained=False, num_classes=config.num_classes)
        network.load_state_dict(load(weights))
    except Exception as exc:  # timm's and PyTorch's errors share no base class
        raise ModelFolderError(
            f"{folder.path / WEIGHTS}: does not fit timm's {config.architecture} ({first_line(exc)})"
        ) from exc
    network.reset_classifier(0)  # type: ignore[operator]
    contract = config.preprocessing
    inputs = torch.from_numpy(preprocess([decode(image, version=contract.version) for image in images], contract))
    with torch.no_grad():
        features = network.eval()(inputs).numpy()
    return compare(features, expected, engine="pytorch")
