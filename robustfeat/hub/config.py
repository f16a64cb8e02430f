"""What config.json says about a model: timm's keys, so that other libraries load it, and a `robustfeat` block."""

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
"""Folders of a newer version are refused; older ones are read as long as this number has not changed."""

_KEYS = {"architecture", "num_classes", "num_features", "dtype", "pretrained_cfg", "model_args", "robustfeat"}
_LIBRARIES = {"onnx", "robustfeat", "torchvision", "transformers"}
CODE_ENTRIES = {"auto_map", "custom_pipelines", "custom_generate"}
"""By which other libraries find code in a repository, to run it."""


@dataclass(frozen=True)
class Evaluation:
    """One measured number, as the Hub lists it beside a model.

    Attributes:
        dataset: its name, for people.
        dataset_id: its name on the Hub, or a short one where it is not there.
        split: what was measured on.
        metric: such as accuracy.
        value: in the metric's unit; accuracies in %.
        protocol: how the features became answers, in a few words.
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
        name: with its version, such as `robustfeat-resnet18-tiny-v1`; a changed model gets a new name.
        architecture: timm's name of the network; `torchvision:NAME` or `robustfeat:NAME` of one that timm lacks;
            `transformers:CLASS`; or `onnx:NAME` where the ONNX file is all that there is of it.
        feature_size: D, the length of a feature vector; 0 where only the network itself tells.
        num_classes: outputs of the classifier in model.safetensors; 0 for none.
        preprocessing: the contract between image files and the network's input.
        first_conv, classifier: names of the first and the last layer, for libraries that adapt them.
        fixed_input_size: whether timm makes the network for the size of its input.
        transformers: what config.json says of a network of transformers, in its own words; empty for others.
        pooling: how the outputs of such a network became the features: a way of `hub.outputs.POOLED`.
        concepts: names of the K concepts that training knew; empty for imported models.
        recipe: how it was trained, as `training.json` says in full; empty for imported models.
        int8: of the int8 file, how many layers it computes in int8 (`layers`, `of`), their share of the
            `multiply_adds`, and the weights of those `kept` in floating point; empty without it, and in older folders.
        provenance: where it comes from and under which terms: `source`, `data`, `terms`, `versions`;
            `license` and `datasets`, where they are known, as the Hub names them.
        results: measured results, by title: text, or a table as a list of rows.
        evaluations: measured numbers, as the Hub lists them.
        files: sha256 of every file but the card and config.json itself, by path within the folder.
        card_sha256: that of the card as it was written, which tells whether it was edited since; not verified.
        outputs: of a network of transformers, whose features are one of its outputs or made from it. None for our
            own, which give `features`.
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
    outputs: Outputs | None = None

    @property
    def library(self) -> str:
        """What builds the network: timm, torchvision, transformers or robustfeat, or onnx where only engines run it."""
        prefix, colon, _ = self.architecture.partition(":")
        return prefix if colon and prefix in _LIBRARIES else "timm"

    @property
    def int8_share(self) -> str:
        """How much of the int8 file is int8, in words; empty where that is not known."""
        if not self.int8:
            return ""
        share = 100 * self.int8["multiply_adds"]
        return f"{self.int8['layers']} of {self.int8['of']} layers, {share:.1f} % of the multiply-adds"

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json."""
        contract = self.preprocessing
        side = contract.image_size
        return {
            **self.transformers,
            "architecture": self.architecture,
            "num_classes": self.num_classes,
            "num_features": self.feature_size,
            # transformers would run fp16 weights in fp16 without this
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
            # for transformers, which does not ask timm's settings
            **({"model_args": {"img_size": [side, side]}} if self.fixed_input_size else {}),
            "robustfeat": {
                "format_version": FORMAT_VERSION,
                "name": self.name,
                "feature_size": self.feature_size,
                "preprocessing": contract.to_dict(),
                "preprocessing_hash": contract.hash,
                **({"pooling": self.pooling} if self.pooling else {}),
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
        """The inverse of `to_dict`; `source` names the file in messages.

        Raises:
            ModelFolderError: it is not a config of ours, is of a newer format, or contradicts itself.
        """
        block = data.get("robustfeat") if isinstance(data, dict) else None
        if not isinstance(block, dict):
            raise ModelFolderError(
                f"{source}: has no robustfeat block; expected a folder made by robustfeat export or robustfeat import, "
                "or a model of transformers with ONNX files (model_type)"
            )
        version = block.get("format_version")
        if version != FORMAT_VERSION:
            newer = isinstance(version, int) and version > FORMAT_VERSION
            remedy = "upgrade robustfeat" if newer else "export the model again"
            raise ModelFolderError(f"{source}: format_version must be {FORMAT_VERSION}; got {version!r}", fix=remedy)
        own = _KEYS if "model_type" not in data else set(data) - CODE_ENTRIES  # with the entries of transformers
        if unknown := sorted(set(data) - own):
            what = "names code to run" if unknown[0] in CODE_ENTRIES else "no model of ours has"
            raise ModelFolderError(
                f"{source}: the entry {unknown[0]!r} {what}", fix="do not use this model, or remove it"
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
