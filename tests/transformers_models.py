"""Small seeded networks of transformers as repositories on the Hub have them: exported as Optimum does it."""

from __future__ import annotations

import json
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

__all__ = [
    "FAMILIES",
    "Family",
    "reference_features",
    "reference_texts",
    "write_repository",
    "write_two_towers",
]

_OUTPUTS = ("image_embeds", "text_embeds", "last_hidden_state", "pooler_output")


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
    _export(network, torch.zeros(2, 3, side, side), out / "onnx" / f"{family.stem}.onnx", tracing=family.tracing)


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


TEXT_MODELS = {"clip": ("CLIP", 77), "siglip": ("Siglip", 16), "siglip2": ("Siglip", 16)}
"""The prefix of transformers' classes, and the most tokens that a text has."""

TEXTS = ["a red dress", "Two dogs, on GRASS!", "x", "a very long description of " + "flowers and trees " * 30]

_TOWER = {**_VIT, "projection_dim": 32}


def write_two_towers(kind: str, out: Path) -> None:
    """Writes a seeded network for texts and images as transformers.js has it: each tower is an ONNX file.

    Args:
        kind: of `TEXT_MODELS`.
        out: the folder.
    """
    prefix, most = TEXT_MODELS[kind]
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    out.mkdir(parents=True)
    tokenizer = _clip_tokenizer() if kind == "clip" else _siglip_tokenizer(most, second=kind == "siglip2")
    text = {**_TOWER, "vocab_size": len(tokenizer), "max_position_embeddings": most, "projection_size": 32}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if kind != "siglip2":  # whose config leaves it to a default that is wrong
        text["pad_token_id"] = tokenizer.pad_token_id
    config: Any = getattr(transformers, f"{prefix}Config")(
        text_config=text, vision_config={**_TOKENS, "projection_dim": 32}, projection_dim=32
    )
    config._attn_implementation = "eager"
    network: Any = getattr(transformers, f"{prefix}Model")(config)
    for parameter in network.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.2)
    network.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    if kind == "siglip2":
        file = out / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "GemmaTokenizer"}))
    settings = _CROP if kind == "clip" else _SQUARE
    getattr(transformers, f"{prefix}ImageProcessorPil")(**settings).save_pretrained(out)
    suffix = "ModelWithProjection" if kind == "clip" else "Model"
    for tower, taken in (("Vision", torch.zeros(2, 3, 64, 64)), ("Text", torch.ones(2, most, dtype=torch.int64))):
        part: Any = getattr(transformers, f"{prefix}{tower}{suffix}").from_pretrained(out).eval()
        _export(part, taken, out / "onnx" / f"{tower.lower()}_model.onnx", tracing=True)


def reference_texts(kind: str, folder: Path, texts: Sequence[str]) -> NDArray[np.float32]:
    """What transformers' own tokenizer and network give for texts, (n, D) float32."""
    prefix, most = TEXT_MODELS[kind]
    network: Any = getattr(transformers, f"{prefix}Model").from_pretrained(folder).eval()
    file = str(folder / "tokenizer.json")
    tokenizer: Any = transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_file=file, pad_token={"siglip": "</s>", "siglip2": "<pad>"}.get(kind, "<|endoftext|>")
    )
    if kind == "siglip2":  # as transformers' Siglip2Tokenizer does
        texts = [text.lower() for text in texts]
    padding = True if kind == "clip" else "max_length"  # as their processors do it
    encoded = tokenizer(list(texts), padding=padding, truncation=True, max_length=most, return_tensors="pt")
    if kind != "clip":
        encoded = {"input_ids": encoded["input_ids"]}
    with torch.no_grad():
        found = network.get_text_features(**encoded)
    return np.asarray(getattr(found, "pooler_output", found).numpy(), np.float32)


def _clip_tokenizer() -> Any:
    """CLIP's, with the letters and a few merges for a vocabulary."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())  # type: ignore[no-untyped-call]
    merges = [("r", "e"), ("re", "d</w>"), ("d", "o"), ("do", "g"), ("dog", "s</w>"), ("d", "re"), ("dre", "s")]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocabulary = {token: number for number, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)  # type: ignore[arg-type]


def _siglip_tokenizer(most: int, *, second: bool) -> Any:
    """Of SigLIP's kind: pieces of lower-case text without punctuation, and an end that also fills up.

    The second one has a token of its own to fill up with, and leaves lower case to others.
    """
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers.models import Unigram

    pieces = ["▁", *"aredsognw", "▁a", "▁red"]
    special = ["<pad>", "</s>", "<unk>"] if second else ["</s>", "<unk>"]
    scored = [*((token, 0.0) for token in special), *((piece, -float(len(piece))) for piece in pieces)]
    tokenizer = Tokenizer(Unigram(scored, unk_id=len(special) - 1))
    lower = [] if second else [normalizers.Lowercase()]
    tokenizer.normalizer = normalizers.Sequence(
        [*lower, normalizers.Replace(Regex("[[:punct:]]"), ""), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", special.index("</s>"))]
    )
    return transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token="</s>", pad_token=special[0], unk_token="<unk>", model_max_length=most
    )


class _Exported(nn.Module):
    def __init__(self, network: nn.Module, taken: str, names: Sequence[str]) -> None:
        super().__init__()
        self.network, self.taken, self.names = network, taken, names

    def forward(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self.network(**{self.taken: values})
        return tuple(outputs[name] for name in self.names)


def _export(network: nn.Module, values: torch.Tensor, file: Path, *, tracing: bool) -> None:
    """Of images (float) or of texts (int64), to an ONNX file."""
    taken = "pixel_values" if values.is_floating_point() else "input_ids"
    with torch.no_grad():
        outputs = network(**{taken: values})
    names = [name for name in _OUTPUTS if outputs.get(name) is not None]
    file.parent.mkdir(exist_ok=True)
    known: dict[str, Any] = {"input_names": [taken], "output_names": names, "verbose": False}
    if tracing:
        # Optimum's names for what is free.
        images, texts = ("batch_size", "num_channels", "height", "width"), ("batch_size", "sequence_length")
        free = images if values.is_floating_point() else texts
        known["dynamic_axes"] = {taken: dict(enumerate(free)), **{name: {0: "batch_size"} for name in names}}
    else:
        known |= {"external_data": False, "dynamic_shapes": {"values": {0: torch.export.Dim("batch_size")}}}
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(_Exported(network, taken, names), (values,), str(file), dynamo=not tracing, **known)
    finally:
        logging.disable(logging.NOTSET)
