"""Talks to the Hugging Face Hub and explains its errors.

All requests run inside `explaining`. The Hub's client raises its own errors, its HTTP library's (another library in
each major version) and the system's, with texts of many lines.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote, urlsplit

from robustfeat.errors import HubError, RobustFeatError, UnreachableError

__all__ = ["DatasetAccess", "HubAccess", "RemoteFile", "is_commit", "is_hub_name", "is_revision"]

NO_HOME = "the Hub's cache has no folder, since this user has no home folder"

_NAME = re.compile(r"(\w|\w[\w.-]*\w)/(\w|\w[\w.-]{,94}\w)", re.ASCII)
_BAD_REQUEST = 400
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CONTACT_S = 3.0
"""Longest wait for the Hub's list of files before the cache is used. HF_HUB_ETAG_TIMEOUT overrides it."""


def _client() -> Any:
    """The Hub's client library."""
    # Otherwise the client asks the Hub each day how to detect agents that use it.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import huggingface_hub.constants
        import huggingface_hub.file_download
    except ValueError as exc:  # raised for wrong numbers and addresses in the environment
        raise HubError(f"the Hub's client cannot start ({exc})", fix="check the environment variables HF_...") from exc
    return huggingface_hub


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a full commit hash, whose content never changes."""
    return isinstance(revision, str) and _COMMIT.fullmatch(revision) is not None


def is_hub_name(name: str) -> bool:
    """Whether a text is a valid repository name, ORG/NAME."""
    odd = ".." in name or "--" in name or name.endswith(".git")
    return _NAME.fullmatch(name) is not None and not odd


def is_revision(name: str) -> bool:
    """Whether a text is a valid name of a branch, tag or commit."""
    return re.fullmatch(r"(?![/.-])[^\s\\:?*~^\[\x00-\x20\x7f]+(?<![/.])", name) is not None and ".." not in name


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at one commit.

    Attributes:
        path: path within the repository.
        size: size in bytes.
        blob_id: git's SHA-1 of the file, or of its LFS pointer.
        sha256: sha256 of a large file's content; None for other files.
    """

    path: str
    size: int
    blob_id: str
    sha256: str | None


