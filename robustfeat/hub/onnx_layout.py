"""Models in the layout that Optimum and transformers.js write, on the Hub and in folders.

    config.json  preprocessor_config.json  onnx/model.onnx  onnx/model_fp16.onnx  onnx/model_quantized.onnx  ...

Optimum itself leaves out `onnx/`. Networks for text and images have `vision_model` in place of `model`. Weights may lie
beside an ONNX file in `NAME.onnx_data`. Of all files of a repository, these alone are used. For texts there are also
`onnx/text_model.onnx` and `tokenizer.json`, which are no part of what tells models apart.
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
"""Where the image processor is described; the second one, of transformers 5, describes those of texts, too."""

TOKENIZER = "tokenizer.json"
TOKENIZER_SETTINGS = "tokenizer_config.json"
"""By which a text tower's texts become numbers."""

_STEMS = ("vision_model", "model")
_TEXT_STEMS = ("text_model",)
_FOLDERS = ("onnx/", "")
_SUFFIXES = {"fp32": ("",), "fp16": ("_fp16",), "int8": ("_int8", "_quantized", "_uint8")}
"""By precision. The first file that is there is taken."""


def is_onnx_layout(config: Any) -> bool:
    """Whether a config.json is of transformers rather than ours."""
    return isinstance(config, dict) and "robustfeat" not in config and isinstance(config.get("model_type"), str)


def find_network(names: Iterable[str], precision: str, stems: Sequence[str] = _STEMS) -> str | None:
    """The ONNX file of that precision among the files of a folder, by the stem of its name: for images by default."""
    present = frozenset(names)
    for stem in stems:
        for folder in _FOLDERS:
            found = {key: _first(present, folder + stem, suffixes) for key, suffixes in _SUFFIXES.items()}
            if any(found.values()):
                return found.get(precision)
    return None


def find_text_network(names: Iterable[str], precision: str) -> str | None:
    """The ONNX file of the text tower, in another precision where that one is missing."""
    present = list(names)
    found = (find_network(present, key, _TEXT_STEMS) for key in (precision, *_SUFFIXES))
    return next((name for name in found if name), None)


def external_names(names: Iterable[str], network: str) -> list[str]:
    """The files in which an ONNX file may keep its weights."""
    pattern = re.compile(re.escape(network) + r"(_data|\.data)(_\d+)?")
    return sorted(name for name in names if pattern.fullmatch(name))


def used_names(names: Iterable[str]) -> list[str]:
    """The files that are used of a folder beside config.json: how images are prepared, and the networks' files."""
    present = sorted(names)
    processor = [name for name in PROCESSORS if name in present][:1]
    networks = [network for key in _SUFFIXES if (network := find_network(present, key))]
    return processor + [name for network in networks for name in (network, *external_names(present, network))]


def is_complete(names: Iterable[str]) -> bool:
    """Whether a network and the way to prepare its images are among the files of a folder."""
    present = frozenset(names)
    return any(find_network(present, key) for key in _SUFFIXES) and not present.isdisjoint(PROCESSORS)


def read_onnx_layout(
    config: Mapping[str, Any], processor: Mapping[str, Any], files: Mapping[str, str], weights: str, place: str
) -> ModelConfig:
    """What a model in this layout is, as one of ours says it.

    Args:
        config: the content of config.json.
        processor: that of the file in `PROCESSORS`, by which images are prepared.
        files: sha256 of the files that are used.
        weights: the hash that stands for its weights.
        place: names the folder or the repository in messages.

    Raises:
        ModelFolderError: it has no image processor, or one that a preprocessing contract cannot say.
    """
    kind = str(config["model_type"])
    file = next(name for name in PROCESSORS if name in files)
    own = processor.get("image_processor")
    contract = read_image_processor(own if isinstance(own, Mapping) else processor, config, f"{place}: {file}")
    source = config.get("_name_or_path")
    label = re.sub(r"[^\w.-]+", "-", str(source).rstrip("/").rpartition("/")[2]) if source else ""
    return ModelConfig(
        # From the content alone, so that a copy is the same model.
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
    """Refuses a model of transformers without an ONNX file or an image processor, and says what it holds.

    Args:
        config: the content of config.json.
        names: of its files.
        place: names the folder or the repository in messages.
        importable: what `robustfeat import` calls it.

    Raises:
        ModelFolderError: there is no network for images that an engine can run.
    """
    present, kind = list(names), config["model_type"]
    if not any(find_network(present, precision) for precision in _SUFFIXES):
        weights = sorted(name for name in present if re.search(r"\.(safetensors|bin|h5|msgpack)$", name))
        onnx = sorted(name for name in present if name.endswith(".onnx"))
        others = f"; it holds {', '.join((onnx or weights)[:3])}" if onnx or weights else ""
        raise ModelFolderError(
            f"{place}: holds no ONNX file of the whole network (model type {kind!r}){others}",
            fix=f"make a model folder of it with robustfeat import {importable}",
        )
    if not any(name in present for name in PROCESSORS):
        raise ModelFolderError(
            f"{place}: holds no {PROCESSORS[0]}, so it takes no images, or is incomplete (model type {kind!r})",
            fix="use a model for images",
        )


def _first(present: frozenset[str], stem: str, suffixes: tuple[str, ...]) -> str | None:
    return next((name for suffix in suffixes if (name := f"{stem}{suffix}.onnx") in present), None)


def _size(config: Mapping[str, Any]) -> int:
    """The length of a vector where config.json tells it, or 0: the network itself decides."""
    vision = config.get("vision_config")
    own = vision if isinstance(vision, Mapping) else config
    for value in (config.get("projection_dim"), own.get("hidden_size"), own.get("hidden_sizes"), own.get("hidden_dim")):
        last = value[-1] if isinstance(value, list) and value else value
        if type(last) is int and last > 0:
            return last
    return 0
