"""Reads and writes config.json: timm's keys, which other libraries read, and a `robustfeat` block."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from robustfeat.errors import ModelFolderError
from robustfeat.hub.outputs import Outputs
from robustfeat.hub.preprocessing import Preprocessing

__all__ = ["FORMAT_VERSION", "Evaluation", "ModelConfig"]

FORMAT_VERSION = 1
"""Version of the folder format. Other versions are refused."""

_KEYS = {"architecture", "num_classes", "num_features", "dtype", "pretrained_cfg", "model_args", "robustfeat"}
_LIBRARIES = {"onnx", "robustfeat", "torchvision", "transformers"}
CODE_ENTRIES = {"auto_map", "custom_pipelines", "custom_generate"}
"""Keys by which other libraries find code in a repository and run it."""


@dataclass(frozen=True)
class Evaluation:
    """One measured number, as the Hub lists it for a model.

    Attributes:
        dataset: readable name of the dataset.
        dataset_id: name of the dataset on the Hub, or a short name if it is not there.
        split: the split of the dataset.
        metric: the metric, such as accuracy.
        value: the number, in the metric's unit; accuracies in %.
        protocol: how the features became predictions, in a few words.
    """

    dataset: str
    dataset_id: str
    metric: str
    value: float
    split: str = "test"
    protocol: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)) or not math.isfinite(self.value):
            raise ValueError(f"an evaluation's value must be a number; got {self.value!r}")
        for entry in fields(self):
            if entry.name != "value" and not isinstance(getattr(self, entry.name), str):
                raise ValueError(f"an evaluation's {entry.name} must be text; got {getattr(self, entry.name)!r}")

    def __str__(self) -> str:
        return f"{self.dataset} {self.metric} {self.value:g}"


@dataclass(frozen=True)
class ModelConfig:
    """A model's identity and contract.

    Attributes:
        name: name with version, such as `robustfeat-lite0-v1`. A changed model gets a new name.
        architecture: timm's name of the network; `torchvision:NAME` or `robustfeat:NAME` if timm lacks it;
            `transformers:CLASS`; or `onnx:NAME` for a network that exists only as an ONNX file.
        feature_size: D, the length of a feature vector; 0 if only the network itself defines it.
        num_classes: outputs of the last layer in model.safetensors, its classifier or its projection; 0 for none.
        preprocessing: the contract between image files and the network's input.
        first_conv, classifier: names of the first and the last layer, for libraries that adapt them.
        fixed_input_size: whether timm builds the network for one input size.
        transformers: the transformers config of such a network; empty for others.
        pooling: how the outputs of a transformers network became features: a key of `hub.outputs.POOLED`.
        concepts: names of the K concepts in training; empty for imported models.
        recipe: summary of the training recipe, which `training.json` has in full; empty for imported models.
        int8: facts about the int8 file: int8 layers (`layers`, `of`), their share of the `multiply_adds`, and the
            weights `kept` in floating point; empty without such a file, and in older folders.
        provenance: `source`, `data`, `terms` and `versions`; also `license` and `datasets` by their Hub names, if
            known.
        results: measured results by title: text, or a table as a list of rows.
        evaluations: measured numbers, as the Hub lists them.
        files: sha256 of every file except the card and config.json, by path within the folder.
        card_sha256: sha256 of the card as written, to detect later edits. It is not verified.
        components_of: length of the network's own features where the model gives their principal components, which
            the last layer in model.safetensors computes; 0 otherwise.
        outputs: outputs of a transformers network, from which features are made. None for robustfeat's own networks,
            which output `features`.
    """

    name: str
    architecture: str
    feature_size: int
    num_classes: int
    preprocessing: Preprocessing
    first_conv: str = "conv1"
    classifier: str = "fc"
    fixed_input_size: bool = False
    transformers: Mapping[str, Any] = field(default_factory=dict)
    pooling: str = ""
    concepts: tuple[str, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    int8: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    evaluations: tuple[Evaluation, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    card_sha256: str = ""
    components_of: int = 0
    outputs: Outputs | None = None

    @property
    def library(self) -> str:
        """The library that builds the network: timm, torchvision, transformers, robustfeat, or onnx (engines only)."""
        prefix, colon, _ = self.architecture.partition(":")
        return prefix if colon and prefix in _LIBRARIES else "timm"

    @property
    def feature_outputs(self) -> int:
        """Timm's `num_classes` for a network that gives the features: 0, or the outputs of the projection."""
        return self.num_classes if self.components_of else 0

    @property
    def int8_share(self) -> str:
        """The int8 share of the int8 file as text; empty if unknown."""
        if not self.int8:
            return ""
        share = 100 * self.int8["multiply_adds"]
        return f"{self.int8['layers']} of {self.int8['of']} layers, {share:.1f} % of the multiply-adds"

    def replace(self, **changes: Any) -> ModelConfig:
        """Copies the config with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json."""
        contract = self.preprocessing
        side = contract.image_size
        return {
            **self.transformers,
            "architecture": self.architecture,
            "num_classes": self.num_classes,
            "num_features": self.components_of or self.feature_size,
            # without this entry, transformers would run fp16 weights in fp16
            "dtype": "float32",
            "pretrained_cfg": {
                "num_classes": self.num_classes,
                "input_size": [3, side, side],
                **({"fixed_input_size": True} if self.fixed_input_size else {}),
                "interpolation": contract.interpolation,
                "crop_pct": contract.crop_pct,
                "crop_mode": contract.crop_mode,
                "mean": list(contract.mean),
                "std": list(contract.std),
                "first_conv": self.first_conv,
                "classifier": self.classifier,
            },
            # transformers does not read timm's settings
            **({"model_args": {"img_size": [side, side]}} if self.fixed_input_size else {}),
            "robustfeat": {
                "format_version": FORMAT_VERSION,
                "name": self.name,
                "feature_size": self.feature_size,
                "preprocessing": contract.to_dict(),
                "preprocessing_hash": contract.hash,
                **({"pooling": self.pooling} if self.pooling else {}),
                **({"components_of": self.components_of} if self.components_of else {}),
                "concepts": list(self.concepts),
                "recipe": dict(self.recipe),
                **({"int8": dict(self.int8)} if self.int8 else {}),
                "provenance": dict(self.provenance),
                "results": dict(self.results),
                "evaluations": [asdict(evaluation) for evaluation in self.evaluations],
                "files": dict(self.files),
                "card_sha256": self.card_sha256,
            },
        }

    @classmethod
    def from_dict(cls, data: Any, source: str) -> ModelConfig:
        """Reverses `to_dict`; `source` names the file in messages.

        Raises:
            ModelFolderError: the config is not robustfeat's, has another format version, or contradicts itself.
        """
        block = data.get("robustfeat") if isinstance(data, dict) else None
        if not isinstance(block, dict):
            raise ModelFolderError(
                f"{source}: has no robustfeat block; expected a folder made by robustfeat export or robustfeat import, "
                "or a transformers model with ONNX files (model_type)"
            )
        version = block.get("format_version")
        if version != FORMAT_VERSION:
            newer = isinstance(version, int) and version > FORMAT_VERSION
            remedy = "upgrade robustfeat" if newer else "export the model again"
            raise ModelFolderError(f"{source}: format_version must be {FORMAT_VERSION}; got {version!r}", fix=remedy)
        own = _KEYS if "model_type" not in data else set(data) - CODE_ENTRIES  # transformers adds its own entries
        if unknown := sorted(set(data) - own):
            what = "names code to run" if unknown[0] in CODE_ENTRIES else "is unknown"
            raise ModelFolderError(
                f"{source}: the entry {unknown[0]!r} {what}", fix="do not use this model, or remove the entry"
            )
        try:
            timm_block = data["pretrained_cfg"]
            config = cls(
                name=str(block["name"]),
                architecture=str(data["architecture"]),
                feature_size=int(block["feature_size"]),
                num_classes=int(data["num_classes"]),
                preprocessing=Preprocessing.from_dict(block["preprocessing"]),
                first_conv=timm_block["first_conv"],
                classifier=timm_block["classifier"],
                fixed_input_size=timm_block.get("fixed_input_size") is True,
                transformers={key: value for key, value in data.items() if key not in _KEYS},
                pooling=str(block.get("pooling", "")),
                components_of=int(block.get("components_of", 0)),
                concepts=tuple(block["concepts"]),
                recipe=dict(block["recipe"]),
                int8=_int8(block.get("int8", {})),
                provenance=dict(block["provenance"]),
                results=_results(block["results"]),
                evaluations=tuple(Evaluation(**entry) for entry in block.get("evaluations", ())),
                card_sha256=str(block.get("card_sha256", "")),
                files={str(path): str(digest) for path, digest in block["files"].items()},
            )
        except KeyError as exc:
            raise ModelFolderError(f"{source}: the key {exc} is missing", fix="export the model again") from exc
        except (TypeError, ValueError, AttributeError, OverflowError) as exc:
            raise ModelFolderError(f"{source}: {exc}", fix="export the model again") from exc
        if config.components_of and config.num_classes != config.feature_size:
            raise ModelFolderError(
                f"{source}: num_classes must be feature_size, {config.feature_size}, where components_of is set; "
                f"got {config.num_classes}",
                fix="export the model again",
            )
        if block.get("preprocessing_hash") != config.preprocessing.hash:
            raise ModelFolderError(
                f"{source}: preprocessing_hash must be {config.preprocessing.hash[:12]}... for these settings; "
                f"got {str(block.get('preprocessing_hash'))[:12]}...: the settings were edited",
                fix="export the model again",
            )
        expected = config.to_dict()
        if timm_block != expected["pretrained_cfg"] or data.get("model_args") != expected.get("model_args"):
            raise ModelFolderError(
                f"{source}: pretrained_cfg and robustfeat.preprocessing disagree: other libraries would give other "
                "features",
                fix="export the model again",
            )
        return config


def _int8(data: Any) -> dict[str, Any]:
    if not data:
        return {}
    layers, of, share = int(data["layers"]), int(data["of"]), float(data["multiply_adds"])
    if not (0 < layers <= of and 0 <= share <= 1):
        raise ValueError(f"int8 must name some of its layers and a share; got {layers} of {of}, and {share:g}")
    return {"layers": layers, "of": of, "multiply_adds": share, "kept": [str(name) for name in data["kept"]]}


def _results(data: Any) -> dict[str, Any]:
    results = dict(data)
    for title, content in results.items():
        if isinstance(content, list) and not all(isinstance(row, dict) for row in content):
            raise ValueError(f"results: {title} must be text or a list of objects")
    return results
