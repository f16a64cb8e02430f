"""A repository of the Hub in the cache, at one commit; its files come as they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from robustfeat.errors import HubError, UnreachableError
from robustfeat.hub.remote import HubAccess, is_commit, is_revision

__all__ = ["KINDS", "Snapshot"]

KINDS = {"config.json": "model", "head.json": "head"}
"""What a repository holds, by the file that describes it and pins the others."""


class Snapshot:
    """A repository in the cache of the Hub's libraries, at one commit.

    Opening it downloads the file that describes its content. The Hub is asked at most once what it holds.

    Args:
        repo: ORG/NAME.
        kinds: the kinds of content that will do, by the names in `KINDS`.
        revision: a branch, tag or commit; None for main.
        access: which Hub, as whom.
        force: download what is used anew.

    Attributes:
        repo, access: as above.
        key: the file that describes the content.
        path: the folder in the cache.
        revision: the commit.
        remedy: how a damaged file is replaced, for messages.
        listing: the files that the Hub says are there; None where it was not asked.

    Raises:
        HubError: it cannot be downloaded, or holds something else.
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
        """Whether files are downloaded anew."""
        return self._force

    @property
    def reachable(self) -> bool:
        """Whether the Hub may be asked, and has answered so far."""
        return not (self.access.offline or self._unreachable)

    def missing(self, names: Sequence[str]) -> list[str]:
        """Those of the files that have to be downloaded; the Hub is asked what it holds before any is.

        Raises:
            HubError: there are some, and the Hub cannot be asked.
        """
        missing = [
            name for name in names if not (self.path / name).is_file() or (self._force and name not in self._fetched)
        ]
        if missing and self._force and not self.reachable:
            raise HubError(
                f"{self.repo}: the Hub cannot be asked, as `force=True` needs it (what the cache holds stays)",
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
            HubError: one cannot be downloaded.
        """
        for name in names:
            file = Path(self.access.download(self.repo, name, self.revision, force=self._force))
            if file != self.path / name:
                raise HubError(f"{self.repo}: {name} belongs to another commit", fix="run the same command again")
            self._fetched.add(name)

    def fetch(self, names: Sequence[str]) -> None:
        """Sees to it that these files are here.

        Raises:
            HubError: one cannot be downloaded.
        """
        self.download(self.missing(names))

    def look(self) -> None:
        """Asks the Hub what it holds at this commit."""
        self._look(self.revision)

    def _open(self, revision: str | None) -> str:
        """The path of the describing file in the cache, downloaded where need be."""
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
                raise UnreachableError(f"{exc}: the {what} is not in the cache, nor is there such a folder") from exc
            self._unreachable = exc
            return known
        # At the commit whose listing was seen, whatever is pushed meanwhile...
        path = self.access.download(self.repo, key, commit, force=self._force)
        if self.access.cached(self.repo, key, revision) != path:
            self.access.download(self.repo, key, revision)  # ... and so that the cache learns what the name means
        return path

    def _look(self, revision: str | None) -> tuple[str, str]:
        """Asks the Hub what it holds, and gives the commit and the describing file."""
        commit, names = self.access.look(self.repo, revision)
        key = next((key for key in self._keys if key in names), None)
        if key is None:
            wanted = " or ".join(KINDS[key] for key in self._keys)
            other = next((key for key in KINDS if key in names), None)
            if other:
                raise HubError(f"{self.repo}: is a {KINDS[other]} ({other}); expected a {wanted}", fix="check the name")
            raise HubError(
                f"{self.repo}: holds no {' or '.join(self._keys)}, so it is not a {wanted} of robustfeat",
                fix="check the name and the revision",
            )
        self.listing = names
        return commit, key

    def _offline(self, name: str) -> HubError:
        return HubError(
            f"{self.repo}: {name} is not in the cache, and HF_HUB_OFFLINE or local_files_only forbids downloads",
            fix=f"allow them once, or run `robustfeat pull {self.repo}` where there is a network",
        )
