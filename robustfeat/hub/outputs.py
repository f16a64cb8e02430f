"""What the outputs of a network of transformers mean, by its model type.

Exports give some of `image_embeds` (N, D), `pooler_output` (N, D) or (N, D, 1, 1) and `last_hidden_state`, which holds
tokens (N, T, D) or a map (N, D, H, W). Where tokens of another kind stand before those of the patches, a mean over the
patches leaves them out.
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
"""Ways to one vector per image, and the output that each takes."""

_PREFERRED = {
    ("embeds", "pooler", "cls"): "clip clip_vision_model metaclip_2 chinese_clip chinese_clip_vision_model",
    ("cls", "pooler"): "dinov2 dinov2_with_registers dinov3_convnext dinov3_vit",
    ("cls",): "deit vit vit_msn",
    ("pooler", "mean"): "beit data2vec-vision siglip siglip_vision_model swin swinv2",
    ("mean",): "ijepa",
}
"""By model type; others have `_OTHERS`, and the mean where the output is a map."""

_OTHERS = ("embeds", "pooler")

_PREFIX = {
    0: "ijepa levit siglip siglip_vision_model swin swinv2",
    1: "beit chinese_clip chinese_clip_vision_model clip clip_vision_model data2vec-vision dinov2 "
    "dinov2_with_registers dinov3_convnext dinov3_vit metaclip_2 vit vit_msn",
    2: "deit",
}
"""Tokens before those of the patches: the class token, and DeiT's for distillation. Registers come on top."""


_TEXTS = {"embeds": "clip metaclip_2 chinese_clip", "pooler": "siglip siglip2"}
"""By the way of `POOLED` that gives features of images in the same space: model types with a text tower."""

_TEXT_TOKENS = {"siglip": 64, "siglip2": 64, "chinese_clip": 512}
_CLIP_TOKENS = 77
"""Where config.json leaves it to the default of the class."""

_MOST_TEXT_TOKENS = 2**16


@dataclass(frozen=True)
class TextTower:
    """How texts become vectors in the space of a model's features.

    Attributes:
        pooling: the way of `POOLED` that gives features of images in this space.
        output: of the text network, (N, D).
        most_tokens: longer texts are cut.
        pad_token: shorter ones are filled up with it, where the network was trained so (it then attends to all);
            None where they are not.
    """

    pooling: str
    output: str
    most_tokens: int
    pad_token: int | None


@dataclass(frozen=True)
class Outputs:
    """How the outputs of a network become one vector per image.

    Attributes:
        model_type: as config.json names it.
        preferred: ways of `POOLED`; the first whose output is there is the default.
        prefix: tokens before those of the patches; None where it is unknown. The first of them is the class token.
        text: the text tower of such models; None where they have none.
    """

    model_type: str
    preferred: tuple[str, ...] = _OTHERS
    prefix: int | None = None
    text: TextTower | None = None


def read_outputs(config: Mapping[str, Any]) -> Outputs:
    """The outputs of the model type in config.json, with the registers that it counts."""
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
