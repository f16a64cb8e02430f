"""Networks of timm and torchvision by name, with their library's weights or with given ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
import torchvision
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn
from torchvision.models.vision_transformer import interpolate_embeddings

from robustfeat.errors import InputError, first_line
from robustfeat.hub.config import ModelConfig
from robustfeat.hub.preprocessing import crop_share
from robustfeat.training.export.downloads import limited_silence, require_download
from robustfeat.training.export.onnx_files import require_onnx_size
from robustfeat.training.export.stamp import quiet
from robustfeat.training.network import ResNet18, make_timm, timm_settings
from robustfeat.training.weights import (
    Found,
    classifier_names,
    describe_tensors,
    fill_network,
    find_weights,
    misfit,
    name_by_order,
    split_classifier,
)

__all__ = ["LibraryNetwork", "MisfitError", "open_network", "rebuild_features", "require_network"]

TORCHVISION = "torchvision:"
"""Stands before an architecture of torchvision that timm does not have."""

_POSITIONS = ("pos", "attention_bias")
"""In the names of tensors that timm interpolates for another image size."""

_CONVERTED, _BY_ORDER = "converted by timm", "named by order and shape"


class MisfitError(ValueError):
    """Weights do not belong to a network. The message says why."""


@dataclass
class LibraryNetwork:
    """A network with its weights.

    Attributes:
        network: images to logits, or to features where `num_classes` is 0.
        num_classes: number of its classes.
        names: `architecture`, `first_conv`, `classifier` and `fixed_input_size`, as `ModelConfig` has them.
        settings: fields of its `Preprocessing`, without those that have their defaults.
        license: the Hub's name of it, for the library's own weights.
        notes: how given weights were found and named, in a few words each.
    """

    network: nn.Module
    num_classes: int
    names: dict[str, Any]
    settings: dict[str, Any]
    license: str | None = None
    notes: tuple[str, ...] = ()

    def feature_network(self) -> nn.Module:
        """Removes the classifier, so the network outputs features."""
        _drop_classifier(self.network, self.names["classifier"])
        return self.network.eval()


@dataclass(frozen=True)
class _Given:
    """Weights from a file: `read_state`'s, and whether they have the order in which the network was made."""

    state: Mapping[str, Tensor]
    ordered: bool


def open_network(
    source: str, *, image_size: int | None = None, state: Mapping[str, Tensor] | None = None, ordered: bool = False
) -> LibraryNetwork:
    """A network of a library.

    Args:
        source: `timm:NAME` or `torchvision:NAME`.
        image_size: side of its input; by default the library's.
        state: its weights, of `read_state`; by default the library's own, which it downloads.
        ordered: whether `state` has the order in which the network was made.

    Raises:
        InputError: there is no such network or no such weights, or it cannot be made for images of that size.
        ExportError: the network is too large for an ONNX file.
        MisfitError: `state` is not this network's.
    """
    require_network(source)
    library, _, name = source.partition(":")
    given = None if state is None else _Given(state, ordered)
    return (_open_timm if library == "timm" else _open_torchvision)(name, image_size, given)


def require_network(source: str) -> None:
    """Checks that a library has a network of this name, without looking for repositories on the Hub.

    Raises:
        InputError: it has not.
    """
    library, _, name = source.partition(":")
    if library == "timm" and "/" not in name and not timm.is_model(name):
        raise InputError(f"{source}: unknown", fix="see timm.list_models()")
    if library == "torchvision" and name.lower() not in torchvision.models.list_models(module=torchvision.models):
        raise InputError(f"{source}: unknown", fix="see torchvision.models.list_models()")


