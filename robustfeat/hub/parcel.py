"""What a push sends: a model's or a head's files, as they were verified, its card, and what else lies in its folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustfeat.errors import HeadError, ModelFolderError, RobustFeatError
from robustfeat.hub.card import PLACE, render_card
from robustfeat.hub.folder import CARD, CONFIG, ModelFolder, file_sha256
from robustfeat.hub.head_card import render_head_card
from robustfeat.hub.head_folder import HEAD, TENSORS, HeadFolder

__all__ = ["Parcel", "head_parcel", "model_parcel"]

_REPORTS = frozenset({"report.html", "report.md", "suspects.csv"})
"""Of `svm fit`. They show training images, or name their files."""

_SECRET_NAMES = re.compile(
    r"id_(rsa|dsa|ecdsa|ed25519)|.*\.(pem|key|p12|pfx|kdbx|keystore|env)|credentials(\..*)?|\.?netrc"
)
_SECRETS = re.compile(
    rb"-----BEGIN [A-Z ]*PRIVATE KEY"
    rb"|\b(hf_[A-Za-z0-9]{30,}|AKIA[A-Z0-9]{16}|gh[pousr]_[A-Za-z0-9]{36,}|sk-[A-Za-z0-9_-]{32,})"
)


@dataclass(frozen=True)
class Parcel:
    """What a push sends.

    Attributes:
        key: the file that describes the rest, of `snapshot.KINDS`.
        name: what the commit is called.
        sha256: of the describing file, by which all is pinned.
        contents: what the repository shall hold, by path.
        card_is_edited: whether somebody wrote or chose what the card says, so that it replaces the one on the Hub.
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
        """The files that an earlier version of the same had, by what describes it.

        Raises:
            ValueError, TypeError, KeyError, RecursionError: it is none.
        """
        data: Any = json.loads(description)
        if self.key == CONFIG:
            return set(dict(data["robustfeat"]["files"]))
        return {TENSORS} if data[f"{TENSORS}_sha256"] else set()


def model_parcel(folder: ModelFolder, repo: str) -> Parcel:
    """A model folder, whose files were verified, for a repository.

    Raises:
        ModelFolderError: a file was altered, or looks like a secret.
    """
    card = _read_card(folder.path, ModelFolderError)
    # As they were verified, not as they are when the client sends them.
    files = {name: folder.read(name) for name in folder.config.files} | {CONFIG: folder.config_bytes}
    text = (card or render_card(folder.config)).replace(PLACE, repo)
    return Parcel(
        CONFIG,
        folder.config.name,
        folder.config_hash,
        _contents(folder.path, files, text, (), ModelFolderError),
        card_is_edited=card is not None and file_sha256(folder.path / CARD) != folder.config.card_sha256,
    )


def head_parcel(folder: HeadFolder, repo: str, *, license_id: str | None = None) -> Parcel:
    """A head's folder for a repository.

    Args:
        folder: the head.
        repo: ORG/NAME.
        license_id: the Hub's name of a license, for the card where the folder has none of its own.

    Raises:
        HeadError: a file looks like a secret, or there are a card and a license.
    """
    card = _read_card(folder.path, HeadError)
    if card is not None and license_id is not None:
        raise HeadError(
            f"{folder.path / CARD}: is the card, which states the license",
            argument=None,
            fix="leave `license_id` out, or remove the file to have it written anew",
        )
    text = (card or render_head_card(folder.about, folder.sha256, license_id)).replace(PLACE, repo)
    return Parcel(
        HEAD,
        f"head with {len(folder.about['classes'])} classes",
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
    """The files, the card, and what else lies in the folder."""
    contents: dict[str, Path | bytes] = dict(files)
    for file in path.rglob("*"):  # a licence, the card's pictures
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
    """What is pushed can be read by others, and stays in the repository's history."""
    if _SECRET_NAMES.fullmatch(file.name.lower()) or _SECRETS.search(content):
        raise kind(
            f"{file}: looks like a key or a password, which a push would publish; nothing was sent",
            fix="move it out of the folder",
        )
