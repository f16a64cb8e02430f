"""Caches features by image content in one SQLite file, which processes may share."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from robustfeat.errors import DecodeError, InputError

__all__ = ["Content", "FeatureCache", "FeatureMaker", "embed_contents"]

Content = bytes | NDArray[np.uint8]
"""An image: a file's bytes, or the network's square."""


class FeatureMaker(Protocol):
    """Computes features: a `FeatureExtractor`, or a network under evaluation."""

    @property
    def fingerprint(self) -> Sequence[Any]:
        """Plain data for JSON. Makers of different features have different fingerprints."""

    @property
    def feature_size(self) -> int:
        """D, the length of a feature vector."""

    def prepare(self, image: bytes) -> NDArray[np.uint8]:
        """Prepares the network's (S, S, 3) uint8 square. Raises DecodeError if the image cannot be read."""

    def embed_prepared(self, squares: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embeds (n, S, S, 3) uint8 to (n, D) float32."""


class FeatureCache:
    """Features of one maker by the sha256 of the image.

    Other models, precisions, engines and decodings have other keys, so one file can serve all.

    Args:
        file: the file of the cache, created with its folder if missing.
        maker: the maker of the features.

    Raises:
        InputError: the file cannot be opened or is not a cache.
    """

    def __init__(self, file: str | os.PathLike[str], maker: FeatureMaker) -> None:
        self._file, self._size = Path(file), maker.feature_size
        self._prefix = hashlib.sha256(json.dumps(list(maker.fingerprint), sort_keys=True).encode()).digest()
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._connect()) as connection, connection:
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS features (key BLOB PRIMARY KEY, value BLOB) WITHOUT ROWID"
                )
        except (OSError, sqlite3.Error) as exc:
            raise InputError(
                f"{self._file}: not a usable cache of features ({exc})", fix="delete it, or name another file"
            ) from exc

    def key(self, content: Content) -> bytes:
        """The key of an image file's bytes, or of a prepared square."""
        kind, data = (b"file", content) if isinstance(content, bytes) else (b"square", content.tobytes())
        return hashlib.sha256(self._prefix + kind + hashlib.sha256(data).digest()).digest()

    def get(self, keys: Sequence[bytes]) -> dict[bytes, NDArray[np.float32]]:
        """Cached features by key, each (D,) float32."""
        found = {}
        try:
            with closing(self._connect()) as connection:
                for key in dict.fromkeys(keys):
                    row = connection.execute("SELECT value FROM features WHERE key = ?", (key,)).fetchone()
                    if row is not None and isinstance(row[0], bytes) and len(row[0]) == 4 * self._size:
                        value = np.frombuffer(row[0], "<f4")
                        if np.isfinite(value).all():
                            found[key] = value
        except sqlite3.Error as exc:
            raise InputError(f"{self._file}: cannot be read ({exc})", fix="delete it to start anew") from exc
        return found

    def put(self, features: dict[bytes, NDArray[np.float32]]) -> None:
        """Stores features.

        Raises:
            InputError: the disk is full, or the file cannot be written.
        """
        rows = [(key, value.astype("<f4").tobytes()) for key, value in features.items()]
        try:
            with closing(self._connect()) as connection, connection:
                connection.executemany("INSERT OR REPLACE INTO features VALUES (?, ?)", rows)
        except sqlite3.Error as exc:
            raise InputError(f"{self._file}: cannot be written ({exc})") from exc

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._file, timeout=60)


def embed_contents(
    maker: FeatureMaker,
    contents: Sequence[Content | DecodeError],
    cache: FeatureCache | None = None,
    *,
    refuse: Callable[[int, DecodeError], DecodeError] | None = None,
) -> NDArray[np.float32]:
    """Embeds one batch: takes cached features, computes the others and caches them.

    With a cache, images of the same content are computed once.

    Args:
        maker: computes the features.
        contents: the images, or an error for each image that could not be read.
        cache: a cache of the same maker; None computes all.
        refuse: returns the error to raise, given the position of the first failed image and its error. By default,
            the row of a failed image is NaN.

    Returns:
        (n, D) float32.

    Raises:
        DecodeError: from `refuse`.
    """
    errors = {place: content for place, content in enumerate(contents) if isinstance(content, DecodeError)}
    images = {place: content for place, content in enumerate(contents) if not isinstance(content, DecodeError)}
    keys = {place: cache.key(image) if cache else str(place).encode() for place, image in images.items()}
    known = cache.get(list(keys.values())) if cache else {}
    fresh: dict[bytes, NDArray[np.uint8]] = {}
    for place, key in keys.items():
        if key not in known and key not in fresh:
            image = images[place]
            try:
                fresh[key] = maker.prepare(image) if isinstance(image, bytes) else image
            except DecodeError as exc:
                errors[place] = exc
    if errors and refuse is not None:
        first = min(errors)
        raise refuse(first, errors[first]) from errors[first]
    if fresh:
        made = dict(zip(fresh, maker.embed_prepared(np.stack(list(fresh.values()))), strict=True))
        if cache:
            cache.put({key: value for key, value in made.items() if np.isfinite(value).all()})
        known = known | made
    features = np.full((len(contents), maker.feature_size), np.nan, np.float32)
    for place, key in keys.items():
        if key in known:
            features[place] = known[key]
    return features
