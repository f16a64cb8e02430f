"""A Hub repository in the cache, at one commit, whose files are downloaded on demand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from robustfeat.errors import HubError, UnreachableError
from robustfeat.hub.remote import HubAccess, is_commit, is_revision

__all__ = ["KINDS", "Snapshot"]

KINDS = {"config.json": "model", "head.json": "head"}
"""Kinds of content, by the file that describes it and pins the others."""


class Snapshot:
    """A repository in the cache of the Hub's libraries, at one commit.

    Opening it downloads the file that describes its content. It requests the Hub's list of files at most once.

    Args:
        repo: ORG/NAME.
        kinds: the accepted kinds of content, keys of `KINDS`.
        revision: a branch, tag or commit; None for main.
        access: the Hub to use, and the credentials.
        force: download cached files again.

    Attributes:
        repo, access: see Args.
        key: the file that describes the content.
        path: the folder in the cache.
        revision: the commit.
        remedy: how to replace a damaged file, for messages.
        listing: the Hub's list of files; None if it was not requested.

    Raises:
        HubError: the repository cannot be downloaded or has another kind of content.
    """

    def __init__(
        self,
        repo: str,
        *kinds: str,
        revision: str | None = None,
        access: HubAccess | None = None,
        force: bool = False,
    ) -> None:
        self.repo, self.access = repo, access or HubAccess()
        self._keys, self._force = kinds, force
        self._fetched: set[str] = set()
        self.listing: list[str] | None = None
        self._unreachable: UnreachableError | None = None
        pinned = f"`robustfeat pull {repo} --revision {revision} --force`"
        self.remedy = f"download it again with {pinned if revision else f'`robustfeat pull {repo} --force`'}"
        if revision is not None and not is_revision(revision):
            raise HubError(f"{repo}: the revision must be a branch, a tag or a commit; got {revision!r}")
        file = Path(self._open(revision))
        self.key, self.path, self.revision = file.name, file.parent, file.parent.name

    @property
    def forced(self) -> bool:
        """Whether cached files are downloaded again."""
        return self._force

    @property
    def reachable(self) -> bool:
        """Whether requests to the Hub are allowed and none has failed so far."""
        return not (self.access.offline or self._unreachable)

    def missing(self, names: Sequence[str]) -> list[str]:
        """The files that have to be downloaded, after requesting the Hub's list of files.

        Raises:
            HubError: files are missing and the Hub cannot be reached.
        """
        missing = [
            name for name in names if not (self.path / name).is_file() or (self._force and name not in self._fetched)
        ]
        if missing and self._force and not self.reachable:
            raise HubError(
                f"{self.repo}: `force=True` needs the Hub, which cannot be reached (the cache is unchanged)",
                fix="leave `force` out",
            )
        if missing and self.access.offline:
            raise self._offline(missing[0])
        if missing and self._unreachable:
            raise UnreachableError(f"{self._unreachable}; {missing[0]} is not in the cache either")
        if missing and self.listing is None:
            self.look()
        return missing

    def download(self, names: Sequence[str]) -> None:
        """Downloads files of this commit.

        Raises:
            HubError: a file cannot be downloaded.
        """
        for name in names:
            file = Path(self.access.download(self.repo, name, self.revision, force=self._force))
            if file != self.path / name:
                raise HubError(f"{self.repo}: {name} belongs to another commit", fix="run the same command again")
            self._fetched.add(name)

    def fetch(self, names: Sequence[str]) -> None:
        """Downloads missing files.

        Raises:
            HubError: a file cannot be downloaded.
        """
        self.download(self.missing(names))

    def look(self) -> None:
        """Requests the Hub's list of files at this commit."""
        self._look(self.revision)

    def _open(self, revision: str | None) -> str:
        """The path of the describing file in the cache, after downloading it if needed."""
        held = (self.access.cached(self.repo, key, revision) for key in self._keys)
        known = next((path for path in held if path), None)
        if known and (self.access.offline or (is_commit(revision) and not self._force)):
            return known
        if self.access.offline:
            raise self._offline(self._keys[0])
        try:
            commit, key = self._look(revision)
        except UnreachableError as exc:
            if not known:
                what = " or ".join(KINDS[key] for key in self._keys)
                raise UnreachableError(f"{exc}: the {what} is neither in the cache nor a folder") from exc
            self._unreachable = exc
            return known
        # Download at the commit of the list, even if somebody pushes in the meantime ...
        path = self.access.download(self.repo, key, commit, force=self._force)
        if self.access.cached(self.repo, key, revision) != path:
            self.access.download(self.repo, key, revision)  # ... and again by name, so the cache learns its commit
        return path

    def _look(self, revision: str | None) -> tuple[str, str]:
        """Requests the Hub's list of files; returns the commit and the describing file."""
        commit, names = self.access.look(self.repo, revision)
        key = next((key for key in self._keys if key in names), None)
        if key is None:
            wanted = " or ".join(KINDS[key] for key in self._keys)
            other = next((key for key in KINDS if key in names), None)
            if other:
                raise HubError(f"{self.repo}: is a {KINDS[other]} ({other}); expected a {wanted}", fix="check the name")
            raise HubError(
                f"{self.repo}: has no {' or '.join(self._keys)}, so it is not a {wanted} of robustfeat",
                fix="check the name and the revision",
            )
        self.listing = names
        return commit, key

    def _offline(self, name: str) -> HubError:
        return HubError(
            f"{self.repo}: {name} is not in the cache, and HF_HUB_OFFLINE or local_files_only forbids downloads",
            fix=f"allow them once, or run `robustfeat pull {self.repo}` with a network",
        )
