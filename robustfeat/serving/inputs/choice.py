"""Chooses the images among the files of a folder or an archive, and counts the others."""

from __future__ import annotations

import fnmatch
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence

__all__ = ["IMAGE_SUFFIXES", "Choice", "is_hidden", "say_left_out", "suffix_kind"]

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"}
    | {".avif", ".heic", ".heif", ".hif"}  # even if nothing here reads them, so rows do not depend on the installation
)

_DESKTOP_FILES = {".DS_Store", "Thumbs.db", "desktop.ini"}
_PLAIN_SUFFIX = re.compile(r"\.[a-z0-9_+-]{1,12}")
_KINDS_SAID = 6
_KINDS_COUNTED = 1000


class Choice:
    """Chooses files by their names and counts the files that it skips.

    Args:
        patterns: patterns of the names to choose, whatever the suffix. Without patterns, files with an image suffix are
            chosen. A pattern with a slash is compared with the path in the folder or archive. Hidden files and folders
            are skipped. Files of desktops, such as thumbnail databases, are not even counted.

    Attributes:
        left_out: number of skipped files, by kind.
    """

    def __init__(self, patterns: Sequence[str] = ()) -> None:
        self._patterns = [pattern.lower() for pattern in patterns]
        self.left_out: Counter[str] = Counter()

    def takes(self, path: str) -> bool:
        """Whether to choose a file; `path` is relative to the folder or archive."""
        *folders, name = path.split("/")
        if name.startswith("._") or name in _DESKTOP_FILES:
            return False
        if is_hidden(name) or any(is_hidden(folder) for folder in folders):
            self.leave_out("hidden")
        elif self._patterns:
            if any(fnmatch.fnmatchcase((path if "/" in one else name).lower(), one) for one in self._patterns):
                return True
            self.leave_out("not matched")
        elif os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
            return True
        else:
            self.leave_out(suffix_kind(name))
        return False

    def leave_out(self, kind: str) -> None:
        """Counts a skipped file."""
        self.left_out[kind if kind in self.left_out or len(self.left_out) < _KINDS_COUNTED else "others"] += 1


def is_hidden(name: str) -> bool:
    """Whether a name begins with a dot. `.` and `..` in the names of archives do not count."""
    return name.startswith(".") and name not in {".", ".."}


def suffix_kind(name: str) -> str:
    """The kind under which a file without an image suffix is counted."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix if _PLAIN_SUFFIX.fullmatch(suffix) else "others" if suffix else "without suffix"


def say_left_out(left_out: Mapping[str, int], undecodable: int = 0) -> str:
    """Counts as text, largest first: `files left out: 3 (.psd 2, without suffix 1)`. Empty if there are none.

    Args:
        left_out: number of skipped files, by kind.
        undecodable: number of listed images that could not be decoded.
    """
    said = [_say_kinds(left_out)] if any(left_out.values()) else []
    if undecodable:
        said.append(f"images that cannot be decoded: {undecodable:,}")
    return "; ".join(said)


def _say_kinds(left_out: Mapping[str, int]) -> str:
    total = sum(left_out.values())
    ranked = sorted(left_out.items(), key=lambda entry: (-entry[1], entry[0]))
    parts = [f"{kind} {count:,}" for kind, count in ranked[:_KINDS_SAID]]
    if rest := sum(count for _, count in ranked[_KINDS_SAID:]):
        parts.append(f"more {rest:,}")
    return f"files left out: {total:,} ({', '.join(parts)})"
