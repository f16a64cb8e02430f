"""HEAD on the command line: a folder, or ORG/NAME[@REVISION] on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from robustfeat.serving.heads.head import Head

__all__ = ["is_head", "load_head"]


def load_head(place: str) -> Head:
    """The head that a user names, downloaded where need be.

    Raises:
        HeadError: there is no such head, or it is damaged.
        HubError: the Hub refuses, fails or cannot be reached.
    """
    from robustfeat.serving.heads.head import Head

    name, revision = _split(place)
    return Head.from_pretrained(name, revision=revision)


def is_head(place: str) -> bool:
    """Whether this is a folder with a head in it."""
    return Path(place, "head.json").is_file()


def _split(place: str) -> tuple[str, str | None]:
    """The name, and the revision behind an @ in it; a folder may have one in its name."""
    name, at, revision = place.rpartition("@")
    return (name, revision) if at and "/" in name and not Path(place).exists() else (place, None)
