"""Features kept by the content of the image, in one SQLite file that several processes may use."""

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
"""An image: a file's bytes, or the square that the network sees."""


class FeatureMaker(Protocol):
    """What computes features: a `FeatureExtractor`, or a network that is being evaluated."""

    @property
    def fingerprint(self) -> Sequence[Any]:
        """Plain data for JSON that differs where features may."""

    @property
    def feature_size(self) -> int:
        """D."""

    def prepare(self, image: bytes) -> NDArray[np.uint8]:
        """The (S, S, 3) uint8 square that the network sees; DecodeError where the image cannot be read."""

    def embed_prepared(self, squares: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(n, S, S, 3) uint8 to (n, D) float32."""


class FeatureCache:
    """Features of one maker by the sha256 of what was embedded.

    Another model, precision, engine or decoding has other keys, so that one file serves all.

    Args:
        file: made if need be, with its folder.
        maker: whose features these are.

    Raises:
        InputError: the file cannot be opened, or is something else.
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
                f"{self._file}: cannot be used as a cache of features ({exc})", fix="delete it, or name another"
            ) from exc

    def key(self, content: Content) -> bytes:
        """The key of an image file's bytes, or of a prepared square."""
        kind, data = (b"file", content) if isinstance(content, bytes) else (b"square", content.tobytes())
        return hashlib.sha256(self._prefix + kind + hashlib.sha256(data).digest()).digest()

    def get(self, keys: Sequence[bytes]) -> dict[bytes, NDArray[np.float32]]:
        """What is there: (D,) float32 by key."""
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
        """Keeps features.

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
    """Features of one batch: the cache gives what it has, the rest is computed and kept there.

    With a cache, images of the same content are computed once.

    Args:
        maker: what computes features.
        contents: the images; an error stands for an image that could not be read.
        cache: of the same maker; None computes all.
        refuse: makes the error to raise of the place of the first image that failed, and of its error. By default,
            its row is NaN.

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
