"""Model folders from backbones that timm or torchvision knows, with their own or with given weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from robustfeat.errors import InputError, first_line
from robustfeat.hub.config import ModelConfig
from robustfeat.hub.preprocessing import Preprocessing
from robustfeat.training.export.arguments import check_import, weights_error
from robustfeat.training.export.calibration import folder_images
from robustfeat.training.export.folder import Backbone, ExportReport, write_model_folder
from robustfeat.training.start import read_state

__all__ = ["import_backbone"]


def import_backbone(
    source: str,
    out: str | Path,
    *,
    weights: str | Path | None = None,
    name: str | None = None,
    image_size: int | None = None,
    crop_pct: float | None = None,
    calibration: str | Path | None = None,
    int8: bool = True,
    terms: str | None = None,
    license_id: str | None = None,
) -> ExportReport:
    """Makes a model folder of a backbone.

    Args:
        source: `timm:NAME` or `torchvision:NAME`.
        out: the folder to make.
        weights: a state dict (.safetensors, or a file of `torch.save` that holds tensors alone, by name or under
            `state_dict` or `model`); by default the library's own pretrained weights, which it downloads. Its
            classifier may be for other classes, or missing. A file of `torch.save` keeps the order of its tensors:
            where it has none of the network's names, but as many tensors of the same kinds and shapes in the same
            order, they get those names.
        name: the model's name; by default made from the source.
        image_size, crop_pct: of the preprocessing contract; by default the library's for these weights.
        calibration: a folder of images for int8; besides the golden images.
        int8: also write onnx/model_int8.onnx.
        terms: under which terms the weights may be used, for the card.
        license_id: the Hub's name of a license; by default what timm knows of its own weights.

    Raises:
        InputError: no such backbone, or the weights do not fit it.
        ExportError: an exported file disagrees with PyTorch; nothing is left behind.
    """
    check_import(source, weights)
    library, _, architecture = source.partition(":")
    open_library = _from_timm if library == "timm" else _from_torchvision
    network, settings = open_library(architecture, pretrained=weights is None)
    if image_size is not None:
        settings["image_size"] = image_size
    if crop_pct is not None:
        settings["crop_pct"] = crop_pct
    try:
        contract = Preprocessing(**settings)
    except ValueError as exc:
        raise InputError(f"{source}: {exc}") from exc
    given = "its pretrained weights"
    if weights is not None:
        by_order = _load_weights(network, Path(weights), source)
        given = f"weights {Path(weights).name}" + (", named by order and shape" if by_order else "")
    timm_config: Mapping[str, Any] = network.pretrained_cfg  # type: ignore[assignment]
    if weights is None and terms is None:
        license_id = license_id or timm_config.get("license")
    state: dict[str, Tensor] = network.state_dict()
    features = copy.deepcopy(network)
    features.reset_classifier(0)  # type: ignore[operator]
    config = ModelConfig(
        name=name or source.replace(":", "-"),
        architecture=timm_config["architecture"],
        feature_size=_feature_size(features, contract, source),
        num_classes=int(network.num_classes),  # type: ignore[arg-type]
        preprocessing=contract,
        first_conv=timm_config.get("first_conv"),  # type: ignore[arg-type]
        classifier=timm_config.get("classifier"),  # type: ignore[arg-type]
        provenance={
            "source": f"{source}, {given}",
            "terms": terms or license_id or "those of the imported weights",
            **({"license": license_id} if license_id else {}),
            "versions": {"timm": timm.__version__, "torch": torch.__version__},
        },
    )
    images = None
    if int8:
        images = folder_images(calibration, contract) if calibration else []
    return write_model_folder(Backbone(features.eval(), state, config), out, calibration=images)


def _from_timm(architecture: str, *, pretrained: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The network and the fields of its `Preprocessing`."""
    try:
        network = timm.create_model(architecture, pretrained=pretrained).eval()
    except RuntimeError as exc:
        raise InputError(f"timm:{architecture}: {first_line(exc)}", fix="see timm.list_models()") from exc
    except OSError as exc:
        raise InputError(
            f"timm:{architecture}: its weights cannot be downloaded ({first_line(exc)})", fix="pass `weights=FILE`"
        ) from exc
    settings = resolve_model_data_config(network)
    if settings["input_size"][1] != settings["input_size"][2] or settings["crop_mode"] != "center":
        raise InputError(
            f"timm:{architecture}: expects {settings['input_size']} with crop mode {settings['crop_mode']}; "
            "only centred squares are supported"
        )
    return network, {
        "image_size": settings["input_size"][1],
        **{key: settings[key] for key in ("crop_pct", "interpolation", "mean", "std")},
    }


