"""Image processors as contracts, against transformers' own processors with Pillow and with torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from numpy.typing import NDArray
from PIL import Image
from transformers.models.auto import image_processing_auto

from robustfeat.errors import ModelFolderError
from robustfeat.hub.image_processor import _DEFAULTS, _OF_MODEL_TYPE, read_image_processor
from robustfeat.hub.preprocessing import Preprocessing, decode, preprocess

MOST_APART = {"pil": (2.01, 0.02), "torchvision": (7.01, 0.05), "DINOv3ViTImageProcessor": (1.01, 0.3)}
"""Levels of 255, at most and on average. A crop is resized from the original, which rounds differently by a level or
two. torchvision enlarges differently. DINOv3's processor does not round to 8 bits between its steps."""

CASES: list[tuple[str, dict[str, Any]]] = [
    ("BeitImageProcessor", {}),
    ("BeitImageProcessor", {"size": {"height": 64, "width": 64}, "do_center_crop": True, "crop_size": 49}),
    ("BitImageProcessor", {}),
    ("BitImageProcessor", {"size": {"shortest_edge": 66}, "crop_size": {"height": 57, "width": 57}}),
    ("BlipImageProcessor", {"size": 96}),
    ("CLIPImageProcessor", {"size": 65, "crop_size": 65}),
    ("CLIPImageProcessor", {"use_square_size": True}),
    ("ChineseCLIPImageProcessor", {}),
    ("ConvNextImageProcessor", {}),
    ("ConvNextImageProcessor", {"size": {"shortest_edge": 65}}),
    ("ConvNextImageProcessor", {"size": 96, "crop_pct": 0.95, "resample": 2, "image_mean": 0.4, "image_std": 0.3}),
    ("DINOv3ViTImageProcessor", {}),
    ("DINOv3ViTImageProcessor", {"size": {"height": 96, "width": 96}, "do_center_crop": True, "crop_size": 80}),
    ("DeiTImageProcessor", {}),
    ("EfficientNetImageProcessor", {}),
    ("EfficientNetImageProcessor", {"size": 64, "resample": 0, "include_top": False, "rescale_offset": True}),
    ("EfficientNetImageProcessor", {"rescale_factor": 1 / 127.5, "rescale_offset": True, "image_std": [0.5, 0.4, 0.3]}),
    ("LevitImageProcessor", {"size": {"shortest_edge": 96, "longest_edge": None}, "crop_size": 96}),
    ("MobileNetV1ImageProcessor", {}),
    ("MobileNetV2ImageProcessor", {"size": {"shortest_edge": 72}, "crop_size": [64, 64]}),
    ("MobileViTImageProcessor", {"size": {"shortest_edge": 72}, "crop_size": {"height": 64, "width": 64}}),
    ("MobileViTImageProcessor", {"size": 288, "resample": 2, "do_normalize": True, "do_flip_channel_order": False}),
    ("PoolFormerImageProcessor", {}),
    ("PoolFormerImageProcessor", {"size": {"height": 60, "width": 60}, "crop_size": 60, "crop_pct": 0.95}),
    ("PvtImageProcessor", {}),
    ("SiglipImageProcessor", {}),
    ("ViTImageProcessor", {}),
    ("ViTImageProcessor", {"size": 64, "resample": 1, "do_normalize": False}),
    ("ViTImageProcessor", {"size": 64, "resample": 4, "do_rescale": False, "image_mean": [99, 98, 97]}),
    ("ViTImageProcessor", {"size": 64, "resample": 5, "do_pad": True, "pad_size": {"height": 64, "width": 64}}),
]


def id_of(case: Any) -> str:
    return str(case).translate({ord(mark): None for mark in "'{}: "})[:60]


@pytest.fixture(scope="module")
def photos(example_files: list[Path]) -> list[Image.Image]:
    """Wide, tall and square photographs, sides odd and even, larger and smaller than the inputs."""
    images = [decode(file.read_bytes()) for file in example_files[::13]]
    return [*images, *(images[0].resize(size) for size in ((301, 200), (200, 333), (301, 301), (97, 60)))]


