"""The meaning of a transformers network's outputs, by model type.

Exports have some of `image_embeds` (N, D), `pooler_output` (N, D) or (N, D, 1, 1) and `last_hidden_state`, which is
tokens (N, T, D) or a map (N, D, H, W). A mean over the patches skips other tokens in front of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["POOLED", "Outputs", "TextTower", "read_outputs"]

POOLED = {
    "embeds": "image_embeds",
    "pooler": "pooler_output",
    "cls": "last_hidden_state",
    "mean": "last_hidden_state",
}
"""Ways to get one vector per image, and the output that each uses."""

_PREFERRED = {
    ("embeds", "pooler", "cls"): "clip clip_vision_model metaclip_2 chinese_clip chinese_clip_vision_model",
    ("cls", "pooler"): "dinov2 dinov2_with_registers dinov3_convnext dinov3_vit",
    ("cls",): "deit vit vit_msn",
    ("pooler", "mean"): "beit data2vec-vision siglip siglip_vision_model swin swinv2",
    ("mean",): "ijepa",
}
"""Preferred ways by model type. Other types have `_OTHERS`, and the mean if the output is a map."""

_OTHERS = ("embeds", "pooler")

_PREFIX = {
    0: "ijepa levit siglip siglip_vision_model swin swinv2",
    1: "beit chinese_clip chinese_clip_vision_model clip clip_vision_model data2vec-vision dinov2 "
    "dinov2_with_registers dinov3_convnext dinov3_vit metaclip_2 vit vit_msn",
    2: "deit",
}
"""Tokens before the patches: the class token, and DeiT's distillation token. Registers are added to these."""


_TEXTS = {"embeds": "clip metaclip_2 chinese_clip", "pooler": "siglip siglip2"}
"""Model types with a text tower, by the way of `POOLED` whose image features share its space."""

_TEXT_TOKENS = {"siglip": 64, "siglip2": 64, "chinese_clip": 512}
_CLIP_TOKENS = 77
"""Default of the class, in case config.json has no value."""

_MOST_TEXT_TOKENS = 2**16


@dataclass(frozen=True)
class TextTower:
    """How to embed texts in the space of a model's features.

    Attributes:
        pooling: the way of `POOLED` whose image features are in this space.
        output: the output of the text network, (N, D).
        most_tokens: the length to which longer texts are cut.
        pad_token: the token that pads shorter texts, if the network was trained to attend to padding; else None.
    """

    pooling: str
    output: str
    most_tokens: int
    pad_token: int | None


@dataclass(frozen=True)
class Outputs:
    """How the outputs of a network become one vector per image.

    Attributes:
        model_type: the model type in config.json.
        preferred: ways of `POOLED`. The first one whose output exists is the default.
        prefix: number of tokens before the patches, of which the first is the class token; None if unknown.
        text: the text tower; None for models without one.
    """

    model_type: str
    preferred: tuple[str, ...] = _OTHERS
    prefix: int | None = None
    text: TextTower | None = None


def read_outputs(config: Mapping[str, Any]) -> Outputs:
    """The outputs of the model type in config.json, including its registers."""
    kind = str(config.get("model_type"))
    preferred = next((ways for ways, types in _PREFERRED.items() if kind in types.split()), _OTHERS)
    prefix = next((count for count, types in _PREFIX.items() if kind in types.split()), None)
    registers = config.get("num_register_tokens")
    if prefix is not None and kind != "dinov3_convnext" and type(registers) is int and registers > 0:
        prefix += registers
    return Outputs(kind, preferred, prefix, _text_tower(kind, config.get("text_config")))


def _text_tower(kind: str, config: Any) -> TextTower | None:
    pooling = next((way for way, types in _TEXTS.items() if kind in types.split()), None)
    if pooling is None:
        return None
    own = config if isinstance(config, Mapping) else {}
    most, pad = own.get("max_position_embeddings"), own.get("pad_token_id")
    if not (type(most) is int and 0 < most <= _MOST_TEXT_TOKENS):
        most = _TEXT_TOKENS.get(kind, _CLIP_TOKENS)
    if pooling == "embeds":
        return TextTower(pooling, "text_embeds", most, None)
    return TextTower(pooling, "pooler_output", most, pad if type(pad) is int else 1)