def _from_torchvision(architecture: str, *, pretrained: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The network as timm's namesake, so that the folder loads there too, and the fields of its `Preprocessing`."""
    try:
        choices = torchvision.models.get_model_weights(architecture)
    except ValueError as exc:
        raise InputError(f"torchvision:{architecture}: unknown", fix="see torchvision.models.list_models()") from exc
    default = choices.DEFAULT if hasattr(choices, "DEFAULT") else None
    try:
        original = torchvision.models.get_model(architecture, weights=default if pretrained else None)
    except OSError as exc:
        raise InputError(
            f"torchvision:{architecture}: its weights cannot be downloaded ({exc})", fix="pass `weights=FILE`"
        ) from exc
    try:
        network = timm.create_model(architecture, pretrained=False).eval()
        network.load_state_dict(original.state_dict())
    except RuntimeError as exc:
        raise InputError(
            f"torchvision:{architecture}: timm has no network with these parameters, so the folder would load in no "
            "other library",
            fix="import it as timm:NAME instead",
        ) from exc
    if not pretrained or default is None:
        return network, {"image_size": 224, "crop_pct": 0.875}
    preset = default.transforms()
    return network, {
        "image_size": preset.crop_size[0],
        "crop_pct": _crop_pct(preset.crop_size[0], preset.resize_size[0]),
        "interpolation": preset.interpolation.value,
        "mean": tuple(preset.mean),
        "std": tuple(preset.std),
    }


def _crop_pct(crop: int, resize: int) -> float:
    """The share for which floor(crop / share) is `resize` in floating point, too."""
    share = crop / resize
    while math.floor(crop / share) < resize:
        share = math.nextafter(share, 0)
    return share


def _load_weights(network: nn.Module, file: Path, source: str) -> bool:
    """Gives the network the weights in a file; whether they were named by their order."""
    try:
        state = read_state(file)
    except ValueError as exc:
        raise weights_error(file, str(exc)) from exc
    _fit_classifier(network, state)
    renamed = None if file.suffix == ".safetensors" else _name_by_order(network, state)
    try:
        network.load_state_dict(state if renamed is None else renamed)
    except (RuntimeError, TypeError, AttributeError) as exc:
        reason = " ".join(line.strip() for line in str(exc).splitlines()[1:2]) or str(exc)
        raise InputError(f"does not fit {source} ({reason[:160]})", argument="weights", value=file) from exc
    return renamed is not None


def _fit_classifier(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Gives the network the classifier of these weights: for other classes, or none."""
    config: Mapping[str, Any] = network.pretrained_cfg  # type: ignore[assignment]
    name = config.get("classifier")
    if not isinstance(name, str) or not network.state_dict().keys() & state.keys():
        return
    own = [key for key in state if key.startswith(f"{name}.")]
    weight = state.get(f"{name}.weight")
    classes = 0 if not own else len(weight) if weight is not None and weight.ndim else network.num_classes
    if classes != network.num_classes:
        network.reset_classifier(classes)  # type: ignore[operator]


def _name_by_order(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The tensors under the network's own names, where they are another implementation's of the same network."""
    own = network.state_dict()
    if own.keys() & state.keys() or len(own) != len(state):
        return None
    pairs = list(zip(own.items(), state.items(), strict=True))
    same = all(
        mine.shape == other.shape and name.rpartition(".")[2] == other_name.rpartition(".")[2]
        for (name, mine), (other_name, other) in pairs
    )
    return {name: other for (name, _), (_, other) in pairs} if same else None


def _feature_size(network: nn.Module, contract: Preprocessing, source: str) -> int:
    side = contract.image_size
    try:
        with torch.no_grad():
            shape = network.eval()(torch.zeros(1, 3, side, side)).shape
    except (RuntimeError, AssertionError) as exc:
        raise InputError(f"{source}: cannot take {side} px images ({first_line(exc)})") from exc
    if len(shape) != 2:
        raise InputError(
            f"{source}: gives features of shape {tuple(shape[1:])}, not a vector", fix="choose another network"
        )
    return int(shape[1])
