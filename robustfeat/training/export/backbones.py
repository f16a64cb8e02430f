"""Model folders from backbones that timm or torchvision knows, with their own or with given weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from robustfeat.errors import InputError, first_line
from robustfeat.hub.config import ModelConfig
from robustfeat.hub.preprocessing import Preprocessing
from robustfeat.progress import remark
from robustfeat.training.export.arguments import check_import, weights_error
from robustfeat.training.export.calibration import import_images
from robustfeat.training.export.folder import Backbone, ExportReport, write_model_folder
from robustfeat.training.export.libraries import LibraryNetwork, MisfitError, open_network, require_network
from robustfeat.training.export.provenance import imported
from robustfeat.training.weights import read_state

__all__ = ["import_backbone"]

_LIBRARIES = ("timm", "torch", "torchvision")


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
    quiet: bool = True,
) -> ExportReport:
    """Makes a model folder of a backbone.

    Args:
        source: `timm:NAME` or `torchvision:NAME`.
        out: the folder to make.
        weights: tensors by name (.safetensors, or a file of `torch.save` with tensors and plain data only); by default
            the library's own pretrained weights, which it downloads. They may be in a part of the file, under further
            names such as `state_dict` or `module`, in half precision, and with a classifier for other classes or none.
            timm converts names of a network's first authors, and position embeddings for another `image_size`. A file
            of `torch.save` keeps the order of its tensors: where it has none of the network's names, but as many
            tensors of the same kinds and shapes in the same order, they get those names.
        name: the model's name; by default made from the source.
        image_size, crop_pct: settings of the preprocessing contract; by default the library's for these weights.
        calibration: a folder of images for int8; besides the golden images.
        int8: also write onnx/model_int8.onnx.
        terms: under which terms the weights may be used, for the card.
        license_id: the Hub's name of a license; by default what timm knows of its own weights.
        quiet: say nothing of the steps on stderr.

    Raises:
        InputError: no such backbone, or the weights do not fit it.
        ExportError: an exported file disagrees with PyTorch; nothing is left behind.
    """
    check_import(source, weights)
    opened = _open(source, weights, image_size, quiet=quiet)
    if crop_pct is not None:
        opened.settings["crop_pct"] = crop_pct
    try:
        contract = Preprocessing(**opened.settings)
    except ValueError as exc:
        raise InputError(f"{source}: {exc}") from exc
    given = "its pretrained weights" if weights is None else f"weights {Path(weights).name}"
    if terms is None:
        license_id = license_id or opened.license
    state: dict[str, Tensor] = opened.network.state_dict()
    features = opened.feature_network()
    config = ModelConfig(
        name=name or source.replace(":", "-"),
        feature_size=_feature_size(features, contract, source),
        num_classes=opened.num_classes,
        preprocessing=contract,
        provenance=imported(
            ", ".join([source, given, *opened.notes]), terms=terms, license_id=license_id, libraries=_LIBRARIES
        ),
        **opened.names,
    )
    images = import_images(calibration, contract, int8=int8)
    return write_model_folder(Backbone(features, state, config), out, calibration=images, quiet=quiet)


def _open(source: str, weights: str | Path | None, image_size: int | None, *, quiet: bool) -> LibraryNetwork:
    if weights is None:
        remark(f"{source}: takes the library's weights, and downloads them if its cache lacks them", quiet=quiet)
        return open_network(source, image_size=image_size)
    require_network(source)  # before a large file is read
    file = Path(weights)
    try:
        state = read_state(file)
    except ValueError as exc:
        raise weights_error(file, str(exc)) from exc
    remark(f"{source}: takes the weights of {file.name}", quiet=quiet)
    try:
        return open_network(source, image_size=image_size, state=state, ordered=file.suffix != ".safetensors")
    except MisfitError as exc:
        raise InputError(f"does not fit {source} ({exc})", argument="weights", value=file) from exc


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