def rebuild_features(config: ModelConfig, state: Mapping[str, Tensor]) -> nn.Module:
    """The network of a model folder, from images to features.

    Args:
        config: config of the folder.
        state: tensors of its model.safetensors.

    Raises:
        LookupError: no library has such a network.
        Exception: the weights do not fit. Libraries raise many kinds.
    """
    name, side = config.architecture, config.preprocessing.image_size
    own, _, width = name.partition("resnet18-width")
    network: nn.Module
    if own == "robustfeat:":
        network = ResNet18(max(config.num_classes, 1), int(width))
    elif name.startswith(TORCHVISION):
        network = _make_torchvision(name.removeprefix(TORCHVISION), side, max(config.num_classes, 1))
    elif timm.is_model(name):  # it may be an address, which timm would follow
        network = make_timm(name, side if config.fixed_input_size else None, num_classes=config.num_classes)
    else:
        raise LookupError(f"timm has no network called {name!r}")
    if not config.num_classes:
        _drop_classifier(network, config.classifier)
    fill_network(network, state)
    if not config.feature_outputs:
        _drop_classifier(network, config.classifier)
    return network.eval()


def _drop_classifier(network: nn.Module, classifier: Any) -> None:
    any_network: Any = network
    if hasattr(network, "reset_classifier"):  # a network of timm
        any_network.reset_classifier(0)
        return
    for name in classifier_names(classifier):
        network.set_submodule(name, nn.Identity())


def _outline(make: Callable[[], nn.Module]) -> nn.Module:
    """A network for its names and shapes, without memory for its values where it can be made so."""
    try:
        with torch.device("meta"):
            return make()
    except Exception:  # it computes with its first values, or cannot be made at all
        return make()


# timm


def _open_timm(name: str, image_size: int | None, given: _Given | None) -> LibraryNetwork:
    make = partial(_make_timm, name, image_size)
    outline = _outline(make)
    found = resolve_model_data_config(outline)
    if image_size is None and found["input_size"][1] != found["input_size"][2]:
        raise InputError(f"timm:{name}: expects {found['input_size']}, not squares", fix="pass `image_size`")
    require_onnx_size(outline, f"timm:{name}")
    about: Any = outline.pretrained_cfg
    notes: tuple[str, ...] = ()
    if given is None:
        require_download(f"timm:{name}", about)
        network = make(pretrained=True)
    else:
        network, notes = _fill_timm(outline, make, given)
    about = network.pretrained_cfg
    settings = {key: found[key] for key in ("crop_pct", "crop_mode", "interpolation", "mean", "std")}
    return LibraryNetwork(
        network=network.eval(),
        num_classes=int(network.num_classes),  # type: ignore[arg-type]
        names=timm_settings(network),
        settings={"image_size": image_size or found["input_size"][1], **settings},
        license=about.get("license") if given is None else None,
        notes=notes,
    )


def _make_timm(name: str, image_size: int | None, **options: Any) -> nn.Module:
    """See `make_timm`.

    Raises:
        InputError: timm cannot make it.
    """
    try:
        return make_timm(name, image_size, **options)
    except OSError as exc:
        raise InputError(
            f"timm:{name}: its weights cannot be downloaded ({first_line(exc)})", fix="pass `weights=FILE`"
        ) from exc
    except Exception as exc:  # networks check their arguments in ways of their own
        fix = "pass another `image_size`" if image_size else None
        raise InputError(f"timm:{name}: {first_line(exc)}", fix=fix) from exc


def _fill_timm(outline: nn.Module, make: Callable[..., nn.Module], given: _Given) -> tuple[nn.Module, tuple[str, ...]]:
    """The network with given weights, and how they were found."""
    about: Any = outline.pretrained_cfg
    classifiers, own = classifier_names(about.get("classifier")), outline.state_dict()
    default = int(outline.num_classes)  # type: ignore[arg-type]
    parts = _parts(own, given, classifiers)
    for part in parts:
        classes, tensors = split_classifier(own, part.tensors, classifiers)
        shapes = own if classes == default else _outline(partial(make, num_classes=classes)).state_dict()
        if misfit(shapes, tensors) is None:
            network = make(num_classes=classes)
            fill_network(network, tensors)
            return network, _notes(part)
        # Their classifier may have another name, at the end.
        last = [len(value) for value in part.tensors.values() if value.ndim == 2][-1:]
        for count in dict.fromkeys([classes, *last, default]):
            converted = _convert_by_timm(make, shapes, tensors if count == classes else part.tensors, count)
            if converted is not None:
                return converted, _notes(part, _CONVERTED)
    return _fill_by_order(partial(make, num_classes=default), own, parts, given)


