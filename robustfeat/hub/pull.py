"""Models on the Hub: opened like any folder, their files downloaded as they are needed."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from robustfeat.errors import HubError, UnreachableError
from robustfeat.files import new_folder
from robustfeat.hub.folder import CARD, CONFIG, PREPROCESSOR, ModelFolder, refuse_code
from robustfeat.hub.remote import HubAccess, is_commit, is_revision

__all__ = ["HubFolder", "copy_folder"]


class HubFolder(ModelFolder):
    """A model folder in the cache of the Hub's libraries, at one commit.

    Opening it downloads config.json. Each other file comes when it is needed, and its sha256 is compared with
    config.json whenever it is used: with `config_hash` neither the network nor the cache has to be trusted.

    Args:
        repo: ORG/NAME.
        revision: a branch, tag or commit; None for main.
        access: which Hub, as whom.
        config_hash: as `ModelFolder` has it.
        force: download what is used anew.

    Raises:
        HubError: it cannot be downloaded.
        ModelFolderError: it is not a model folder, or holds a pickle or code.
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
            wanted = {self._find_onnx(precision) for precision in precisions}
            if "fp16" in precisions and self._find_onnx("fp16") is None:
                wanted.add(self._find_onnx("fp32"))  # from which it is made
            names = [name for name in names if name in wanted or name == PREPROCESSOR or name.startswith("golden/")]
        self.verify(names)
        if everything and self._listing is None and not (self.path / CARD).is_file() and not self.access.offline:
            self._look(self.revision)
        if everything and CARD in (self._listing or ()):
            self.access.download(self.repo, CARD, self.revision, force=self._force)

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
        """Asks the Hub what it holds, refuses a repository with a pickle or code in it, and gives the commit."""
        commit, names = self.access.look(self.repo, revision)
        if CONFIG not in names:
            raise HubError(
                f"{self.repo}: holds no {CONFIG}, so it is not a model of robustfeat",
                fix="check the name and the revision",
            )
        refuse_code(names, f"{self.repo} at {commit[:12]}")
        self._listing = names
        return commit

    def _offline(self, name: str) -> HubError:
        return HubError(
            f"{self.repo}: {name} is not in the cache, and HF_HUB_OFFLINE or local_files_only forbids downloads",
            fix=f"allow them once, or run `robustfeat pull {self.repo}` where there is a network",
        )

    def _require_files(self) -> None:
        """They come as they are needed."""


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