@dataclass(frozen=True)
class HubAccess:
    """The Hub to use, the credentials, and the cache.

    Attributes:
        token: an access token. None uses the token of `hf auth login` or HF_TOKEN; False sends none.
        cache_dir: the cache of the Hub's libraries, by default HF_HUB_CACHE.
        local_files_only: use only the cache, without network requests, as HF_HUB_OFFLINE=1 does.
        endpoint: the address of a mirror or a private Hub; by default HF_ENDPOINT or huggingface.co.
        repo_type: the type of the repositories, fixed per class.
    """

    repo_type: ClassVar[str] = "model"

    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False
    endpoint: str | None = None

    @property
    def cache(self) -> Path | None:
        """The folder of the cache; None for the default of the Hub's libraries."""
        return None if self.cache_dir is None else Path(self.cache_dir).expanduser().absolute()

    @property
    def offline(self) -> bool:
        """Whether network requests are forbidden."""
        return self.local_files_only or bool(_client().constants.HF_HUB_OFFLINE)

    @property
    def address(self) -> str:
        """The Hub's address without credentials, safe to print."""
        return _no_credentials(self._url)

    @property
    def _url(self) -> str:
        return str(self.endpoint or _client().constants.ENDPOINT).rstrip("/")

    @property
    def _token(self) -> str | bool | None:
        """The token, without a trailing newline from a file."""
        return self.token.strip() if isinstance(self.token, str) else self.token

    def api(self) -> Any:
        """The client."""
        return _client().HfApi(endpoint=self.endpoint, token=self._token, library_name="robustfeat")

    def look(self, repo: str, revision: str | None) -> tuple[str, list[str]]:
        """Finds a revision's commit and files with one request, which is not retried.

        Raises:
            UnreachableError: the Hub does not answer within seconds.
            HubError: the Hub refuses.
        """
        own = _client().constants.HF_HUB_ETAG_TIMEOUT
        with self.explaining(repo, revision):
            timeout = own if "HF_HUB_ETAG_TIMEOUT" in os.environ else _CONTACT_S
            info = self.api().repo_info(repo, repo_type=self.repo_type, revision=revision, timeout=timeout)
            names = [file.rfilename for file in info.siblings or ()]
            if not is_commit(info.sha) or not all(isinstance(name, str) for name in names):
                raise HubError(f"{self.address} does not answer like a Hub", fix="check HF_ENDPOINT")
            return info.sha, names

    def files(self, repo: str, revision: str) -> dict[str, RemoteFile]:
        """Lists a repository's files at a revision, by path.

        Raises:
            HubError: the files cannot be listed.
        """
        with self.explaining(repo, revision):
            entries = self.api().list_repo_tree(repo, recursive=True, revision=revision, repo_type=self.repo_type)
            return {
                entry.path: RemoteFile(entry.path, entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs else None)
                for entry in entries
                if hasattr(entry, "size")  # folders have no size
            }

    def reach(self) -> None:
        """Checks that the Hub answers within seconds: the client's list requests retry for half a minute.

        Call it inside `explaining`.
        """
        utils = _client().utils
        url = f"{self._url}/api/models"
        headers = utils.build_hf_headers(token=self._own_token() or False)
        utils.hf_raise_for_status(
            utils.get_session().get(url, params={"limit": 1}, headers=headers, timeout=_CONTACT_S)
        )

    def card_problems(self, repo: str, card: str) -> list[str]:
        """The Hub's complaints about a card's metadata; empty if there are none.

        Raises:
            HubError: the Hub does not answer.
        """
        utils = _client().utils
        with self.explaining(repo):
            # The client's own function always asks huggingface.co.
            response = utils.get_session().post(
                f"{self._url}/api/validate-yaml",
                json={"repoType": "model", "content": card},
                headers=utils.build_hf_headers(token=self._own_token() or False),
            )
            if response.status_code != _BAD_REQUEST:
                utils.hf_raise_for_status(response)
            return [str(error["message"]) for error in response.json()["errors"]]

    def cached(self, repo: str, name: str, revision: str | None) -> str | None:
        """The path of a cached file, or None, without network requests."""
        try:
            found = _client().try_to_load_from_cache(
                repo, name, cache_dir=self.cache, revision=revision, repo_type=self.repo_type
            )
        except (OSError, ValueError, RuntimeError):  # a damaged cache, or a user without a home folder
            return None
        return found if isinstance(found, str) and Path(found).is_file() else None

    def download(self, repo: str, name: str, revision: str | None, *, force: bool = False) -> str:
        """The path of a file in the cache, after downloading it if needed. The client resumes broken downloads.

        Raises:
            HubError: the file is not in the cache and cannot be downloaded.
        """
        with self.explaining(repo, revision, name):
            return str(
                _client().hf_hub_download(
                    repo,
                    name,
                    repo_type=self.repo_type,
                    revision=revision,
                    token=self._token,
                    cache_dir=self.cache,
                    endpoint=self.endpoint,
                    force_download=force,
                    library_name="robustfeat",
                )
            )

    def download_all(self, repo: str, names: Sequence[str], revision: str | None) -> Path:
        """The cached folder with these files of one commit, after downloading missing ones in parallel.

        Raises:
            HubError: a file is not in the cache and cannot be downloaded.
        """
        with self.explaining(repo, revision):
            folder = self._snapshot(repo, revision, [glob.escape(name) for name in names], offline=False)
            # When the Hub fails, the client accepts an incomplete folder.
            if missing := [name for name in names if not (folder / name).is_file()]:
                raise UnreachableError(
                    f"{self._subject(repo)}: {missing[0]} could not be downloaded", fix="run the same command again"
                )
            return folder

    def cached_folder(self, repo: str, revision: str | None, patterns: Sequence[str] = ()) -> Path | None:
        """The cached folder of a revision, without network requests.

        None if nothing is cached, or if the client knows that files that match `patterns` are missing.
        """
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return self._snapshot(repo, revision, patterns, offline=True)
        except (LocalEntryNotFoundError, OSError, ValueError, RuntimeError):
            return None

    def open(self, repo: str, name: str, revision: str, size: int) -> Any:
        """Opens a file on the Hub for random access. Each read is a request, and nothing is stored.

        Call this, and use the file, inside `explaining`.
        """
        filesystem = _client().HfFileSystem(endpoint=self.endpoint, token=self._token)
        kind = "datasets/" if self.repo_type == "dataset" else ""
        place = f"{kind}{repo}@{quote(revision, safe='')}/{name}"
        return filesystem.open(place, "rb", size=size, cache_type="none")

    def _snapshot(self, repo: str, revision: str | None, patterns: Sequence[str], *, offline: bool) -> Path:
        return Path(
            _client().snapshot_download(
                repo,
                repo_type=self.repo_type,
                revision=revision,
                allow_patterns=list(patterns),
                token=self._token,
                cache_dir=self.cache,
                endpoint=self.endpoint,
                local_files_only=offline,
                library_name="robustfeat",
            )
        )

    @contextmanager
    def explaining(
        self, repo: str, revision: str | None = None, name: str | None = None, *, writing: bool = False
    ) -> Iterator[None]:
        """Converts errors of the Hub's client to `HubError`: one line, with the next step and without the token.

        `writing` marks a request that changes the Hub. A refusal may then mean that the name is taken.
        """
        try:
            self._check()
            yield
        except RobustFeatError:
            raise
        except Exception as exc:
            what, fix, kind = self._meaning(exc, repo, revision, name, writing=writing)
            # Drop the cause, whose text may contain the token.
            raise kind(
                self._redact(f"{self._subject(repo)}: {what}"), fix=None if fix is None else self._redact(fix)
            ) from None

    def _subject(self, repo: str) -> str:
        return repo if self.repo_type == "model" else f"hf://{self.repo_type}s/{repo}"

    def _check(self) -> None:
        """Refuses an unusable address or token, which would otherwise look like a network error."""
        parts = urlsplit(self._url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise HubError(
                f"HF_ENDPOINT or endpoint: {_no_credentials(parts.geturl())!r} is not an address",
                fix="pass one such as https://huggingface.co",
            )
        token = self._own_token()
        if token and not (token.isascii() and token.isprintable() and " " not in token):
            raise HubError(
                "HF_TOKEN or token: contains characters that no token has", fix="run hf auth login, or copy it again"
            )

    def _own_token(self) -> str | None:
        if self.token is False:
            return None
        own = self.token if isinstance(self.token, str) else _client().get_token()
        return own.strip() if own else None

    def _meaning(
        self, exc: Exception, repo: str, revision: str | None, name: str | None, *, writing: bool
    ) -> tuple[str, str | None, type[HubError]]:
        """Explains an error: the message, the fix, and the class to raise."""
        from huggingface_hub import errors

        cause: BaseException | None = exc
        # These two errors say what the client tried instead. Their cause says why.
        if isinstance(exc, errors.LocalEntryNotFoundError) or "Force download failed" in str(exc):
            cause = exc.__cause__ or exc
        gate = f"ask for it at {self.address}/{repo}"
        if self.repo_type != "model":
            gate = f"accept its terms at {self.address}/{self.repo_type}s/{repo}"
        meanings = {  # subclasses before their bases
            errors.OfflineModeIsEnabled: ("HF_HUB_OFFLINE forbids requests to the Hub", "unset it"),
            errors.LocalTokenNotFoundError: ("needs a token", "run hf auth login, or set HF_TOKEN"),
            errors.GatedRepoError: ("access is gated", f"{gate}, then run hf auth login"),
            errors.RevisionNotFoundError: (
                f"has no revision {revision!r}",
                "check the branch, tag or commit (a commit has 40 digits)",
            ),
            errors.RepositoryNotFoundError: (
                f"no such {self.repo_type} at {self.address}"
                f"{', and no such folder here' if self.repo_type == 'model' else ''}",
                "check the name; if it is private, log in (hf auth login) with a token that may read it",
            ),
            errors.RemoteEntryNotFoundError: (
                f"holds no {name}"
                f"{', so it is not a model or head, or is incomplete' if self.repo_type == 'model' else ''}",
                "check the name and the revision",
            ),
        }
        for kind, (what, fix) in meanings.items():
            if isinstance(cause, kind):
                known = self._revisions(repo) if kind is errors.RevisionNotFoundError else ""
                return what + known, fix, HubError
        if isinstance(cause, errors.HfHubHTTPError) and cause.response is not None:
            return self._status(cause.response.status_code, _said(cause), writing=writing)
        (transport,) = (base for base in errors.HfHubHTTPError.__bases__ if base.__module__.startswith("httpx"))
        if isinstance(cause, (transport, ConnectionError, TimeoutError)):
            reason = f"{type(cause).__name__}: {_said(cause)}"
            return f"{self.address} cannot be reached ({reason})", "check the network and HF_ENDPOINT", UnreachableError
        if isinstance(cause, json.JSONDecodeError):
            return (
                f"{self.address} does not answer like a Hub",
                "check the network and HF_ENDPOINT",
                UnreachableError,
            )
        return *self._local_trouble(cause), HubError

    def _local_trouble(self, cause: BaseException | None) -> tuple[str, str]:
        """Explains an error that does not come from the Hub: the message and the fix."""
        if isinstance(cause, OSError) and cause.errno is not None:
            place = cause.filename or "a file of the cache or the network"
            return f"{place}: {cause.strerror}", "check the disk, HF_HOME and HF_HUB_CACHE"
        if isinstance(cause, RuntimeError) and "home directory" in str(cause):
            return NO_HOME, "set HF_HOME to a writable folder"
        return f"{_said(cause)} ({type(cause).__name__})", f"if it stays, delete this {self.repo_type} from the cache"

    def _status(self, status: int, said: str, *, writing: bool) -> tuple[str, str | None, type[HubError]]:
        if status == 429 or status >= 500:
            return f"{self.address} fails or limits requests ({said})", "try again later", UnreachableError
        log_in = "log in (hf auth login) with a token that may"
        meanings: dict[int, tuple[str, str]] = {
            401: (f"{self.address} refuses the token", "run hf auth login, or set HF_TOKEN to a valid one"),
            403: (
                f"the name belongs to somebody else, or the token may not do this ({said})",
                f"choose another name, or {log_in}",
            )
            if writing
            else (f"{self.address} forbids it ({said})", log_in),
            409: (f"the name is taken ({said})", "choose another"),
            412: ("somebody else changed it in the meantime", "run the same command again"),
        }
        what, fix = meanings.get(status, (f"{self.address} refuses ({said})", None))
        return what, fix, HubError

    def _revisions(self, repo: str) -> str:
        with suppress(Exception):  # the list is only an aid in an error message
            refs = self.api().list_repo_refs(repo, repo_type=self.repo_type)
            names = [ref.name for ref in (*refs.branches, *refs.tags)]
            return f"; it has {', '.join(names[:8])}{' and more' if len(names) > 8 else ''}"
        return ""

    def _redact(self, text: str) -> str:
        own = self._own_token()
        return _no_credentials(text.replace(own, "<token>") if own else text)


class DatasetAccess(HubAccess):
    """`HubAccess` for repositories of datasets."""

    repo_type = "dataset"


def _no_credentials(text: str) -> str:
    """Removes user names and passwords from addresses in a text."""
    return re.sub(r"(?<=//)[^/@\s]+@", "", text)


def _said(exc: BaseException | None) -> str:
    message = getattr(exc, "server_message", None) or str(exc) or type(exc).__name__
    return " ".join(message.split())[:300]
