"""Opens the HEAD argument: a folder, or ORG/NAME on the Hub, with [@REVISION][#SHA256]."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from robustfeat.serving.heads.head import Head

__all__ = ["is_head", "load_head"]


def load_head(text: str) -> Head:
    """Loads a head and downloads it first if it is on the Hub.

    Raises:
        HeadError: the head does not exist, is damaged, or has another hash.
        HubError: the Hub refuses, fails or cannot be reached.
    """
    from robustfeat.hub.place import Place
    from robustfeat.serving.heads.head import Head

    place = Place.parse(text)
    return Head.from_pretrained(place.name, revision=place.revision, sha256=place.sha256)


def is_head(place: str) -> bool:
    """Whether the folder contains a head."""
    return Path(place, "head.json").is_file()
