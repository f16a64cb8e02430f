"""Starts training from random weights, or from a run, a model folder or a file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn

from robustfeat.errors import CheckpointError, InputError, ModelFolderError, first_line
from robustfeat.hub.catalog import resolve_model
from robustfeat.hub.folder import WEIGHTS
from robustfeat.hub.preprocessing import Preprocessing
from robustfeat.training.loop.checkpoint import features_of, load_checkpoint
from robustfeat.training.loop.run_folder import BEST_NAME, CHECKPOINT_NAME
from robustfeat.training.network import timm_settings
from robustfeat.training.recipe import Recipe
from robustfeat.training.weights import OPTIONAL, classifier_names, describe_tensors, find_weights, read_state

__all__ = ["State", "load_start", "resolve_start", "state_digest"]


@dataclass(frozen=True)
class _Start:
    """Weights to start from.

    Attributes:
        state: tensors by name.
        network: that they belong to, as `Recipe.network` has it, where that is known.
        width: width of a ResNet-18.
        contract: their preprocessing, where it is known.
    """

    state: dict[str, Tensor]
    network: str | None = None
    width: int = 64
    contract: Preprocessing | None = None


State = dict[str, Tensor]


def resolve_start(recipe: Recipe) -> tuple[Recipe, State]:
    """The start from the recipe's `init`, which is read only once, so training starts from the hashed weights.

    Returns:
        The recipe with network, width, mean, std, interpolation and `init_sha256`; and the weights, by name.

    Raises:
        InputError: `init` cannot be read, or is another network than the recipe's.
    """
    if not recipe.init:
        return recipe, {}
    start = _open_start(recipe.init)
    digest = state_digest(start.state)
    if recipe.init_sha256 not in (None, digest):
        raise InputError(
            f"its weights have the sha256 {digest[:12]}..., the recipe says {str(recipe.init_sha256)[:12]}...",
            argument="init",
            value=recipe.init,
            fix="use the file that the recipe was made with",
        )
    network = recipe.network
    if network == "auto":
        if start.network is None:
            raise InputError(
                "does not say which network it belongs to",
                argument="init",
                value=recipe.init,
                fix="pass `network=timm:NAME` or `network=resnet18`",
            )
        network = start.network
    if start.network not in (None, network):
        raise InputError(
            f"is {start.network}, not {network}",
            argument="init",
            value=recipe.init,
            fix=f"pass `network={start.network}` or leave it out",
        )
    width = start.width if start.network else recipe.width
    changes: dict[str, Any] = {"network": network, "width": width, "init_sha256": digest}
    if start.contract is not None:
        for key in ("mean", "std", "interpolation"):
            changes[key] = getattr(recipe, key) or getattr(start.contract, key)
    return recipe.replace(**changes), start.state


def load_start(network: nn.Module, state: State, init: str) -> list[str]:
    """Gives a new network the weights of `resolve_start`; a classifier for other classes stays as it is.

    Returns:
        Names of parameters that the weights lack or that have another shape, which belong to the classifier.

    Raises:
        InputError: other parameters are missing, or have other shapes.
    """
    own = network.state_dict()
    classifiers = classifier_names(timm_settings(network)["classifier"])
    try:
        state = find_weights(own, state, classifiers)[0].tensors
    except ValueError as exc:
        raise InputError(f"cannot be used ({exc})", argument="init", value=init) from exc
    state = {name: value for name, value in own.items() if name.endswith(OPTIONAL)} | state
    left_out = [name for name in own if name not in state or state[name].shape != own[name].shape]
    unfit = [name for name in left_out if not name.startswith(tuple(f"{one}." for one in classifiers))]
    if unfit:
        found = tuple(state[unfit[0]].shape) if unfit[0] in state else "none"
        raise InputError(
            f"{len(unfit)} of the network's {len(own)} tensors do not fit, such as {unfit[0]}: "
            f"expected {tuple(own[unfit[0]].shape)}, got {found}; it holds {describe_tensors(state)}",
            argument="init",
            value=init,
            fix="check `network` and `image_sizes`",
        )
    with torch.no_grad():
        for name, value in own.items():
            if name not in left_out:
                value.copy_(state[name])
    return left_out


def state_digest(state: dict[str, Tensor]) -> str:
    """sha256 over the names, types, shapes and values of tensors."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        values = value.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _open_start(init: str) -> _Start:
    """The weights of a run, a file, a model folder, or ORG/NAME on the Hub."""
    path = Path(init)
    if path.name in {CHECKPOINT_NAME, BEST_NAME} or (path / CHECKPOINT_NAME).is_file():
        return _start_of_run(path)
    if path.is_file():
        try:
            return _Start(read_state(path))
        except ValueError as exc:
            raise InputError(f"cannot be read ({exc})", argument="init", value=init) from exc
    try:
        folder = resolve_model(init)
        weights = folder.read(WEIGHTS)
    except ModelFolderError as exc:
        raise InputError(exc.what, argument="init", value=init, fix=exc.fix) from exc
    config = folder.config
    state = {name: value.float() for name, value in load(weights).items()}
    if config.components_of:  # its last layer is no classifier
        state = {name: value for name, value in state.items() if not name.startswith(f"{config.classifier}.")}
    own, _, width = config.architecture.partition("resnet18-width")
    if own == "robustfeat:":
        return _Start(state, "resnet18", int(width), config.preprocessing)
    if config.library != "timm":
        raise InputError(
            f"is {config.architecture}, which is not trained here",
            argument="init",
            value=init,
            fix="start from a network of timm",
        )
    network = config.architecture if config.architecture == "resnet18" else f"timm:{config.architecture}"
    return _Start(state, network, 64, config.preprocessing)


def _start_of_run(path: Path) -> _Start:
    try:
        checkpoint = load_checkpoint(path)
        recipe = Recipe.from_dict(checkpoint.recipe)
    except (CheckpointError, InputError) as exc:
        raise InputError(f"cannot be read ({first_line(exc)})", argument="init", value=path) from exc
    return _Start(features_of(checkpoint), recipe.network, recipe.width, recipe.preprocessing())
