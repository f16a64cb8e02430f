"""What config.json says about a model: timm's keys, so that other libraries load it, and a `robustfeat` block."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from robustfeat.errors import ModelFolderError
from robustfeat.hub.preprocessing import Preprocessing

__all__ = ["FORMAT_VERSION", "ModelConfig"]

FORMAT_VERSION = 1
"""Folders of a newer version are refused; older ones are read as long as this number has not changed."""


@dataclass(frozen=True)
class ModelConfig:
    """A model's identity and contract.

    Attributes:
        name: with its version, such as `robustfeat-resnet18-tiny-v1`; a changed model gets a new name.
        architecture: timm's name of the network.
        feature_size: D, the length of a feature vector.
        num_classes: outputs of the classifier in model.safetensors; 0 for none.
        preprocessing: the contract between image files and the network's input.
        first_conv, classifier: names of the first and the last layer, for libraries that adapt them.
        concepts: names of the K concepts that training knew; empty for imported models.
        recipe: how it was trained, as `training.json` says in full; empty for imported models.
        provenance: where it comes from and under which terms: `source`, `data`, `terms`, `versions`.
        results: measured results, by name.
        files: sha256 of every file but the card and config.json itself, by path within the folder.
    """

    name: str
    architecture: str
    feature_size: int
    num_classes: int
    preprocessing: Preprocessing
    first_conv: str = "conv1"
    classifier: str = "fc"
    concepts: tuple[str, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json."""
        contract = self.preprocessing
        return {
            "architecture": self.architecture,
            "num_classes": self.num_classes,
            "num_features": self.feature_size,
            # transformers would run fp16 weights in fp16 without this
            "dtype": "float32",
            "pretrained_cfg": {
                "num_classes": self.num_classes,
                "input_size": [3, contract.image_size, contract.image_size],
                "interpolation": contract.interpolation,
                "crop_pct": contract.crop_pct,
                "crop_mode": "center",
                "mean": list(contract.mean),
                "std": list(contract.std),
                "first_conv": self.first_conv,
                "classifier": self.classifier,
            },
            "robustfeat": {
                "format_version": FORMAT_VERSION,
                "name": self.name,
                "feature_size": self.feature_size,
                "preprocessing": contract.to_dict(),
                "preprocessing_hash": contract.hash,
                "concepts": list(self.concepts),
                "recipe": dict(self.recipe),
                "provenance": dict(self.provenance),
                "results": dict(self.results),
                "files": dict(self.files),
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
                f"{source}: has no robustfeat block; expected a folder made by robustfeat export or robustfeat import"
            )
        version = block.get("format_version")
        if version != FORMAT_VERSION:
            newer = isinstance(version, int) and version > FORMAT_VERSION
            remedy = "upgrade robustfeat" if newer else "export the model again"
            raise ModelFolderError(f"{source}: format_version must be {FORMAT_VERSION}; got {version!r}: {remedy}")
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
                concepts=tuple(block["concepts"]),
                recipe=dict(block["recipe"]),
                provenance=dict(block["provenance"]),
                results=dict(block["results"]),
                files={str(path): str(digest) for path, digest in block["files"].items()},
            )
        except KeyError as exc:
            raise ModelFolderError(f"{source}: the key {exc} is missing; export the model again") from exc
        except (TypeError, ValueError, AttributeError, OverflowError) as exc:
            raise ModelFolderError(f"{source}: {exc}; export the model again") from exc
        if block.get("preprocessing_hash") != config.preprocessing.hash:
            raise ModelFolderError(
                f"{source}: preprocessing_hash must be {config.preprocessing.hash[:12]}... for these settings; "
                f"got {str(block.get('preprocessing_hash'))[:12]}...: the settings were edited; export the model again"
            )
        if timm_block != config.to_dict()["pretrained_cfg"]:
            raise ModelFolderError(
                f"{source}: pretrained_cfg and robustfeat.preprocessing disagree: other libraries would give other "
                "features; export the model again"
            )
        return config
