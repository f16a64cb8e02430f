"""HEAD on the command line: a folder, or ORG/NAME on the Hub, with [@REVISION][#SHA256]."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from robustfeat.serving.heads.head import Head

__all__ = ["is_head", "load_head"]


def load_head(text: str) -> Head:
    """The head that a user names, downloaded where need be.

    Raises:
        HeadError: there is no such head, it is damaged, or it has another hash.
        HubError: the Hub refuses, fails or cannot be reached.
    """
    from robustfeat.hub.place import Place
    from robustfeat.serving.heads.head import Head

    place = Place.parse(text)
    return Head.from_pretrained(place.name, revision=place.revision, sha256=place.sha256)


def is_head(place: str) -> bool:
    """Whether this is a folder with a head in it."""
    return Path(place, "head.json").is_file()
