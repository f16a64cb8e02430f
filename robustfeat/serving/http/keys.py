"""Bearer keys: who may ask, and how much."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from robustfeat.errors import InputError
from robustfeat.serving.http.watched import read_text, stamp

__all__ = ["ANYONE", "ENVIRONMENT", "Key", "KeyRing"]

ENVIRONMENT = "ROBUSTFEAT_API_KEYS"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEY = re.compile(r"[\x21-\x7e]{8,512}")


@dataclass(frozen=True)
class Key:
    """One who may ask.

    Attributes:
        name: for logs and for the turns in the queue. Keys of one name, as during a rotation, share one share.
        digest: sha256 of the key.
        rate: images a second; None without a limit.
        concurrency: images admitted at once; None for an equal part of the queue.
    """

    name: str
    digest: bytes
    rate: float | None = None
    concurrency: int | None = None


ANYONE = Key("", b"")
"""Who asks a server without keys."""


class KeyRing:
    """The keys of a server, read again when their file changes.

    Args:
        keys: a file with one key per line: NAME KEY [rate=IMAGES_PER_SECOND] [concurrency=IMAGES].
            Lines that begin with # are comments.
        text: such lines from the environment. Commas also end lines.

    Raises:
        InputError: the file does not exist, or a line is invalid.
    """

    def __init__(self, keys: Path | None = None, text: str | None = None) -> None:
        self._file, self._fixed = keys, parse_keys(re.split("[,\n]", text or ""))
        if text is not None and not self._fixed:
            raise InputError(
                f"{ENVIRONMENT}: holds no key", fix="write NAME KEY, or unset the variable to serve everybody"
            )
        self._stamp = self._seen = tuple[int, ...]()
        self._keys: list[Key] = self._fixed
        while keys is not None and not self._read(keys):
            pass

    @property
    def names(self) -> set[str]:
        """Names of all keys; empty if everybody may send requests."""
        return {key.name for key in self._keys}

    def refresh(self) -> bool:
        """Reads the file again if it has changed. Returns whether it had.

        A file counts as changed when it is the same as at the previous call. So half of a file is not read.

        Raises:
            InputError: the file cannot be used. The old keys stay.
        """
        if self._file is None:
            return False
        try:
            before, self._seen = self._seen, stamp(self._file)
        except OSError as exc:
            self._stamp = self._seen = ()
            raise InputError(str(exc.strerror), argument="keys", value=self._file) from exc
        return self._seen == before and self._seen != self._stamp and self._read(self._file)

    def _read(self, file: Path) -> bool:
        """Reads the file. Returns False if it changed meanwhile."""
        try:
            found = stamp(file)
            lines = read_text(file).splitlines()
            if stamp(file) != found:
                return False
            self._stamp = self._seen = found
        except (OSError, UnicodeDecodeError) as exc:
            self._stamp = ()
            reason = exc.strerror if isinstance(exc, OSError) else "not UTF-8"
            raise InputError(str(reason), argument="keys", value=file) from exc
        keys = parse_keys(lines, file)
        if not keys:
            raise InputError("holds no key", argument="keys", value=file, fix="write a line NAME KEY for each")
        for key in keys:
            for known in self._fixed:
                if key.digest == known.digest and key.name != known.name:
                    what = f"the key of {key.name} is also that of {known.name}"
                    raise InputError(what, argument="keys", value=file)
        self._keys = [*self._fixed, *keys]
        return True

    def find(self, authorization: str | None) -> Key | None:
        """The key of an Authorization header; None if it is unknown. Without keys, everybody is accepted."""
        if not self._keys:
            return ANYONE
        scheme, _, value = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        digest = hashlib.sha256(value.strip().encode("utf-8", "surrogateescape")).digest()
        found = None
        for key in self._keys:  # compare all keys, so the time reveals nothing
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found


def parse_keys(lines: Iterable[str], file: Path | None = None) -> list[Key]:
    """The keys in lines of text.

    Args:
        lines: the lines.
        file: the file of the lines; None for the environment.

    Raises:
        InputError: a line is invalid. The message names the line, never the key.
    """

    def refusal(number: int, what: str) -> InputError:
        if file is None:
            return InputError(f"{ENVIRONMENT}: line {number}: {what}")
        return InputError(f"line {number}: {what}", argument="keys", value=file)

    keys: dict[bytes, Key] = {}
    for number, line in enumerate(lines, 1):
        words = [] if line.lstrip().startswith("#") else line.split()
        if not words:
            continue
        name, *rest = words
        if not rest or not _NAME.fullmatch(name) or not _KEY.fullmatch(rest[0]):
            raise refusal(number, "expected NAME KEY [rate=N] [concurrency=N], the key of 8 to 512 characters")
        shares: dict[str, str] = dict(word.partition("=")[::2] for word in rest[1:])
        if set(shares) - {"rate", "concurrency"} or len(shares) < len(rest) - 1:
            raise refusal(number, "after the key there may be rate=N and concurrency=N, nothing else")
        try:
            rate = float(shares["rate"]) if "rate" in shares else None
            concurrency = int(shares["concurrency"]) if "concurrency" in shares else None
        except ValueError:
            raise refusal(number, "rate and concurrency must be numbers") from None
        if not 0 < (rate or 1) < float("inf") or (concurrency or 1) < 1 or 0 in {rate, concurrency}:
            raise refusal(number, "rate and concurrency must be positive")
        digest = hashlib.sha256(rest[0].encode()).digest()
        if digest in keys and keys[digest].name != name:
            raise refusal(number, f"the key of {name} is also that of {keys[digest].name}")
        keys[digest] = Key(name, digest, rate, concurrency)
    return list(keys.values())
