"""Reads models in the layout of Optimum and transformers.js, on the Hub and in folders.

    config.json  preprocessor_config.json  onnx/model.onnx  onnx/model_fp16.onnx  onnx/model_quantized.onnx  ...

Optimum itself omits `onnx/`. Networks for text and images have `vision_model` in place of `model`. An ONNX file may
have external weights in `NAME.onnx_data`. robustfeat uses only these files of a repository. Text search also uses
`onnx/text_model.onnx` and `tokenizer.json`, which are not part of the model's identity.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from robustfeat.errors import ModelFolderError
from robustfeat.hub.config import ModelConfig
from robustfeat.hub.image_processor import read_image_processor
from robustfeat.hub.outputs import read_outputs

__all__ = [
    "PROCESSORS",
    "TOKENIZER",
    "TOKENIZER_SETTINGS",
    "external_names",
    "find_network",
    "find_text_network",
    "is_complete",
    "is_onnx_layout",
    "read_onnx_layout",
    "refuse_without_network",
    "used_names",
]

PROCESSORS = ("preprocessor_config.json", "processor_config.json")
"""Files that describe the image processor. The second one, from transformers 5, also describes text."""

TOKENIZER = "tokenizer.json"
TOKENIZER_SETTINGS = "tokenizer_config.json"
"""File of the text tower's tokenizer."""

_STEMS = ("vision_model", "model")
_TEXT_STEMS = ("text_model",)
_FOLDERS = ("onnx/", "")
_SUFFIXES = {"fp32": ("",), "fp16": ("_fp16",), "int8": ("_int8", "_quantized", "_uint8")}
"""File names by precision. The first existing file counts."""


def is_onnx_layout(config: Any) -> bool:
    """Whether a config.json belongs to transformers rather than robustfeat."""
    return isinstance(config, dict) and "robustfeat" not in config and isinstance(config.get("model_type"), str)


def find_network(names: Iterable[str], precision: str, stems: Sequence[str] = _STEMS) -> str | None:
    """Finds the ONNX file of a precision in a folder's files by its stem, by default of the image network."""
    present = frozenset(names)
    for stem in stems:
        for folder in _FOLDERS:
            found = {key: _first(present, folder + stem, suffixes) for key, suffixes in _SUFFIXES.items()}
            if any(found.values()):
                return found.get(precision)
    return None


def find_text_network(names: Iterable[str], precision: str) -> str | None:
    """Finds the ONNX file of the text tower, in another precision if the given one is missing."""
    present = list(names)
    found = (find_network(present, key, _TEXT_STEMS) for key in (precision, *_SUFFIXES))
    return next((name for name in found if name), None)


def external_names(names: Iterable[str], network: str) -> list[str]:
    """Possible files of an ONNX file's external weights."""
    pattern = re.compile(re.escape(network) + r"(_data|\.data)(_\d+)?")
    return sorted(name for name in names if pattern.fullmatch(name))


def used_names(names: Iterable[str]) -> list[str]:
    """The files that robustfeat uses besides config.json: the image processor and the networks."""
    present = sorted(names)
    processor = [name for name in PROCESSORS if name in present][:1]
    networks = [network for key in _SUFFIXES if (network := find_network(present, key))]
    return processor + [name for network in networks for name in (network, *external_names(present, network))]


def is_complete(names: Iterable[str]) -> bool:
    """Whether a folder's files include a network and an image processor."""
    present = frozenset(names)
    return any(find_network(present, key) for key in _SUFFIXES) and not present.isdisjoint(PROCESSORS)


def read_onnx_layout(
    config: Mapping[str, Any], processor: Mapping[str, Any], files: Mapping[str, str], weights: str, place: str
) -> ModelConfig:
    """Describes a model in this layout by a `ModelConfig`.

    Args:
        config: the content of config.json.
        processor: the content of the image processor's file, one of `PROCESSORS`.
        files: sha256 of the used files.
        weights: the hash that identifies the weights.
        place: the folder's or repository's name in messages.

    Raises:
        ModelFolderError: the image processor is missing, or a preprocessing contract cannot express it.
    """
    kind = str(config["model_type"])
    file = next(name for name in PROCESSORS if name in files)
    own = processor.get("image_processor")
    contract = read_image_processor(own if isinstance(own, Mapping) else processor, config, f"{place}: {file}")
    source = config.get("_name_or_path")
    label = re.sub(r"[^\w.-]+", "-", str(source).rstrip("/").rpartition("/")[2]) if source else ""
    return ModelConfig(
        # The name depends only on the content, so a copy is the same model.
        name=f"{label or kind}-{weights[:8]}",
        architecture=kind,
        feature_size=_size(config),
        num_classes=0,
        preprocessing=contract,
        provenance={"source": str(source)} if source else {},
        files=files,
        outputs=read_outputs(config),
    )


def refuse_without_network(config: Mapping[str, Any], names: Iterable[str], place: str, importable: str) -> None:
    """Refuses a transformers model without an ONNX file or an image processor.

    Args:
        config: the content of config.json.
        names: the names of its files.
        place: the folder's or repository's name in messages.
        importable: the model's name for `robustfeat import`.

    Raises:
        ModelFolderError: no engine can run an image network of the model. The message lists its files.
    """
    present, kind = list(names), config["model_type"]
    if not any(find_network(present, precision) for precision in _SUFFIXES):
        weights = sorted(name for name in present if re.search(r"\.(safetensors|bin|h5|msgpack)$", name))
        onnx = sorted(name for name in present if name.endswith(".onnx"))
        others = f"; it has {', '.join((onnx or weights)[:3])}" if onnx or weights else ""
        raise ModelFolderError(
            f"{place}: has no ONNX file of the whole network (model type {kind!r}){others}",
            fix=f"make a model folder of it with robustfeat import {importable}",
        )
    if not any(name in present for name in PROCESSORS):
        raise ModelFolderError(
            f"{place}: has no {PROCESSORS[0]}, so it takes no images or is incomplete (model type {kind!r})",
            fix="use a model for images",
        )


def _first(present: frozenset[str], stem: str, suffixes: tuple[str, ...]) -> str | None:
    return next((name for suffix in suffixes if (name := f"{stem}{suffix}.onnx") in present), None)


def _size(config: Mapping[str, Any]) -> int:
    """The length of a feature vector from config.json; 0 if only the network itself defines it."""
    vision = config.get("vision_config")
    own = vision if isinstance(vision, Mapping) else config
    for value in (config.get("projection_dim"), own.get("hidden_size"), own.get("hidden_sizes"), own.get("hidden_dim")):
        last = value[-1] if isinstance(value, list) and value else value
        if type(last) is int and last > 0:
            return last
    return 0
