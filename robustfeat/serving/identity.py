"""Identifies the model that made features, and how it ran."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from robustfeat.errors import InputError
from robustfeat.hub.folder import weights_sha256

__all__ = ["BYTE_KEYS", "FEATURE_KEYS", "MODEL_KEYS", "ModelIdentity"]

MODEL_KEYS = ("name", "weights_sha256", "preprocessing_hash", "feature_size", "pooling", "skipped_tokens")
"""Keys that heads compare. Another precision changes features little (docs/embedding.md has figures); another model
changes them fully."""

FEATURE_KEYS = (
    "files", "preprocessing_hash", "precision", "engine", "device", "decoding", "feature_size", "pooling",
    "skipped_tokens"
)  # fmt: skip
"""Keys that `append` compares: all rows of a file come from the same model, run in the same way."""

BYTE_KEYS = ("name", *FEATURE_KEYS, "threads", "versions")
"""Keys that the machines of a Ray cluster compare: all that decides a row's bytes, except the batch size.

No list has the commit on the Hub, since it also changes with the card.
"""

_CACHE_KEYS = ("files", "preprocessing_hash", "precision", "engine", "engine_version", "decoding")
_HEAD_KEYS = (
    "name", "revision", "weights_sha256", "preprocessing_hash", "feature_size", "precision", "engine", "decoding"
)  # fmt: skip


@dataclass(frozen=True)
class ModelIdentity:
    """A model, its preprocessing, and how it ran.

    Attributes:
        name: name of the model.
        revision: its commit on the Hub, if known.
        weights_sha256: see `hub.folder.weights_sha256`.
        preprocessing_hash: hash of its preprocessing contract.
        feature_size: D, the length of a feature vector.
        precision, engine, decoding: see `RunOptions`, without auto.
        device, threads: where it ran; None in a head.
        files: sha256 of each file of the model; empty in a head.
        versions: versions of robustfeat, the engine and the decoding libraries; empty in a head.
        pooling: how the output of a transformers network became features (see `hub.outputs`); None for robustfeat's own
            networks.
        source: the argument that names the model: builtin, or ORG/NAME on the Hub; None for a folder. It is not
            compared.
        skipped_tokens: number of first tokens that the pooling `mean` skips. It comes from config.json, which is not in
            `files`. None for other poolings, and in files of earlier versions.
    """

    name: str
    revision: str | None
    weights_sha256: str
    preprocessing_hash: str
    feature_size: int
    precision: str
    engine: str
    decoding: str
    device: str | None = None
    threads: int | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    pooling: str | None = None
    source: str | None = field(default=None, compare=False)
    skipped_tokens: int | None = None

    @property
    def engine_version(self) -> str:
        """The version of the engine; empty in a head."""
        return self.versions.get(self.engine, "")

    @classmethod
    def of_meta(cls, meta: Mapping[str, Any]) -> ModelIdentity:
        """The identity in a NAME.meta.json of `embed`.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: a key is missing or has another type.
        """
        return cls(
            name=str(meta["model"]),
            revision=meta["revision"],
            weights_sha256=weights_sha256(meta["files"]),
            preprocessing_hash=str(meta["preprocessing_hash"]),
            feature_size=int(meta["feature_size"]),
            precision=str(meta["precision"]),
            engine=str(meta["engine"]),
            decoding=str(meta["decoding"]),
            device=meta.get("device"),
            threads=meta.get("threads"),
            files=meta["files"],
            versions=meta.get("versions", {}),
            pooling=meta.get("pooling"),
            source=meta.get("source"),
            skipped_tokens=meta.get("skipped_tokens"),
        )

    def to_meta(self, batch_size: int) -> dict[str, Any]:
        """The part of NAME.meta.json and job.json that determines the features."""
        return {
            "model": self.name,
            **self.values("revision", "files", "precision", "engine", "device", "decoding"),
            **self.values("preprocessing_hash", "feature_size"),
            **self._pooling(),
            **self._source(),
            "batch_size": batch_size,
            **self.values("threads", "versions"),
        }

    @classmethod
    def of_head(cls, data: Mapping[str, Any]) -> ModelIdentity:
        """Reverses `to_head`.

        Raises:
            KeyError, TypeError: a key is missing or has another type.
        """
        values = {key: data[key] for key in _HEAD_KEYS}
        for name, value in values.items():
            kinds = {"feature_size": (int,), "revision": (str, type(None))}
            if not isinstance(value, kinds.get(name, (str,))):
                raise TypeError(f"{name} is {value!r}")
        types = {"pooling": str, "source": str, "skipped_tokens": int}
        optional: dict[str, Any] = {name: data.get(name) for name in types}
        for name, value in optional.items():
            if not isinstance(value, (types[name], type(None))):
                raise TypeError(f"{name} is {value!r}")
        return cls(**values, **optional)

    def to_head(self) -> dict[str, Any]:
        """The part that head.json stores."""
        return self.values(*_HEAD_KEYS) | self._pooling() | self._source()

    def _pooling(self) -> dict[str, Any]:
        return {key: value for key, value in self.values("pooling", "skipped_tokens").items() if value is not None}

    def _source(self) -> dict[str, Any]:
        return {} if self.source is None else self.values("source")

    def values(self, *keys: str) -> dict[str, Any]:
        """Values of attributes, for JSON."""
        return {key: dict(value) if isinstance(value := getattr(self, key), Mapping) else value for key in keys}

    @property
    def fingerprint(self) -> list[Any]:
        """The keys that feature caches compare, as plain data. Device and threads may differ in the last bits.

        In fp16 the device counts, too, since a processor computes fp16 networks in fp32.
        """
        keys = (*_CACHE_KEYS, *(["device"] if self.precision == "fp16" else []))
        return [*self.values(*keys).values(), *self._pooling().values()]

    def difference(self, other: ModelIdentity, keys: Sequence[str]) -> str | None:
        """The first of `keys` (`MODEL_KEYS`, `FEATURE_KEYS` or `BYTE_KEYS`) that differs, or None."""
        return next((key for key in keys if self._differs(other, key)), None)

    def _differs(self, other: ModelIdentity, key: str) -> bool:
        mine, theirs = getattr(self, key), getattr(other, key)
        return mine != theirs and not (key == "skipped_tokens" and None in {mine, theirs})

    def same_features(self, other: ModelIdentity) -> bool:
        """Whether the features can be mixed: same model and preprocessing."""
        return self.difference(other, MODEL_KEYS) is None

    def same_bytes(self, other: ModelIdentity) -> bool:
        """Whether the features are byte-identical: same model, options and versions."""
        return self.difference(other, BYTE_KEYS) is None

    def require(self, other: ModelIdentity, mine: str, theirs: str, fix: str = "use the same model for both") -> None:
        """Refuses features of another model or preprocessing.

        Raises:
            InputError: the models differ. The message names `mine` and `theirs`.
        """
        key = self.difference(other, MODEL_KEYS)
        if key is None:
            return
        a, b, what = getattr(self, key), getattr(other, key), key.replace("_", " ")
        if key == "name":
            said = f"features of {_brief(a)}, {theirs} of {_brief(b)}"
        else:
            said = f"features of {self.name} with {what} {_brief(a)}, {theirs} with {_brief(b)}"
        raise InputError(f"{mine}: needs {said}", fix=fix)


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) < 64 else f"{text[:12]}..."
