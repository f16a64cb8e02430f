"""Opens models on the Hub like local folders, and downloads their files on demand."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from robustfeat.errors import InputError, ModelFolderError, UnreachableError
from robustfeat.files import new_file, new_folder
from robustfeat.hub.folder import CARD, CONFIG, ModelFolder, file_sha256, refuse_code
from robustfeat.hub.onnx_layout import PROCESSORS, external_names, is_complete, refuse_without_network, used_names
from robustfeat.hub.remote import HubAccess
from robustfeat.hub.snapshot import Snapshot

__all__ = ["HubFolder", "copy_folder", "kept_list"]

_LISTS = ".robustfeat"
"""Folder in a repository's cache with the hashes of transformers models, by commit."""


class HubFolder(ModelFolder):
    """A model folder in the cache of the Hub's libraries, at one commit.

    Files except config.json are downloaded on demand. Every use compares a file's sha256 with config.json, so with
    `config_hash` neither the network nor the cache has to be trusted. For a transformers model, the hashes come from
    the Hub's list for the commit, and are kept beside the cached files.

    Args:
        snapshot: the repository.
        config_hash: see `ModelFolder`.

    Raises:
        HubError: the model cannot be downloaded.
        ModelFolderError: the repository is not a model, or is robustfeat's and contains a pickle or code.
    """

    revision: str
    access: HubAccess

    def __init__(self, snapshot: Snapshot, *, config_hash: str | None = None) -> None:
        self.snapshot, self.repo, self.access = snapshot, snapshot.repo, snapshot.access
        self.revision, self._remedy = snapshot.revision, snapshot.remedy
        super().__init__(snapshot.path, config_hash=config_hash)
        self.source = snapshot.repo

    @property
    def asked(self) -> bool:
        """Whether the list of files comes from the Hub rather than from the cache."""
        return self.snapshot.listing is not None

    def fetch(self, names: Sequence[str]) -> None:
        """Downloads the missing ones of the listed files."""
        was_asked = self.asked
        missing = self.snapshot.missing(names)
        if missing and not was_asked and self.is_own:
            self._refuse_code()
        self.snapshot.download(missing)

    def fetch_for_use(self, precisions: Sequence[str], *, everything: bool = False) -> None:
        """Downloads and verifies the files that robustfeat uses, for later use without a network.

        Args:
            precisions: the precisions of the ONNX files.
            everything: also download the PyTorch weights, the card and training.json.
        """
        names = list(self.config.files)
        if not everything:
            networks = [name for precision in precisions if (name := self._find_onnx(precision))]
            if "fp16" in precisions and self._find_onnx("fp16") is None:
                networks.append(self._onnx_name("fp32"))  # fp16 is converted from it
            wanted = {*networks, *PROCESSORS}
            if not self.is_own:
                wanted.update(name for network in networks for name in external_names(names, network))
            names = [name for name in names if name in wanted or name.startswith("golden/")]
        self.verify(names)
        if everything and not self.asked and not (self.path / CARD).is_file() and not self.access.offline:
            self.snapshot.look()
        if everything and CARD in (self.snapshot.listing or ()):
            self.snapshot.download([CARD])

    def names_beside(self) -> list[str]:
        """Names as the Hub lists them, or offline the names of the cached files."""
        if not self.asked and not self.access.offline:
            with suppress(UnreachableError):
                self.snapshot.look()
        return self.snapshot.listing or super().names_beside()

    def read_beside(self, name: str) -> bytes:
        """Reads a file of the same commit, downloads it if needed, and compares the hash with the Hub's.

        A file with another hash is downloaded once more.
        """
        kept = kept_list(self.path).with_suffix(".beside.json")
        told = _read_hashes(kept)
        self.snapshot.fetch([name])
        if name not in told and self.snapshot.reachable:
            files = self.access.files(self.repo, self.revision)
            told[name] = files[name].sha256 or files[name].blob_id
            _write_hashes(kept, told)
        expected = told.get(name)  # offline, without a hash from the Hub, the cache is trusted
        content = super().read_beside(name)
        if expected and not _has_hash(content, expected) and self.snapshot.reachable:
            self.access.download(self.repo, name, self.revision, force=True)
            content = super().read_beside(name)
        if expected and not _has_hash(content, expected):
            raise ModelFolderError(
                f"{self.path / name}: altered or truncated (the Hub's hash is {expected[:12]}...)",
                fix="run the same command again when the Hub can be reached",
            )
        return content

    def _refuse_code(self) -> None:
        refuse_code(self.snapshot.listing or (), f"{self.repo} at {self.revision[:12]}")
        super()._refuse_code()

    @property
    def _place(self) -> str | Path:
        return self.repo

    def _list_files(self, data: Mapping[str, Any]) -> dict[str, str]:
        """Hashes from the Hub for the commit, from now or earlier. Without any, of the cached files."""
        kept = kept_list(self.path)
        if not self.snapshot.forced and (found := _read_list(kept)):
            return found
        if not self.asked and self.snapshot.reachable:
            self.snapshot.look()
        if not self.asked:
            return super()._list_files(data)
        told = self.access.files(self.repo, self.revision)
        refuse_without_network(data, told, self.repo, f"hf:{self.repo}")
        hashes = {name: told[name].sha256 or self._download_sha256(name) for name in used_names(told)}
        _write_hashes(kept, hashes)
        return hashes

    def _download_sha256(self, name: str) -> str:
        """The sha256 of a small file, which the Hub does not list."""
        self.snapshot.download([name])
        return file_sha256(self.path / name)

    def _require_files(self) -> None:
        """Accepts missing files, which are downloaded on demand."""


def kept_list(snapshot: Path) -> Path:
    """The file with the hashes of a commit, for a transformers model."""
    return snapshot.parent.parent / _LISTS / f"{snapshot.name}.json"


def _read_list(file: Path) -> dict[str, str]:
    """The sha256 of a model's files by name; empty if the list is missing or damaged."""
    data = _read_hashes(file)
    if set(used_names(data)) != set(data) or not is_complete(data):
        return {}
    return data if all(len(value) == 64 for value in data.values()) else {}


def _read_hashes(file: Path) -> dict[str, str]:
    """Hashes by name; empty if the list is missing or damaged."""
    try:
        data = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    values = data.values() if isinstance(data, dict) else [None]
    plain = all(isinstance(value, str) and re.fullmatch("[0-9a-f]{40}([0-9a-f]{24})?", value) for value in values)
    return data if plain else {}


def _has_hash(content: bytes, expected: str) -> bool:
    """Whether a content has the given sha256, or the given SHA-1 of git."""
    of_git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return expected in {hashlib.sha256(content).hexdigest(), of_git.hexdigest()}


def _write_hashes(file: Path, hashes: Mapping[str, str]) -> None:
    with suppress(OSError, InputError):  # the cache may belong to another user
        file.parent.mkdir(exist_ok=True)
        with new_file(file) as partial:
            partial.write_text(json.dumps(hashes))


def copy_folder(folder: HubFolder, out: str | Path) -> ModelFolder:
    """Copies all files of a model to a new folder, and verifies each.

    Raises:
        HubError: a file cannot be downloaded.
        InputError: `out` exists or cannot be written.
        ModelFolderError: a file was altered. The new folder is then removed.
    """
    folder.fetch_for_use((), everything=True)
    with new_folder(out) as path:
        for name in (CONFIG, CARD, *folder.config.files):
            if name == CARD and not (folder.path / name).is_file():
                continue  # the file was deleted on the Hub
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder.path / name, path / name)
        ModelFolder(path, config_hash=folder.config_hash).verify()
    return ModelFolder(out)
