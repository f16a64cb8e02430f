"""A head's folder: two files that contain each other's sha256, so neither can change without the other.

    head.json          facts; the sha256 of head.safetensors, as `head.safetensors_sha256`
    head.safetensors   arrays; the sha256 of the rest of head.json, as `head_sha256` in the metadata

`serving.heads.head` describes the contents.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robustfeat.errors import HeadError, HubError, first_line
from robustfeat.files import new_folder
from robustfeat.hub.remote import HubAccess, is_hub_name
from robustfeat.hub.snapshot import Snapshot

__all__ = ["HEAD", "TENSORS", "VERSIONS", "HeadFolder", "about_sha256", "copy_head", "resolve_head"]

HEAD, TENSORS = "head.json", "head.safetensors"
CARD = "README.md"
VERSIONS = range(1, 3)
"""Versions of the format. Heads of a newer version are refused. Version 1 had no distances."""


class HeadFolder:
    """An open folder of a head, whose two files belong together.

    Args:
        path: the folder.
        sha256: the expected sha256 of head.json, which pins both files.
        snapshot: the repository of a cached folder; None for a local folder.

    Attributes:
        path: the folder.
        about: the content of head.json, without the hash of the other file.
        files: the verified bytes of both files.
        sha256: the sha256 of head.json.
        revision: the commit on the Hub; None for a local folder.
        snapshot: see Args.

    Raises:
        HeadError: a file is missing, damaged, altered or of a newer format.
        HubError: the files cannot be downloaded.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, sha256: str | None = None, snapshot: Snapshot | None = None
    ) -> None:
        self.path, self.snapshot = Path(path), snapshot
        self.revision = snapshot.revision if snapshot else None
        self._remedy = snapshot.remedy if snapshot else "copy or fit the head again"
        if snapshot:
            snapshot.fetch([HEAD, TENSORS])
        self.files = {name: self._read(name) for name in (HEAD, TENSORS)}
        self.sha256 = hashlib.sha256(self.files[HEAD]).hexdigest()
        self._pin(sha256)
        try:
            self.about = self._verify(json.loads(self.files[HEAD]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
            raise HeadError(f"{self.path}: not a valid head ({first_line(exc)})", fix=self._remedy) from exc

    @property
    def asked(self) -> bool:
        """Whether the list of files comes from the Hub rather than from the cache."""
        return self.snapshot is not None and self.snapshot.listing is not None

    @property
    def place(self) -> str:
        """The argument that names the head, for messages."""
        return self.snapshot.repo if self.snapshot else str(self.path)

    def _read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError as exc:
            raise HeadError(f"{self.path}: not a head (no {name}); expected a folder from svm fit") from exc
        except OSError as exc:
            raise HeadError(
                f"{self.path}: not a readable head ({first_line(exc)}); expected a folder from svm fit"
            ) from exc

    def _pin(self, wanted: str | None) -> None:
        if wanted is None:
            return
        if not re.fullmatch("(sha256:)?[0-9a-fA-F]{64}", wanted):
            raise HeadError(
                f"the sha256 of a head has 64 hex digits; got {wanted!r}", fix="copy it from robustfeat info"
            )
        if self.sha256 != wanted.lower().removeprefix("sha256:"):
            raise HeadError(
                f"{self.path / HEAD}: the sha256 must be {wanted[:12]}..., got {self.sha256[:12]}...: not the "
                "requested head",
                fix="check the name and the revision",
            )

    def _verify(self, about: dict[str, Any]) -> dict[str, Any]:
        """Checks that both files belong together, and returns the content of head.json."""
        version = about["format_version"]
        if version not in VERSIONS:
            raise HeadError(
                f"{self.path / HEAD}: format_version must be from {VERSIONS[0]} to {VERSIONS[-1]}; got {version!r}",
                fix="update robustfeat",
            )
        data = self.files[TENSORS]
        expected, actual = about.pop(f"{TENSORS}_sha256"), hashlib.sha256(data).hexdigest()
        if actual != expected:
            raise HeadError(
                f"{self.path / TENSORS}: altered or truncated (sha256 must be {str(expected)[:12]}..., got "
                f"{actual[:12]}...)",
                fix=self._remedy,
            )
        length = int.from_bytes(data[:8], "little")
        if json.loads(data[8 : 8 + length])["__metadata__"]["head_sha256"] != about_sha256(about):
            raise HeadError(f"{self.path / HEAD}: altered after it was written", fix=self._remedy)
        return about


def about_sha256(about: Mapping[str, Any]) -> str:
    """The hash of head.json's content, independent of its white space."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def resolve_head(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    sha256: str | None = None,
    access: HubAccess | None = None,
) -> HeadFolder:
    """Opens a head by the name that a user gives.

    Args:
        name: a folder, or ORG/NAME on the Hub if no such folder exists.
        revision: a branch, tag or commit on the Hub; main by default.
        sha256: the expected sha256 of head.json.
        access: the Hub to use, and the credentials.

    Raises:
        HeadError: the head does not exist or is damaged.
        HubError: the Hub refuses, fails or cannot be reached.
    """
    text = os.fspath(name)
    on_hub = isinstance(name, str) and is_hub_name(text)
    if on_hub and not Path(text).exists():
        snapshot = Snapshot(text, HEAD, revision=revision, access=access)
        return HeadFolder(snapshot.path, sha256=sha256, snapshot=snapshot)
    if on_hub and not Path(text, HEAD).is_file():
        raise HeadError(f"{text}: a folder of this name hides the head on the Hub", fix="rename the folder")
    if revision is not None:
        raise HeadError(f"{text}: is not a head on the Hub, so it has no revision {revision}", fix="leave that out")
    return HeadFolder(text, sha256=sha256)


def copy_head(head: HeadFolder, out: str | os.PathLike[str]) -> HeadFolder:
    """Copies a head's verified files and its card to a new folder.

    Raises:
        HubError: the card cannot be downloaded.
        InputError: `out` exists or cannot be written.
    """
    card = read_card(head)
    with new_folder(out) as path:
        for name, content in (head.files | ({} if card is None else {CARD: card})).items():
            (path / name).write_bytes(content)
        HeadFolder(path, sha256=head.sha256)
    return HeadFolder(out)


def read_card(head: HeadFolder) -> bytes | None:
    """Reads the card of a head, and downloads it first if it is on the Hub. None if there is no card.

    Raises:
        HubError: the card cannot be downloaded.
    """
    snapshot = head.snapshot
    if snapshot and not (head.path / CARD).is_file():
        if snapshot.listing is None and snapshot.reachable:
            snapshot.look()
        if CARD in (snapshot.listing or ()):
            snapshot.fetch([CARD])
    try:
        return (head.path / CARD).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise HubError(f"{head.path / CARD}: cannot be read ({exc.strerror})") from exc