def _convert_by_timm(
    make: Callable[..., nn.Module], own: Mapping[str, Tensor], tensors: dict[str, Tensor], classes: int
) -> nn.Module | None:
    """The network with weights of its first authors' names, or for another image size, as timm reads its own."""
    other = [name for name in tensors if name in own and tensors[name].shape != own[name].shape]
    if not tensors or not all(any(part in name for part in _POSITIONS) for name in other):
        return None  # timm would also resize patches, and so make another network of them
    nowhere = {"source": None, "url": None, "file": None, "hf_hub_id": None}
    overlay = {**nowhere, "state_dict": tensors, "num_classes": classes}
    try:
        network = make(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=classes)
    except Exception:  # timm's conversions expect certain names, and fail in ways of their own without them
        return None
    about: Any = network.pretrained_cfg
    about.pop("state_dict", None)  # timm's copy
    return network


# Both libraries


def _parts(own: Mapping[str, Tensor], given: _Given, classifiers: tuple[str, ...]) -> list[Found]:
    try:
        return find_weights(own, given.state, classifiers)
    except ValueError as exc:
        raise MisfitError(str(exc)) from exc


def _fill_by_order(
    make: Callable[[], nn.Module], own: Mapping[str, Tensor], parts: list[Found], given: _Given
) -> tuple[nn.Module, tuple[str, ...]]:
    for part in parts if given.ordered else []:
        named = name_by_order(own, part.tensors)
        if named is not None:
            network = make()
            fill_network(network, named)
            return network, _notes(part, _BY_ORDER)
    nearest = max(parts, key=lambda part: len(own.keys() & part.tensors.keys()))
    place = f" under {nearest.place}" if nearest.place else ""
    reason = misfit(own, nearest.tensors) or "timm cannot read it"
    if any(part in reason.partition(":")[0] for part in _POSITIONS):
        reason += ", which timm does not convert for this image size"
    raise MisfitError(f"{reason}; there are{place} {describe_tensors(nearest.tensors)}")


def _notes(part: Found, *more: str) -> tuple[str, ...]:
    return (*((f"{part.place} in it",) if part.place else ()), *more)


# torchvision


_TRAINING_ONLY = ("aux1", "aux2", "AuxLogits")
"""Classifiers in the middle of a network, which only training uses."""


def _open_torchvision(name: str, image_size: int | None, given: _Given | None) -> LibraryNetwork:
    name = name.lower()
    outline = _outline(partial(_make_torchvision, name, image_size))
    layers = dict(outline.named_modules())
    classifier = next((key for key, layer in reversed(layers.items()) if isinstance(layer, nn.Linear)), None)
    if classifier is None:
        raise InputError(f"torchvision:{name}: has no linear classifier, before which its features would be")
    require_onnx_size(outline, f"torchvision:{name}")
    settings: dict[str, Any] = {"image_size": image_size or 224, "crop_pct": 0.875}
    notes: tuple[str, ...] = ()
    if given is None:
        network, classes, settings = _download_torchvision(name, image_size)
    else:
        network, classes, notes = _fill_torchvision(name, image_size, classifier, given)
    twin = _timm_namesake(name, network.eval(), classes, settings["image_size"])
    first = next((key for key, layer in layers.items() if isinstance(layer, nn.Conv2d)), None)
    return LibraryNetwork(
        network=network if twin is None else twin,
        num_classes=classes,
        names={
            "architecture": f"{TORCHVISION}{name}" if twin is None else name,
            "first_conv": first,
            "classifier": classifier,
        },
        settings=settings,
        notes=notes,
    )


