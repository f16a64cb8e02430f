"""Models on the Hub: opened like any folder, their files downloaded as they are needed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from robustfeat.errors import HubError, InputError, ModelFolderError, UnreachableError
from robustfeat.files import new_file, new_folder
from robustfeat.hub.folder import CARD, CONFIG, ModelFolder, file_sha256, refuse_code
from robustfeat.hub.onnx_layout import PROCESSORS, external_names, is_complete, refuse_without_network, used_names
from robustfeat.hub.remote import HubAccess, is_commit, is_revision

__all__ = ["HubFolder", "copy_folder", "kept_list"]

_LISTS = ".robustfeat"
"""In a repository's folder of the cache: lists of hashes by commit, of models of transformers."""


class HubFolder(ModelFolder):
    """A model folder in the cache of the Hub's libraries, at one commit.

    Opening it downloads config.json. Each other file comes when it is needed, and its sha256 is compared with
    config.json whenever it is used: with `config_hash` neither the network nor the cache has to be trusted. Of a model
    of transformers, the hashes are those that the Hub tells for the commit; they are kept beside the cached files.

    Args:
        repo: ORG/NAME.
        revision: a branch, tag or commit; None for main.
        access: which Hub, as whom.
        config_hash: as `ModelFolder` has it.
        force: download what is used anew.

    Raises:
        HubError: it cannot be downloaded.
        ModelFolderError: it is not a model, or one of ours that holds a pickle or code.
    """

    revision: str
    access: HubAccess

    def __init__(
        self,
        repo: str,
        *,
        revision: str | None = None,
        access: HubAccess | None = None,
        config_hash: str | None = None,
        force: bool = False,
    ) -> None:
        self.repo, self.access = repo, access or HubAccess()
        self._force = force
        self._fetched: set[str] = set()
        self._listing: list[str] | None = None
        self._unreachable: UnreachableError | None = None
        pinned = f"`robustfeat pull {repo} --revision {revision} --force`"
        self._remedy = f"download it again with {pinned if revision else f'`robustfeat pull {repo} --force`'}"
        if revision is not None and not is_revision(revision):
            raise HubError(f"{repo}: the revision must be a branch, a tag or a commit; got {revision!r}")
        config = Path(self._open(revision))
        self.revision = config.parent.name
        super().__init__(config.parent, config_hash=config_hash)
        self.source = repo

    @property
    def asked(self) -> bool:
        """Whether the Hub said what it holds, rather than the cache."""
        return self._listing is not None

    def fetch(self, names: Sequence[str]) -> None:
        """Downloads those of the listed files that are not here."""
        absent = self.absent
        missing = [name for name in names if name in absent or (self._force and name not in self._fetched)]
        if missing and self._force and (self.access.offline or self._unreachable):
            raise HubError(
                f"{self.repo}: the Hub cannot be asked, as `force=True` needs it (what the cache holds stays)",
                fix="leave `force` out",
            )
        if missing and self.access.offline:
            raise self._offline(missing[0])
        if missing and self._unreachable:
            raise UnreachableError(f"{self._unreachable}; {missing[0]} is not in the cache either")
        if missing and self._listing is None:
            self._look(self.revision)
            if self.is_own:
                self._refuse_code()
        for name in missing:
            file = Path(self.access.download(self.repo, name, self.revision, force=self._force))
            if file != self.path / name:
                raise HubError(f"{self.repo}: {name} belongs to another commit", fix="run the same command again")
            self._fetched.add(name)

    def fetch_for_use(self, precisions: Sequence[str], *, everything: bool = False) -> None:
        """Downloads and verifies what robustfeat uses of the model, for use without a network later.

        Args:
            precisions: those whose ONNX files are wanted.
            everything: also weights for PyTorch, the card and the record of the training.
        """
        names = list(self.config.files)
        if not everything:
            networks = [name for precision in precisions if (name := self._find_onnx(precision))]
            if "fp16" in precisions and self._find_onnx("fp16") is None:
                networks.append(self._onnx_name("fp32"))  # from which it is made
            wanted = {*networks, *PROCESSORS}
            if not self.is_own:
                wanted.update(name for network in networks for name in external_names(names, network))
            names = [name for name in names if name in wanted or name.startswith("golden/")]
        self.verify(names)
        if everything and self._listing is None and not (self.path / CARD).is_file() and not self.access.offline:
            self._look(self.revision)
        if everything and CARD in (self._listing or ()):
            self.access.download(self.repo, CARD, self.revision, force=self._force)

    def names_beside(self) -> list[str]:
        """As the Hub lists them; without it, the files that are here."""
        if self._listing is None and not self.access.offline:
            with suppress(UnreachableError):
                self._look(self.revision)
        return super().names_beside() if self._listing is None else self._listing

    def read_beside(self, name: str) -> bytes:
        """Downloaded at the same commit where need be, and compared with the hash that the Hub has of large files."""
        if not (self.path / name).is_file():
            if self.access.offline:
                raise self._offline(name)
            self.access.download(self.repo, name, self.revision, force=self._force)
            told = self.access.files(self.repo, self.revision)[name].sha256
            if told and (found := file_sha256(self.path / name)) != told:
                raise ModelFolderError(
                    f"{self.path / name}: truncated (sha256 must be {told[:12]}..., got {found[:12]}...)",
                    fix=self._remedy,
                )
        return super().read_beside(name)

    def _open(self, revision: str | None) -> str:
        """The path of config.json in the cache, downloaded where need be."""
        known = self.access.cached(self.repo, CONFIG, revision)
        if known and (self.access.offline or (is_commit(revision) and not self._force)):
            return known
        if self.access.offline:
            raise self._offline(CONFIG)
        try:
            commit = self._look(revision)
        except UnreachableError as exc:
            if not known:
                raise UnreachableError(f"{exc}: the model is not in the cache, nor is there such a folder") from exc
            self._unreachable = exc
            return known
        # At the commit whose listing was seen, whatever is pushed meanwhile...
        path = self.access.download(self.repo, CONFIG, commit, force=self._force)
        if self.access.cached(self.repo, CONFIG, revision) != path:
            self.access.download(self.repo, CONFIG, revision)  # ... and so that the cache learns what the name means
        return path

    def _look(self, revision: str | None) -> str:
        """Asks the Hub what it holds, and gives the commit."""
        commit, names = self.access.look(self.repo, revision)
        if CONFIG not in names:
            raise HubError(
                f"{self.repo}: holds no {CONFIG}, so it is not a model of robustfeat",
                fix="check the name and the revision",
            )
        self._listing = names
        return commit

    def _refuse_code(self) -> None:
        refuse_code(self._listing or (), f"{self.repo} at {self.revision[:12]}")
        super()._refuse_code()

    @property
    def _place(self) -> str | Path:
        return self.repo

    def _list_files(self, data: Mapping[str, Any]) -> dict[str, str]:
        """As the Hub tells them for the commit, or told once; without both, those of the files that are here."""
        kept = kept_list(self.path)
        if not self._force and (found := _read_list(kept)):
            return found
        if self._listing is None and not self.access.offline and not self._unreachable:
            self._look(self.revision)
        if self._listing is None:
            return super()._list_files(data)
        told = self.access.files(self.repo, self.revision)
        refuse_without_network(data, told, self.repo, f"hf:{self.repo}")
        hashes = {name: told[name].sha256 or self._download_sha256(name) for name in used_names(told)}
        with suppress(OSError, InputError):  # a cache that others own
            kept.parent.mkdir(exist_ok=True)
            with new_file(kept) as partial:
                partial.write_text(json.dumps(hashes))
        return hashes

    def _download_sha256(self, name: str) -> str:
        """Of a small file, for which the Hub tells none."""
        return file_sha256(Path(self.access.download(self.repo, name, self.revision, force=self._force)))

    def _offline(self, name: str) -> HubError:
        return HubError(
            f"{self.repo}: {name} is not in the cache, and HF_HUB_OFFLINE or local_files_only forbids downloads",
            fix=f"allow them once, or run `robustfeat pull {self.repo}` where there is a network",
        )

    def _require_files(self) -> None:
        """They come as they are needed."""


def kept_list(snapshot: Path) -> Path:
    """Where the hashes of a commit's files are kept, for a model of transformers."""
    return snapshot.parent.parent / _LISTS / f"{snapshot.name}.json"


def _read_list(file: Path) -> dict[str, str]:
    """Hashes by name; none where there is no such list, or a damaged one."""
    try:
        data = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(data, dict) or set(used_names(data)) != set(data) or not is_complete(data):
        return {}
    plain = all(isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) for value in data.values())
    return data if plain else {}


def copy_folder(folder: HubFolder, out: str | Path) -> ModelFolder:
    """A folder of its own with all files of a model, each verified.

    Raises:
        HubError: a file cannot be downloaded.
        InputError: `out` exists, or cannot be written.
        ModelFolderError: a file was altered; nothing is left behind.
    """
    folder.fetch_for_use((), everything=True)
    with new_folder(out) as path:
        for name in (CONFIG, CARD, *folder.config.files):
            if name == CARD and not (folder.path / name).is_file():
                continue  # it was deleted there
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder.path / name, path / name)
        ModelFolder(path, config_hash=folder.config_hash).verify()
    return ModelFolder(out)
