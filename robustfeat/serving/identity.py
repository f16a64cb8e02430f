"""Which model made some features: what a head asks before it answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from robustfeat.errors import InputError
from robustfeat.hub.folder import WEIGHTS
from robustfeat.serving.extractor import FeatureExtractor

__all__ = ["ModelIdentity"]

_SAME = ("name", "weights_sha256", "preprocessing_hash", "feature_size")


@dataclass(frozen=True)
class ModelIdentity:
    """A model, its preprocessing, and how it was run.

    The commit on the Hub is recorded and not compared, for it changes with the card, too: the weights' hash tells
    models apart. Precision, engine and decoding are not compared either: features of another precision are almost the
    same (docs/embedding.md gives the cost), those of another model are not.

    Attributes:
        name, revision: of the model; a revision that is not known is None.
        weights_sha256: of its model.safetensors.
        preprocessing_hash: of its preprocessing contract.
        feature_size: D.
        precision, engine, decoding: as `FeatureExtractor` has them.
    """

    name: str
    revision: str | None
    weights_sha256: str
    preprocessing_hash: str
    feature_size: int
    precision: str
    engine: str
    decoding: str

    @classmethod
    def of_extractor(cls, extractor: FeatureExtractor) -> ModelIdentity:
        """That of the features that `extractor` makes."""
        config = extractor.config
        return cls(
            name=config.name,
            revision=extractor.folder.revision,
            weights_sha256=config.files.get(WEIGHTS, ""),
            preprocessing_hash=config.preprocessing.hash,
            feature_size=extractor.feature_size,
            precision=extractor.precision,
            engine=extractor.engine.name,
            decoding=extractor.decoding,
        )

    @classmethod
    def of_meta(cls, meta: Mapping[str, Any]) -> ModelIdentity:
        """That in a NAME.meta.json of `embed`.

        Raises:
            KeyError, TypeError: something is missing there.
        """
        return cls(
            name=str(meta["model"]),
            revision=meta["revision"],
            weights_sha256=str(meta["files"].get(WEIGHTS, "")),
            preprocessing_hash=str(meta["preprocessing_hash"]),
            feature_size=int(meta["feature_size"]),
            precision=str(meta["precision"]),
            engine=str(meta["engine"]),
            decoding=str(meta["decoding"]),
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelIdentity:
        """The inverse of `to_dict`.

        Raises:
            KeyError, TypeError: something is missing, or is of another type.
        """
        values = {field.name: data[field.name] for field in dataclasses.fields(cls)}
        for name, value in values.items():
            kinds = {"feature_size": (int,), "revision": (str, type(None))}
            if not isinstance(value, kinds.get(name, (str,))):
                raise TypeError(f"{name} is {value!r}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    def require(self, other: ModelIdentity, mine: str, theirs: str) -> None:
        """Refuses features of another model or preprocessing; `mine` and `theirs` are named in the error.

        Raises:
            InputError: saying both.
        """
        for key in _SAME:
            a, b = getattr(self, key), getattr(other, key)
            if a == b:
                continue
            what = key.replace("_", " ")
            if key == "name":
                said = f"features of {_brief(a)}, {theirs} of {_brief(b)}"
            else:
                said = f"features of {self.name} with {what} {_brief(a)}, {theirs} with {_brief(b)}"
            raise InputError(f"{mine}: needs {said}; use the same model for both")


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) < 64 else f"{text[:12]}..."
