"""A head's folder: numbers and names, in two files that hold each other's sha256, so that neither changes alone.

    head.json          what it is; the sha256 of head.safetensors, as `head.safetensors_sha256`
    head.safetensors   arrays; the sha256 of all else in head.json, as `head_sha256` in its metadata

`serving.heads.head` says what they mean.
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
"""Of the format. Heads of a newer version are refused. Version 1 knew no distances."""


class HeadFolder:
    """A head's folder that was opened: its two files are there, and belong to each other.

    Args:
        path: the folder.
        sha256: of head.json, which pins both files.
        snapshot: the repository whose cached folder it is; None for a folder of one's own.

    Attributes:
        path: the folder.
        about: the content of head.json, without the hash of the other file.
        files: the bytes of both files, as they were verified.
        sha256: of head.json.
        revision: the commit on the Hub; None for other folders.
        snapshot: as above.

    Raises:
        HeadError: a file is missing, damaged, altered or of a newer format.
        HubError: it cannot be downloaded.
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
        """Whether the Hub said what it holds, rather than the cache."""
        return self.snapshot is not None and self.snapshot.listing is not None

    @property
    def place(self) -> str:
        """What a user types to get it, for messages."""
        return self.snapshot.repo if self.snapshot else str(self.path)

    def _read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError as exc:
            raise HeadError(f"{self.path}: not a head (no {name}); expected what svm fit makes") from exc
        except OSError as exc:
            raise HeadError(
                f"{self.path}: not a head that can be read ({first_line(exc)}); expected a folder that svm fit makes"
            ) from exc

    def _pin(self, wanted: str | None) -> None:
        if wanted is None:
            return
        if not re.fullmatch("(sha256:)?[0-9a-fA-F]{64}", wanted):
            raise HeadError(
                f"{wanted!r} is no sha256 of a head, which has 64 hex digits", fix="copy it from robustfeat info"
            )
        if self.sha256 != wanted.lower().removeprefix("sha256:"):
            raise HeadError(
                f"{self.path / HEAD}: the sha256 must be {wanted[:12]}..., got {self.sha256[:12]}...: not the head "
                "that was asked for",
                fix="check the name and the revision",
            )

    def _verify(self, about: dict[str, Any]) -> dict[str, Any]:
        """What head.json says, once both files are known to belong to each other."""
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
            raise HeadError(f"{self.path / HEAD}: altered since it was written", fix=self._remedy)
        return about


def about_sha256(about: Mapping[str, Any]) -> str:
    """The hash of what head.json says, whatever its white space."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def resolve_head(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    sha256: str | None = None,
    access: HubAccess | None = None,
) -> HeadFolder:
    """The head that a user names.

    Args:
        name: a folder, or ORG/NAME on the Hub where no such folder exists.
        revision: a branch, tag or commit on the Hub; main by default.
        sha256: that head.json must have.
        access: which Hub, as whom.

    Raises:
        HeadError: there is no such head, or it is damaged.
        HubError: the Hub refuses, fails or cannot be reached.
    """
    text = os.fspath(name)
    on_hub = isinstance(name, str) and is_hub_name(text)
    if on_hub and not Path(text).exists():
        snapshot = Snapshot(text, HEAD, revision=revision, access=access)
        return HeadFolder(snapshot.path, sha256=sha256, snapshot=snapshot)
    if on_hub and not Path(text, HEAD).is_file():
        raise HeadError(f"{text}: a folder of this name is in the way of the head on the Hub", fix="rename it")
    if revision is not None:
        raise HeadError(f"{text}: is no head on the Hub, so it has no revision {revision}", fix="leave that out")
    return HeadFolder(text, sha256=sha256)


def copy_head(head: HeadFolder, out: str | os.PathLike[str]) -> HeadFolder:
    """A folder of its own with the head's files and its card, verified.

    Raises:
        HubError: the card cannot be downloaded.
        InputError: `out` exists, or cannot be written.
    """
    card = read_card(head)
    with new_folder(out) as path:
        for name, content in (head.files | ({} if card is None else {CARD: card})).items():
            (path / name).write_bytes(content)
        HeadFolder(path, sha256=head.sha256)
    return HeadFolder(out)


def read_card(head: HeadFolder) -> bytes | None:
    """The card of a head, downloaded where need be; None where it has none.

    Raises:
        HubError: it cannot be downloaded.
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
