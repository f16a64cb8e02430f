"""Converts the image processors of transformers to preprocessing contracts.

`preprocessor_config.json` names a class and the settings that differ from its defaults. The table of defaults and the
order of the steps follow transformers 5.24. Settings that a contract cannot express are refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from robustfeat.errors import ModelFolderError
from robustfeat.hub.preprocessing import IMAGENET_MEAN, IMAGENET_STD, INTERPOLATIONS, Preprocessing, crop_share

__all__ = ["read_image_processor"]

_HALF = (0.5, 0.5, 0.5)
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_BILINEAR, _BICUBIC = 2, 3

_COMMON: dict[str, Any] = {
    "do_resize": True,
    "default_to_square": True,
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": _HALF,
    "image_std": _HALF,
    "resample": _BICUBIC,
    "do_pad": False,
    "pad_size": None,
    "crop_size": None,
}
_IMAGENET = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
_CLIP = {
    "size": {"shortest_edge": 224},
    "default_to_square": False,
    "do_center_crop": True,
    "crop_size": 224,
    "image_mean": _CLIP_MEAN,
    "image_std": _CLIP_STD,
}
_MOBILENET = {
    "size": {"shortest_edge": 256},
    "default_to_square": False,
    "do_center_crop": True,
    "crop_size": 224,
    "resample": _BILINEAR,
}
_SHORTEST_224 = {"size": {"shortest_edge": 224}, "default_to_square": False, "do_center_crop": True, "crop_size": 224}

_DEFAULTS: dict[str, dict[str, Any]] = {
    "Beit": {"size": 224, "crop_size": 224},
    "Bit": _CLIP,
    "Blip": {"size": 384, "image_mean": _CLIP_MEAN, "image_std": _CLIP_STD},
    "CLIP": {**_CLIP, "use_square_size": False},
    "ChineseCLIP": _CLIP,
    "ConvNext": {"size": {"shortest_edge": 384}, "default_to_square": False, "crop_pct": 224 / 256},
    "DINOv3ViT": {**_IMAGENET, "size": 224, "resample": _BILINEAR},
    "DeiT": {"size": 256, "do_center_crop": True, "crop_size": 224},
    "EfficientNet": {"size": 346, "crop_size": 289, "rescale_offset": False, "include_top": True},
    "Levit": {**_IMAGENET, **_SHORTEST_224},
    "MobileNetV1": _MOBILENET,
    "MobileNetV2": _MOBILENET,
    "MobileViT": {**_SHORTEST_224, "crop_size": 256, "do_flip_channel_order": True},
    "PoolFormer": {**_IMAGENET, **_SHORTEST_224, "crop_pct": 0.9},
    "Pvt": {**_IMAGENET, "size": 224},
    "Siglip": {"size": {"height": 224, "width": 224}, "default_to_square": False},
    "ViT": {"size": 224, "resample": _BILINEAR},
}
"""Defaults of each class, by the name without `ImageProcessor`; `_COMMON` has the rest."""

_OF_MODEL_TYPE = {
    "Beit": "beit data2vec-vision",
    "Bit": "bit dinov2 dinov2_with_registers focalnet hiera pixio",
    "Blip": "blip",
    "CLIP": "aimv2 aimv2_vision_model clip clip_vision_model metaclip_2 mlcd",
    "ChineseCLIP": "chinese_clip chinese_clip_vision_model",
    "ConvNext": "convnext convnextv2 cvt regnet resnet",
    "DINOv3ViT": "dinov3_vit dinov3_convnext",
    "DeiT": "deit",
    "EfficientNet": "efficientnet align",
    "Levit": "levit",
    "MobileNetV1": "mobilenet_v1",
    "MobileNetV2": "mobilenet_v2",
    "MobileViT": "mobilevit mobilevitv2",
    "PoolFormer": "poolformer",
    "Pvt": "pvt pvt_v2",
    "Siglip": "siglip siglip_vision_model",
    "ViT": "dinat ijepa swiftformer swin swinv2 vit vit_mae vit_msn",
}
"""Classes by the model types of config.json, in case `preprocessor_config.json` names no class."""

_FILTERS = {int(value): name for name, value in INTERPOLATIONS.items()}
_OVERSHOOTING = ("bicubic", "lanczos")
_WARPED_FROM = 384
"""Size in pixels from which ConvNext resizes both sides and does not crop."""
_REMEDY = "use another model, or import its ONNX file with your own settings (robustfeat import)"


def read_image_processor(
    processor: Mapping[str, Any], config: Mapping[str, Any], source: str = "preprocessor_config.json"
) -> Preprocessing:
    """Returns the contract that prepares images as an image processor of transformers does.

    Args:
        processor: the content of preprocessor_config.json.
        config: the content of config.json. Its `model_type` decides if `processor` names no class.
        source: the file's name in messages.

    Raises:
        ModelFolderError: the class is unknown, or a contract cannot express a setting, such as a size that depends on
            the image.
    """
    reader = _Reader(processor, _class_of(processor, config, source), source)
    try:
        mode, resized = reader.resize()
        side = reader.crop(mode, resized)
        mean, std = reader.mean_and_std()
        # With equal margins on both sides, nothing is rounded.
        rounding = "even" if mode == "squash" and (resized - side) % 2 == 0 else "down"
        return Preprocessing(
            image_size=side,
            crop_pct=crop_share(side, resized),
            interpolation=reader.interpolation(),
            mean=mean,
            std=std,
            crop_mode=mode,
            crop_rounding=rounding,
            channel_order="bgr" if reader.settings.get("do_flip_channel_order") else "rgb",
        )
    except (ValueError, ArithmeticError) as exc:  # absurd numbers
        raise ModelFolderError(f"{source}: cannot be a preprocessing contract ({exc})", fix=_REMEDY) from exc


def _class_of(processor: Mapping[str, Any], config: Mapping[str, Any], source: str) -> str:
    """The class's key in `_DEFAULTS`."""
    code = processor.get("auto_map")
    if isinstance(code, Mapping) and {"AutoImageProcessor", "AutoFeatureExtractor"} & set(code):
        raise ModelFolderError(f"{source}: auto_map names code to prepare images, which never runs", fix=_REMEDY)
    named = processor.get("image_processor_type") or processor.get("feature_extractor_type")
    named = named or config.get("image_processor_type")
    if named is None:
        kind = config.get("model_type")
        found = next((name for name, types in _OF_MODEL_TYPE.items() if kind in types.split()), None)
        if found is None:
            raise ModelFolderError(
                f"{source}: image_processor_type is missing, and none is known for the model type {kind!r}", fix=_REMEDY
            )
        return found
    name = str(named).replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    key = name.removesuffix("ImageProcessor")
    if name == key or key not in _DEFAULTS:
        why = " (its sizes depend on the image)" if key == "Siglip2" else ""
        known = ", ".join(sorted(_DEFAULTS))
        raise ModelFolderError(
            f"{source}: image_processor_type {named!r} is not supported{why}; expected one of {known} ImageProcessor",
            fix=_REMEDY,
        )
    return key


