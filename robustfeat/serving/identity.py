"""Which model made some features, and how it was run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from robustfeat.errors import InputError
from robustfeat.hub.folder import weights_sha256

__all__ = ["BYTE_KEYS", "FEATURE_KEYS", "MODEL_KEYS", "ModelIdentity"]

MODEL_KEYS = ("name", "weights_sha256", "preprocessing_hash", "feature_size", "pooling", "skipped_tokens")
"""What heads compare. Features of another precision are almost the same (docs/embedding.md gives the cost), features of
another model are not."""

FEATURE_KEYS = (
    "files", "preprocessing_hash", "precision", "engine", "device", "decoding", "feature_size", "pooling",
    "skipped_tokens"
)  # fmt: skip
"""What `append` compares: the rows of one file come from one way to run one model."""

BYTE_KEYS = ("name", *FEATURE_KEYS, "threads", "versions")
"""What the machines of a Ray cluster compare: all that decides the bytes of a row, but for the batch size.

The commit on the Hub is in none of the lists, because it changes with the card, too.
"""

_CACHE_KEYS = ("files", "preprocessing_hash", "precision", "engine", "engine_version", "decoding")
_HEAD_KEYS = (
    "name", "revision", "weights_sha256", "preprocessing_hash", "feature_size", "precision", "engine", "decoding"
)  # fmt: skip


@dataclass(frozen=True)
class ModelIdentity:
    """A model, its preprocessing, and how it was run.

    Attributes:
        name: of the model.
        revision: its commit on the Hub, if it is known.
        weights_sha256: see `hub.folder.weights_sha256`.
        preprocessing_hash: of its preprocessing contract.
        feature_size: D.
        precision, engine, decoding: as in `RunOptions`, without auto.
        device, threads: what it ran on; None in a head.
        files: sha256 of each file of the model; empty in a head.
        versions: of robustfeat, the engine and the libraries that decode; empty in a head.
        pooling: which output of a network of transformers the features are (see `hub.outputs`); None for our own
            networks, and not named there.
        source: where the model is found, as a user types it: builtin, or ORG/NAME on the Hub; None for a folder. It
            decides nothing, and is not compared.
        skipped_tokens: the first tokens of such a network, which the pooling `mean` leaves out: config.json decides it,
            which is not among `files`. None with another pooling, and in what earlier versions wrote: they did not say.
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
            KeyError, TypeError, ValueError, AttributeError: something is missing there, or is of another type.
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
        """The part of NAME.meta.json and job.json that decides the features."""
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
        """The inverse of `to_head`.

        Raises:
            KeyError, TypeError: something is missing, or is of another type.
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
        """The part that head.json keeps."""
        return self.values(*_HEAD_KEYS) | self._pooling() | self._source()

    def _pooling(self) -> dict[str, Any]:
        return {key: value for key, value in self.values("pooling", "skipped_tokens").items() if value is not None}

    def _source(self) -> dict[str, Any]:
        return {} if self.source is None else self.values("source")

    def values(self, *keys: str) -> dict[str, Any]:
        """These attributes, for JSON."""
        return {key: dict(value) if isinstance(value := getattr(self, key), Mapping) else value for key in keys}

    @property
    def fingerprint(self) -> list[Any]:
        """What caches of features compare, as plain data: devices and threads may change the last bits there.

        In fp16 they also compare the device, because a processor computes fp16 networks in fp32.
        """
        keys = (*_CACHE_KEYS, *(["device"] if self.precision == "fp16" else []))
        return [*self.values(*keys).values(), *self._pooling().values()]

    def difference(self, other: ModelIdentity, keys: Sequence[str]) -> str | None:
        """The first of `keys` in which they differ: `MODEL_KEYS`, `FEATURE_KEYS` or `BYTE_KEYS`; None if in none."""
        return next((key for key in keys if self._differs(other, key)), None)

    def _differs(self, other: ModelIdentity, key: str) -> bool:
        mine, theirs = getattr(self, key), getattr(other, key)
        return mine != theirs and not (key == "skipped_tokens" and None in {mine, theirs})

    def same_features(self, other: ModelIdentity) -> bool:
        """Whether features of both can be mixed: the same model and preprocessing, run in any way."""
        return self.difference(other, MODEL_KEYS) is None

    def same_bytes(self, other: ModelIdentity) -> bool:
        """Whether both give the same bytes: also run in the same way by the same versions."""
        return self.difference(other, BYTE_KEYS) is None

    def require(self, other: ModelIdentity, mine: str, theirs: str, fix: str = "use the same model for both") -> None:
        """Refuses features of another model or preprocessing; `mine` and `theirs` are named in the error.

        Raises:
            InputError: saying both.
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