def _make_torchvision(name: str, image_size: int | None, classes: int | None = None) -> nn.Module:
    """The network without what only training uses; 0 classes leave its classifier as it is."""
    options = {"num_classes": classes} if classes else {}
    network: nn.Module
    try:
        with quiet():
            try:
                network = torchvision.models.get_model(name, image_size=image_size or 224, **options)
            except TypeError:  # it takes all sizes
                network = torchvision.models.get_model(name, **options)
    except Exception as exc:  # networks check their arguments in ways of their own
        raise InputError(f"torchvision:{name}: {first_line(exc)}", fix="pass another `image_size`") from exc
    for part in _TRAINING_ONLY:
        if hasattr(network, part):
            setattr(network, part, None)
    return network


def _for_features(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without `_TRAINING_ONLY`."""
    return {name: value for name, value in state.items() if name.partition(".")[0] not in _TRAINING_ONLY}


def _download_torchvision(name: str, image_size: int | None) -> tuple[nn.Module, int, dict[str, Any]]:
    """The network with torchvision's weights, for how many classes, and the fields of its `Preprocessing`."""
    weights = getattr(torchvision.models.get_model_weights(name), "DEFAULT", None)
    if weights is None:
        raise InputError(f"torchvision:{name}: torchvision has no weights of it", fix="pass `weights=FILE`")
    try:
        with limited_silence():
            state = weights.get_state_dict(progress=False, check_hash=True)
    except OSError as exc:
        raise InputError(
            f"torchvision:{name}: its weights cannot be downloaded ({first_line(exc)})", fix="pass `weights=FILE`"
        ) from exc
    classes = len(weights.meta["categories"])
    network = _make_torchvision(name, image_size, classes)
    fill_network(network, _sized(network, _for_features(state)))
    preset = weights.transforms()
    side = image_size or preset.crop_size[0]
    settings = {
        "image_size": side,
        "crop_pct": crop_share(preset.crop_size[0], preset.resize_size[0]),
        "interpolation": preset.interpolation.value,
        "mean": tuple(preset.mean),
        "std": tuple(preset.std),
    }
    if hasattr(network, "transform_input"):  # torchvision's own weights are for this input, which it makes by itself
        settings |= {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    return network, classes, settings


def _fill_torchvision(
    name: str, image_size: int | None, classifier: str, given: _Given
) -> tuple[nn.Module, int, tuple[str, ...]]:
    """The network with given weights, for how many classes, and how they were found."""
    own = _outline(partial(_make_torchvision, name, image_size)).state_dict()
    default = len(own[f"{classifier}.weight"])
    parts = _parts(own, given, (classifier,))
    for part in parts:
        classes, tensors = split_classifier(own, part.tensors, (classifier,))
        network = _make_torchvision(name, image_size, classes)
        if not classes:
            _drop_classifier(network, classifier)
        tensors = _sized(network, _for_features(tensors))
        if misfit(network.state_dict(), tensors) is None:
            fill_network(network, tensors)
            return network, classes, _notes(part)
    network, notes = _fill_by_order(partial(_make_torchvision, name, image_size), own, parts, given)
    return network, default, notes


def _sized(network: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with the position embeddings of torchvision's ViT interpolated to the network's size."""
    given = tensors.get("encoder.pos_embedding")
    own = network.state_dict().get("encoder.pos_embedding")
    if given is None or own is None or given.ndim != 3 or given.shape == own.shape:
        return tensors
    vit: Any = network
    try:
        sized: dict[str, Tensor] = interpolate_embeddings(vit.image_size, vit.patch_size, OrderedDict(tensors))
    except ValueError:  # they are of no square image
        return tensors
    return sized


def _timm_namesake(name: str, network: nn.Module, classes: int, side: int) -> nn.Module | None:
    """The network of timm of the same name with the same weights, if it has one that computes the same."""
    if not timm.is_model(name):
        return None
    twin: nn.Module = timm.create_model(name, num_classes=classes).eval()
    if misfit(twin.state_dict(), network.state_dict()) is not None:
        return None
    fill_network(twin, network.state_dict())
    images = torch.linspace(-2, 2, 3 * side**2).view(1, 3, side, side)
    try:
        with torch.no_grad():
            same = torch.allclose(twin(images), network(images), rtol=1e-3, atol=1e-4)
    except RuntimeError:  # the image is too small for it, which is said later
        return twin
    return twin if same else None