def backends(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The real processors. The one for DINOv3 has no form with Pillow."""
    classes = {"torchvision": name, "pil": f"{name}Pil"}
    found = {key: getattr(transformers, value) for key, value in classes.items() if hasattr(transformers, value)}
    return {key: found[key].from_dict({"image_processor_type": name, **settings}) for key in found}


def levels_apart(processor: Any, photos: list[Image.Image], contract: Preprocessing) -> NDArray[np.float64]:
    """How far our input and the processor's are apart, in 255ths of white, (n, 3, S, S)."""
    theirs = np.concatenate([np.asarray(processor(photo, return_tensors="np")["pixel_values"]) for photo in photos])
    ours = preprocess(photos, contract)
    assert theirs.shape == ours.shape
    std = np.asarray(contract.std)[:, None, None]
    apart: NDArray[np.float64] = np.abs(theirs.astype(np.float64) - ours) * std * 255
    return apart


@pytest.mark.parametrize(("name", "settings"), CASES, ids=id_of)
def test_a_contract_gives_the_input_of_transformers(
    name: str, settings: dict[str, Any], photos: list[Image.Image]
) -> None:
    contract = read_image_processor({"image_processor_type": name, **settings}, {})
    assert Preprocessing.from_dict(contract.to_dict()) == contract
    for backend, processor in backends(name, settings).items():
        if backend == "torchvision" and contract.interpolation in {"box", "hamming"}:
            continue  # which it does not know
        apart = levels_apart(processor, photos, contract)
        most, mean = MOST_APART.get(name, MOST_APART[backend])
        assert apart.max() <= most
        assert apart.mean() <= mean


@pytest.mark.parametrize(
    ("processor", "config", "name"),
    [
        ({"feature_extractor_type": "ViTFeatureExtractor"}, {}, "ViTImageProcessor"),
        ({"image_processor_type": "ViTImageProcessorFast"}, {"model_type": "clip"}, "ViTImageProcessor"),
        ({"image_processor_type": "DeiTImageProcessorPil"}, {}, "DeiTImageProcessor"),
        ({}, {"model_type": "dinov2_with_registers"}, "BitImageProcessor"),
        ({}, {"model_type": "resnet"}, "ConvNextImageProcessor"),
        ({}, {"model_type": "clip_vision_model", "image_processor_type": "ViTImageProcessor"}, "ViTImageProcessor"),
    ],
)
def test_the_class_is_found_as_transformers_finds_it(
    processor: dict[str, Any], config: dict[str, Any], name: str
) -> None:
    assert read_image_processor(processor, config) == read_image_processor({"image_processor_type": name}, {})


def test_model_types_have_the_classes_that_transformers_gives_them() -> None:
    theirs = image_processing_auto.IMAGE_PROCESSOR_MAPPING_NAMES  # type: ignore[attr-defined]
    for kind, types in _OF_MODEL_TYPE.items():
        for model_type in set(types.split()) & set(theirs):
            assert theirs[model_type]["torchvision"] == f"{kind}ImageProcessor", model_type


@pytest.mark.parametrize("name", _DEFAULTS)
def test_null_means_the_default_of_the_class(name: str) -> None:
    kind: dict[str, Any] = {"image_processor_type": f"{name}ImageProcessor"}
    if name == "MobileViT":
        kind["size"] = 288  # its default is smaller than its crop
    nulls = dict.fromkeys(["do_resize", "crop_size", "resample", "image_mean", "rescale_factor", "do_normalize"])
    assert read_image_processor({**nulls, **kind}, {}) == read_image_processor(kind, {})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"image_processor_type": "Siglip2ImageProcessor"}, "'Siglip2ImageProcessor' is not supported (its sizes"),
        ({"image_processor_type": "DetrImageProcessor"}, "'DetrImageProcessor' is not supported; expected one of Beit"),
        ({"image_processor_type": "Processor"}, "'Processor' is not supported"),
        ({"image_processor_type": None}, "image_processor_type is missing, and none is known for the model type None"),
        ({"auto_map": {"AutoImageProcessor": "code.Processor"}}, "auto_map names code"),
        ({"do_resize": False}, "do_resize False of ViTImageProcessor"),
        ({"size": {"height": 224, "width": 448}}, "size {'height': 224, 'width': 448}"),
        ({"size": {"longest_edge": 512}}, "size {'longest_edge': 512}"),
        ({"size": {"shortest_edge": 224, "longest_edge": 512}}, "size {'shortest_edge': 224, 'longest_edge': 512}"),
        ({"size": {"shortest_edge": 224}}, "do_center_crop False"),
        ({"size": "224"}, "size '224'"),
        ({"size": 0}, "size 0"),
        ({"size": True}, "size True"),
        ({"size": 5000}, "image_size must be between 8 and 4096; got 5000"),
        ({"do_center_crop": True}, "crop_size None"),
        ({"do_center_crop": True, "crop_size": [200, 100]}, "crop_size {'height': 200, 'width': 100}"),
        ({"do_center_crop": True, "crop_size": 256}, "images of 224 px would be padded"),
        ({"do_pad": True, "pad_size": {"height": 256, "width": 256}}, "pad_size {'height': 256, 'width': 256}"),
        ({"do_align_long_axis": True}, "do_align_long_axis True"),
        ({"resample": 9}, "resample 9"),
        ({"resample": "bicubic"}, "resample 'bicubic'"),
        ({"image_mean": [0.5]}, "image_mean [0.5]"),
        ({"image_std": [0.5, 0.5, "x"]}, "image_std [0.5, 0.5, 'x']"),
        ({"image_std": [0.0, 0.5, 0.5]}, "std must hold three numbers"),
        ({"rescale_factor": 0}, "rescale_factor 0"),
        ({"image_processor_type": "DINOv3ViTImageProcessor", "resample": 3}, "bicubic without the limits of 8 bits"),
        ({"image_processor_type": "ConvNextImageProcessor", "size": {"height": 64, "width": 64}}, "shortest_edge"),
        ({"image_processor_type": "MobileViTImageProcessor"}, "images of 224 px would be padded"),
    ],
    ids=id_of,
)
def test_what_a_contract_cannot_say_is_refused_by_name(settings: dict[str, Any], said: str) -> None:
    processor = {"image_processor_type": "ViTImageProcessor", **settings}
    with pytest.raises(ModelFolderError) as caught:
        read_image_processor(processor, {}, "org/name: preprocessor_config.json")
    assert str(caught.value).startswith("org/name: preprocessor_config.json: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
