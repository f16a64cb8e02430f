"""Small seeded networks of transformers as repositories on the Hub have them: exported as Optimum does it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from robustfeat.hub.preprocessing import decode

__all__ = ["FAMILIES", "Family", "reference_features", "write_repository"]

_OUTPUTS = ("image_embeds", "last_hidden_state", "pooler_output")


@dataclass(frozen=True)
class Family:
    """A kind of network: its classes, its sizes, and what its features are.

    Attributes:
        network, processor: names of transformers' classes.
        config, settings: of both.
        features: of `_OUTPUTS`, or `cls`.
        stem: of its ONNX file's name.
        tracing: whether the exporter that Optimum uses can export it.
    """

    network: str
    processor: str
    config: dict[str, Any]
    settings: dict[str, Any]
    features: str = "pooler_output"
    stem: str = "model"
    tracing: bool = True


_VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_TOKENS = {**_VIT, "image_size": 64, "patch_size": 16}
_DINOV2 = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
_STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
_SQUARE = {"size": {"height": 64, "width": 64}}
_CROP = {"size": {"shortest_edge": 73}, "crop_size": {"height": 64, "width": 64}}
_DINOV2_CROP = {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}}

FAMILIES = {
    "dinov2": Family("Dinov2", "Bit", _DINOV2, _DINOV2_CROP),
    "dinov2-registers": Family(
        "Dinov2WithRegisters", "Bit", {**_DINOV2, "num_register_tokens": 4}, _DINOV2_CROP, tracing=False
    ),
    "dinov3": Family("DINOv3ViT", "DINOv3ViT", {**_TOKENS, "num_register_tokens": 4}, _SQUARE),
    "clip": Family("CLIPVision", "CLIP", {**_TOKENS, "projection_dim": 24}, _CROP, "image_embeds", "vision_model"),
    "siglip": Family("SiglipVision", "Siglip", _TOKENS, _SQUARE, stem="vision_model"),
    # SigLIP 2 of one resolution has the classes of SigLIP, a larger vocabulary and other settings.
    "siglip2": Family(
        "SiglipVision", "Siglip", {**_TOKENS, "patch_size": 8}, {**_SQUARE, "resample": 2}, stem="vision_model"
    ),
    "vit": Family("ViT", "ViT", _TOKENS, _SQUARE, "cls"),
    "deit": Family("DeiT", "DeiT", _TOKENS, {"size": {"height": 73, "width": 73}, "crop_size": 64}, "cls"),
    "beit": Family("Beit", "Beit", {**_TOKENS, "use_relative_position_bias": True}, _SQUARE),
    "swin": Family(
        "Swin",
        "ViT",
        {"image_size": 64, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
        _SQUARE,
    ),
    "convnextv2": Family("ConvNextV2", "ConvNext", {**_STAGES, "image_size": 64}, {"size": {"shortest_edge": 64}}),
    "resnet": Family(
        "ResNet",
        "ConvNext",
        {**_STAGES, "embedding_size": 8, "layer_type": "basic"},
        {"size": {"shortest_edge": 64}, "crop_pct": 0.9},
    ),
    "mobilenetv2": Family("MobileNetV2", "MobileNetV2", {"depth_multiplier": 0.35, "image_size": 64}, _CROP),
    "efficientnet": Family(
        "EfficientNet",
        "EfficientNet",
        {"width_coefficient": 0.25, "depth_coefficient": 0.25, "image_size": 64, "hidden_dim": 320},
        {**_SQUARE, "resample": 0, "image_std": [0.47853944, 0.4732864, 0.47434163]},
    ),
    "mobilevit": Family(
        "MobileViT",
        "MobileViT",
        {"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 64]},
        _CROP,
    ),
}


def write_repository(name: str, out: Path, photos: Sequence[Path]) -> None:
    """Writes config.json, preprocessor_config.json, the weights for PyTorch and onnx/STEM.onnx of a family.

    Args:
        name: of `FAMILIES`.
        out: the folder.
        photos: images that give BatchNorm its statistics.
    """
    family = FAMILIES[name]
    torch.manual_seed(0)
    config: Any = getattr(transformers, f"{family.network}Config")(**family.config)
    config._attn_implementation = "eager"
    suffix = "ModelWithProjection" if family.features == "image_embeds" else "Model"
    network: Any = getattr(transformers, family.network + suffix)(config)
    processor = _processor(family, "pil")
    for parameter in network.parameters():
        # Wide enough for images to differ.
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.1)
        elif parameter.ndim == 4:
            nn.init.kaiming_normal_(parameter, nonlinearity="linear")
    _fit_batch_norm(network, _inputs(processor, photos))
    out.mkdir(parents=True)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    network.eval().save_pretrained(out)
    processor.save_pretrained(out)
    side = _inputs(processor, photos[:1]).shape[-1]
    _export(network, side, out / "onnx" / f"{family.stem}.onnx", tracing=family.tracing)


def reference_features(name: str, folder: Path, photos: Sequence[Path], backend: str) -> NDArray[np.float32]:
    """What transformers' own processor and network give, (n, D) float32.

    Args:
        name: of `FAMILIES`.
        folder: as `write_repository` made it.
        photos: image files.
        backend: `pil` or `torchvision`, which prepares the images.
    """
    family = FAMILIES[name]
    suffix = "ModelWithProjection" if family.features == "image_embeds" else "Model"
    network: Any = getattr(transformers, family.network + suffix).from_pretrained(folder).eval()
    class_name = type(_processor(family, backend)).__name__
    pixels = _inputs(getattr(transformers, class_name).from_pretrained(folder), photos)
    with torch.no_grad():
        outputs = network(pixel_values=pixels)
    found = outputs.last_hidden_state[:, 0] if family.features == "cls" else outputs[family.features].flatten(1)
    return np.asarray(found.numpy(), np.float32)


def _processor(family: Family, backend: str) -> Any:
    """With Pillow where such a class exists, as DINOv3 has none."""
    name = f"{family.processor}ImageProcessor"
    chosen = getattr(transformers, f"{name}Pil", None) if backend == "pil" else None
    return (chosen or getattr(transformers, name))(**family.settings)


def _inputs(processor: Any, photos: Sequence[Path]) -> torch.Tensor:
    images: list[Image.Image] = [decode(photo.read_bytes()) for photo in photos]
    pixels: torch.Tensor = processor(images, return_tensors="pt")["pixel_values"]
    return pixels


def _fit_batch_norm(network: nn.Module, pixels: torch.Tensor) -> None:
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    if norms:
        network.train()
        with torch.no_grad():
            network(pixel_values=pixels)
    for norm in norms:  # channels of next to no variance must not become the loudest
        assert norm.running_var is not None
        norm.running_var.clamp_(min=1.1 * float(norm.running_var.mean()))


class _Exported(nn.Module):
    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.network, self.names = network, names

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self.network(pixel_values=pixel_values)
        return tuple(outputs[name] for name in self.names)


def _export(network: nn.Module, side: int, file: Path, *, tracing: bool) -> None:
    pixels = torch.zeros(2, 3, side, side)
    with torch.no_grad():
        outputs = network(pixel_values=pixels)
    names = [name for name in _OUTPUTS if outputs.get(name) is not None]
    file.parent.mkdir()
    known: dict[str, Any] = {"input_names": ["pixel_values"], "output_names": names, "verbose": False}
    if tracing:
        # Optimum's names for what is free.
        known["dynamic_axes"] = {
            "pixel_values": {0: "batch_size", 1: "num_channels", 2: "height", 3: "width"},
            **{name: {0: "batch_size"} for name in names},
        }
    else:
        known |= {"external_data": False, "dynamic_shapes": {"pixel_values": {0: torch.export.Dim("batch_size")}}}
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(_Exported(network, names), (pixels,), str(file), dynamo=not tracing, **known)
    finally:
        logging.disable(logging.NOTSET)
