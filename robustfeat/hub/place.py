"""Where a model or a head lies, and which version of it is meant, as one text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Place"]


@dataclass(frozen=True)
class Place:
    """A model or a head that a user names: NAME[@REVISION][#SHA256].

    Attributes:
        name: `builtin` for the built-in model, a folder, or ORG/NAME on the Hub.
        revision: a branch, tag or commit on the Hub; None for main.
        sha256: its hash, as `robustfeat info` prints it. That is the config hash of a model and the sha256 of a head,
            which pin all files. None for any.

    >>> Place.parse("org/name@v1")
    Place(name='org/name', revision='v1', sha256=None)
    """

    name: str
    revision: str | None = None
    sha256: str | None = None

    @classmethod
    def parse(cls, text: str) -> Place:
        """The place in a text; folders may have both marks in their names."""
        if Path(text).exists():
            return cls(text)
        rest, mark, sha256 = text.rpartition("#")
        if not mark:
            rest = text
        name, at, revision = rest.rpartition("@")
        versioned = at and "/" in name and not Path(rest).exists()
        return cls(name if versioned else rest, revision if versioned else None, sha256 if mark else None)
