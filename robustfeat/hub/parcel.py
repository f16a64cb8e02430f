"""Collects the files of a push: a model's or a head's verified files, its card, and other files in its folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustfeat.counts import format_count
from robustfeat.errors import HeadError, ModelFolderError, RobustFeatError
from robustfeat.hub.card import PLACE, render_card
from robustfeat.hub.folder import CARD, CONFIG, ModelFolder, file_sha256
from robustfeat.hub.head_card import render_head_card
from robustfeat.hub.head_folder import HEAD, TENSORS, HeadFolder

__all__ = ["Parcel", "head_parcel", "model_parcel"]

_REPORTS = frozenset({"report.html", "report.md", "suspects.csv"})
"""Reports of `svm fit`, which show training images or name their files."""

_SECRET_NAMES = re.compile(
    r"id_(rsa|dsa|ecdsa|ed25519)|.*\.(pem|key|p12|pfx|kdbx|keystore|env)|credentials(\..*)?|\.?netrc"
)
_SECRETS = re.compile(
    rb"-----BEGIN [A-Z ]*PRIVATE KEY"
    rb"|\b(hf_[A-Za-z0-9]{30,}|AKIA[A-Z0-9]{16}|gh[pousr]_[A-Za-z0-9]{36,}|sk-[A-Za-z0-9_-]{32,})"
)


@dataclass(frozen=True)
class Parcel:
    """The files of a push.

    Attributes:
        key: the file that describes the others, a key of `snapshot.KINDS`.
        name: the name in the commit message.
        sha256: the sha256 of the describing file, which pins all files.
        contents: the repository's new files, by path.
        card_is_edited: whether a person wrote the card, which then replaces the card on the Hub.
        left_out: files of the folder that are not sent.
    """

    key: str
    name: str
    sha256: str
    contents: Mapping[str, Path | bytes]
    card_is_edited: bool
    left_out: tuple[str, ...] = ()

    @property
    def card(self) -> str:
        """The text of the card."""
        content = self.contents[CARD]
        return (content if isinstance(content, bytes) else content.read_bytes()).decode()

    def files_of(self, description: bytes) -> set[str]:
        """The files of an earlier version, from its describing file.

        Raises:
            ValueError, TypeError, KeyError, RecursionError: the file describes no such version.
        """
        data: Any = json.loads(description)
        if self.key == CONFIG:
            return set(dict(data["robustfeat"]["files"]))
        return {TENSORS} if data[f"{TENSORS}_sha256"] else set()


def model_parcel(folder: ModelFolder, repo: str) -> Parcel:
    """Collects the files of a verified model folder.

    Raises:
        ModelFolderError: a file was altered, or looks like a secret.
    """
    card = _read_card(folder.path, ModelFolderError)
    # Send the verified bytes, not the files as they are at the time of sending.
    files = {name: folder.read(name) for name in folder.config.files} | {CONFIG: folder.config_bytes}
    text = (card or render_card(folder.config)).replace(PLACE, repo)
    return Parcel(
        CONFIG,
        folder.config.name,
        folder.config_hash,
        _contents(folder.path, files, text, (), ModelFolderError),
        card_is_edited=card is not None and file_sha256(folder.path / CARD) != folder.config.card_sha256,
    )


def head_parcel(
    folder: HeadFolder, repo: str, *, license_id: str | None = None, published_license: str | None = None
) -> Parcel:
    """Collects the files of a head's folder.

    Args:
        folder: the head.
        repo: ORG/NAME.
        license_id: the Hub's name of a license, for a generated card.
        published_license: the license of a generated card if `license_id` is None.

    Raises:
        HeadError: a file looks like a secret, or both a card and a license are given.
    """
    card = _read_card(folder.path, HeadError)
    if card is not None and license_id is not None:
        raise HeadError(
            f"{folder.path / CARD}: the folder has a card, which states the license",
            argument=None,
            fix="leave `license_id` out, or remove the card to generate a new one",
        )
    text = (card or render_head_card(folder.about, folder.sha256, license_id or published_license)).replace(PLACE, repo)
    return Parcel(
        HEAD,
        f"head with {format_count(len(folder.about['classes']), 'class')}",
        folder.sha256,
        _contents(folder.path, folder.files, text, _REPORTS, HeadError),
        card_is_edited=card is not None or license_id is not None,
        left_out=tuple(sorted(name for name in _REPORTS if (folder.path / name).is_file())),
    )


def _read_card(path: Path, kind: type[RobustFeatError]) -> str | None:
    card = path / CARD
    try:
        return card.read_bytes().decode() if card.is_file() else None
    except UnicodeDecodeError as exc:
        raise kind(f"{card}: not UTF-8 ({exc.reason} at byte {exc.start})", fix="save it as UTF-8") from exc


def _contents(
    path: Path, files: Mapping[str, bytes], card: str, left_out: Iterable[str], kind: type[RobustFeatError]
) -> dict[str, Path | bytes]:
    """The files, the card, and the folder's other files."""
    contents: dict[str, Path | bytes] = dict(files)
    for file in path.rglob("*"):  # for example a license, or the card's pictures
        name = file.relative_to(path).as_posix()
        if file.is_file() and not file.is_symlink() and not any(part.startswith(".") for part in Path(name).parts):
            contents.setdefault(name, file)
    for name in left_out:
        contents.pop(name, None)
    for name, content in contents.items():
        if name not in files:
            _refuse_secret(path / name, content if isinstance(content, bytes) else content.read_bytes(), kind)
    _refuse_secret(path / CARD, card.encode(), kind)
    return contents | {CARD: card.encode()}


def _refuse_secret(file: Path, content: bytes, kind: type[RobustFeatError]) -> None:
    """Refuses secrets: others can read a pushed file, and it stays in the repository's history."""
    if _SECRET_NAMES.fullmatch(file.name.lower()) or _SECRETS.search(content):
        raise kind(
            f"{file}: looks like a key or a password; nothing was sent",
            fix="move it out of the folder",
        )