class _Reader:
    """The settings of one image processor, with the defaults of its class."""

    def __init__(self, processor: Mapping[str, Any], kind: str, source: str) -> None:
        self._kind, self._source = kind, source
        defaults = {**_COMMON, **_DEFAULTS[kind]}
        # As in transformers, null means the default, and unknown keys have no effect.
        given = {key: processor[key] for key in defaults if processor.get(key) is not None}
        self.settings: dict[str, Any] = {**defaults, **given}
        # An unknown `do_...` key, however, may be a step of a later version of the class.
        for key, value in processor.items():
            if key.startswith("do_") and key not in self.settings and value and key not in _HARMLESS:
                raise self._refuse(key, value, "this class has no such setting")

    def resize(self) -> tuple[str, int]:
        """The `crop_mode`, and R, the resized side."""
        settings = self.settings
        if not settings["do_resize"]:
            raise self._refuse("do_resize", False, "images keep their own sizes")
        size = self._size_of("size")
        if self._kind == "CLIP" and settings["use_square_size"]:
            size = {"height": 224, "width": 224}
        shortest = size.get("shortest_edge")
        if shortest is None and size.get("height") != size.get("width"):
            raise self._refuse("size", size, "the input must be a square")
        side = shortest or size["height"]
        if self._kind == "PoolFormer":
            return "center", int(side / self._number("crop_pct"))
        if self._kind == "ConvNext":
            if shortest is None:
                raise self._refuse("size", size, "this class needs shortest_edge")
            if side >= _WARPED_FROM:
                return "squash", side
            return "center", int(side / self._number("crop_pct"))
        if shortest is None:
            return "squash", side
        return "center", int(256 / 224 * side) if self._kind == "Levit" else side

    def crop(self, mode: str, resized: int) -> int:
        """S, the side of the network's input."""
        own = self._size_of("size")["shortest_edge"] if self._kind == "ConvNext" else None
        if not self.settings["do_center_crop"]:
            side = own or (resized if mode == "squash" else None)
            if side is None:
                raise self._refuse("do_center_crop", False, f"with size {self.settings['size']} the sides differ")
        else:
            wanted = self._size_of("crop_size")
            side = wanted.get("height")
            if side is None or side != wanted.get("width"):
                raise self._refuse("crop_size", wanted, "the input must be a square")
            if own is not None and side != own:
                raise self._refuse("crop_size", wanted, f"a second crop beside the {own} px of size")
            if side > resized:
                raise self._refuse("crop_size", wanted, f"images of {resized} px would be padded")
        if self.settings["do_pad"] and self.settings["pad_size"] is not None:
            padded = self._size_of("pad_size")
            if padded != {"height": side, "width": side}:
                raise self._refuse("pad_size", padded, f"images of {side} px would be padded")
        return side

    def interpolation(self) -> str:
        """The filter's name."""
        value = self.settings["resample"]
        name = _FILTERS.get(value) if type(value) is int else None
        if name is None:
            raise self._refuse("resample", value, f"expected a number from 0 to {max(_FILTERS)}")
        if self._kind == "DINOv3ViT" and name in _OVERSHOOTING:
            # This class resizes after rescaling, so nothing is rounded or clipped to black and white.
            raise self._refuse("resample", value, f"{name} without the limits of 8 bits")
        return name

    def mean_and_std(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Mean and standard deviation for values in [0, 1], including the factor and the offset of rescaling."""
        settings, none = self.settings, ([0.0] * 3, [1.0] * 3)
        # MobileViT has no such step.
        normalises = settings["do_normalize"] and self._kind != "MobileViT"
        means, stds = (self._three("image_mean"), self._three("image_std")) if normalises else none
        rescales = settings["do_rescale"]
        scale = 255 * self._number("rescale_factor") if rescales else 255.0
        offset = 1.0 if rescales and settings.get("rescale_offset") else 0.0
        # EfficientNet divides a second time for classification.
        again = self._three("image_std") if settings.get("include_top") else none[1]
        red, green, blue = ((offset + mean) / scale for mean in means)
        x, y, z = (std * other / scale for std, other in zip(stds, again, strict=True))
        return (red, green, blue), (x, y, z)

    def _size_of(self, key: str) -> dict[str, int]:
        """The size as `height` and `width`, or as `shortest_edge`."""
        value = self.settings[key]
        square = self.settings["default_to_square"] or key != "size"
        if type(value) is int:
            value = {"height": value, "width": value} if square else {"shortest_edge": value}
        elif isinstance(value, (list, tuple)) and len(value) == 2:
            value = {"height": value[0], "width": value[1]}
        if isinstance(value, Mapping):
            value = {side: pixels for side, pixels in value.items() if pixels is not None}
        known = isinstance(value, Mapping) and set(value) in ({"height", "width"}, {"shortest_edge"})
        if not known or not all(type(side) is int and side > 0 for side in value.values()):
            raise self._refuse(
                key, self.settings[key], "expected one side, height and width, or shortest_edge, in pixels"
            )
        return dict(value)

    def _number(self, key: str) -> float:
        value = self.settings[key]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise self._refuse(key, value, "expected a number above 0")
        return float(value)

    def _three(self, key: str) -> list[float]:
        value = self.settings[key]
        values = [value] * 3 if isinstance(value, (int, float)) else value
        if not isinstance(values, (list, tuple)) or len(values) != 3 or not all(map(_is_number, values)):
            raise self._refuse(key, value, "expected three numbers, one per channel")
        return list(map(float, values))

    def _refuse(self, key: str, value: object, why: str) -> ModelFolderError:
        what = (
            f"{self._source}: {key} {value!r} of {self._kind}ImageProcessor cannot be a preprocessing contract: {why}"
        )
        return ModelFolderError(what, fix=_REMEDY)


_HARMLESS = frozenset({"do_convert_rgb", "do_reduce_labels"})
"""Settings without effect: colours are always RGB, and labels belong to segmentation."""


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
