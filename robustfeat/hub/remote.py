"""The Hugging Face Hub: its names and files, and what its errors mean.

Everything that speaks to the Hub does so inside `explaining`: its client raises its own errors, those of its HTTP
library (another one in each major version) and the system's, and their texts run over many lines.
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

NO_HOME = "the Hub's cache has no place, since this user has no home folder"

_NAME = re.compile(r"(\w|\w[\w.-]*\w)/(\w|\w[\w.-]{,94}\w)", re.ASCII)
_BAD_REQUEST = 400
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CONTACT_S = 3.0
"""How long the Hub may take to say what it has, before the cache answers; HF_HUB_ETAG_TIMEOUT overrides it."""


def _client() -> Any:
    """The Hub's client library."""
    # Or it asks the Hub, before the first call of a day, how to recognise who is using it.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import huggingface_hub.constants
        import huggingface_hub.file_download
    except ValueError as exc:  # it reads numbers and addresses from the environment
        raise HubError(
            f"the Hub's client cannot start ({exc})", fix="check the variables HF_... of the environment"
        ) from exc
    return huggingface_hub


def is_commit(revision: str | None) -> bool:
    """Whether this is a commit's full hash, whose content never changes."""
    return isinstance(revision, str) and _COMMIT.fullmatch(revision) is not None


def is_hub_name(name: str) -> bool:
    """Whether this can be the name of a repository: ORG/NAME."""
    odd = ".." in name or "--" in name or name.endswith(".git")
    return _NAME.fullmatch(name) is not None and not odd


def is_revision(name: str) -> bool:
    """Whether this can be the name of a branch, tag or commit."""
    return re.fullmatch(r"(?![/.-])[^\s\\:?*~^\[\x00-\x20\x7f]+(?<![/.])", name) is not None and ".." not in name


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at one commit.

    Attributes:
        path: within the repository.
        size: in bytes.
        blob_id: git's SHA-1 of it, or of its pointer.
        sha256: of its content, where it is a large file; None else.
    """

    path: str
    size: int
    blob_id: str
    sha256: str | None


@dataclass(frozen=True)
class HubAccess:
    """Which Hub is asked, as whom, and where downloads are kept.

    Attributes:
        token: None takes that of `hf auth login` or HF_TOKEN; False sends none.
        cache_dir: of the Hub's libraries; by default their own (HF_HUB_CACHE).
        local_files_only: answer from the cache alone, without a network call; HF_HUB_OFFLINE=1 does so, too.
        endpoint: of a mirror or a private Hub; by default HF_ENDPOINT, or huggingface.co.
        repo_type: what the repositories hold; a kind of access, not a setting.
    """

    repo_type: ClassVar[str] = "model"

    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False
    endpoint: str | None = None

    @property
    def cache(self) -> Path | None:
        """Where downloads are kept; None for the Hub's libraries' own place."""
        return None if self.cache_dir is None else Path(self.cache_dir).expanduser().absolute()

    @property
    def offline(self) -> bool:
        """Whether network calls are forbidden."""
        return self.local_files_only or bool(_client().constants.HF_HUB_OFFLINE)

    @property
    def address(self) -> str:
        """Of the Hub, without credentials: what may be printed."""
        return _no_credentials(self._url)

    @property
    def _url(self) -> str:
        return str(self.endpoint or _client().constants.ENDPOINT).rstrip("/")

    @property
    def _token(self) -> str | bool | None:
        """As the client takes it: a file's last line end is no part of a token."""
        return self.token.strip() if isinstance(self.token, str) else self.token

    def api(self) -> Any:
        """The client."""
        return _client().HfApi(endpoint=self.endpoint, token=self._token, library_name="robustfeat")

    def look(self, repo: str, revision: str | None) -> tuple[str, list[str]]:
        """The commit that a revision names, and the files there: one call, which is not repeated when it fails.

        Raises:
            UnreachableError: there is no answer within seconds.
            HubError: the Hub refuses.
        """
        own = _client().constants.HF_HUB_ETAG_TIMEOUT
        with self.explaining(repo, revision):
            timeout = own if "HF_HUB_ETAG_TIMEOUT" in os.environ else _CONTACT_S
            info = self.api().repo_info(repo, repo_type=self.repo_type, revision=revision, timeout=timeout)
            names = [file.rfilename for file in info.siblings or ()]
            if not is_commit(info.sha) or not all(isinstance(name, str) for name in names):
                raise HubError(f"{self.address} does not answer as a Hub does", fix="check HF_ENDPOINT")
            return info.sha, names

    def files(self, repo: str, revision: str) -> dict[str, RemoteFile]:
        """What a repository holds at a revision, by path.

        Raises:
            HubError: it cannot be listed.
        """
        with self.explaining(repo, revision):
            entries = self.api().list_repo_tree(repo, recursive=True, revision=revision, repo_type=self.repo_type)
            return {
                entry.path: RemoteFile(entry.path, entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs else None)
                for entry in entries
                if hasattr(entry, "size")  # folders have none
            }

    def reach(self) -> None:
        """Asks for an answer within seconds; inside `explaining`. What lists things tries again for half a minute."""
        utils = _client().utils
        url = f"{self._url}/api/models"
        headers = utils.build_hf_headers(token=self._own_token() or False)
        utils.hf_raise_for_status(
            utils.get_session().get(url, params={"limit": 1}, headers=headers, timeout=_CONTACT_S)
        )

    def card_problems(self, repo: str, card: str) -> list[str]:
        """What the Hub has against a card's metadata; empty if nothing.

        Raises:
            HubError: it does not say.
        """
        utils = _client().utils
        with self.explaining(repo):
            # The client's own function asks huggingface.co, whatever Hub is meant.
            response = utils.get_session().post(
                f"{self._url}/api/validate-yaml",
                json={"repoType": "model", "content": card},
                headers=utils.build_hf_headers(token=self._own_token() or False),
            )
            if response.status_code != _BAD_REQUEST:
                utils.hf_raise_for_status(response)
            return [str(error["message"]) for error in response.json()["errors"]]

    def cached(self, repo: str, name: str, revision: str | None) -> str | None:
        """The path of a file in the cache, if it is there; nothing is asked of the network."""
        try:
            found = _client().try_to_load_from_cache(
                repo, name, cache_dir=self.cache, revision=revision, repo_type=self.repo_type
            )
        except (OSError, ValueError, RuntimeError):  # a damaged cache has nothing, nor has a user without a home
            return None
        return found if isinstance(found, str) and Path(found).is_file() else None

    def download(self, repo: str, name: str, revision: str | None, *, force: bool = False) -> str:
        """The path of a file in the cache, downloaded where need be; the client tries again when it is cut off.

        Raises:
            HubError: it is not in the cache and cannot be downloaded.
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
        """The folder in the cache with these files at one commit, downloaded where need be, several at once.

        Raises:
            HubError: one is not in the cache and cannot be downloaded.
        """
        with self.explaining(repo, revision):
            folder = self._snapshot(repo, revision, [glob.escape(name) for name in names], offline=False)
            # When the Hub fails, the client is content with what there is.
            if missing := [name for name in names if not (folder / name).is_file()]:
                raise UnreachableError(
                    f"{self._subject(repo)}: {missing[0]} could not be downloaded", fix="run the same command again"
                )
            return folder

    def cached_folder(self, repo: str, revision: str | None, patterns: Sequence[str] = ()) -> Path | None:
        """The folder in the cache with what was downloaded of a revision; None where there is none.

        None, too, where files that match `patterns` are known to the client and not there; nothing is asked of the
        network.
        """
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return self._snapshot(repo, revision, patterns, offline=True)
        except (LocalEntryNotFoundError, OSError, ValueError, RuntimeError):
            return None

    def open(self, repo: str, name: str, revision: str, size: int) -> Any:
        """A file of the Hub, opened for reading at random: each read is a request, and nothing is kept.

        Inside `explaining`, as what is done with it has to be.
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
        """Makes every error of the Hub's client a `HubError`: one line, with the next step and without the token.

        `writing` says that something is to be changed there: then a refusal may mean that the name is taken.
        """
        try:
            self._check()
            yield
        except RobustFeatError:
            raise
        except Exception as exc:
            what, fix, kind = self._meaning(exc, repo, revision, name, writing=writing)
            # Without its cause, whose text may hold the token.
            raise kind(
                self._redact(f"{self._subject(repo)}: {what}"), fix=None if fix is None else self._redact(fix)
            ) from None

    def _subject(self, repo: str) -> str:
        return repo if self.repo_type == "model" else f"hf://{self.repo_type}s/{repo}"

    def _check(self) -> None:
        """Refuses an address and a token that nothing can be sent to or with: the network is not to blame."""
        parts = urlsplit(self._url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise HubError(
                f"HF_ENDPOINT or endpoint: {_no_credentials(parts.geturl())!r} is not an address",
                fix="pass one such as https://huggingface.co",
            )
        token = self._own_token()
        if token and not (token.isascii() and token.isprintable() and " " not in token):
            raise HubError(
                "HF_TOKEN or token: holds characters that no token has", fix="run hf auth login, or copy it again"
            )

    def _own_token(self) -> str | None:
        if self.token is False:
            return None
        own = self.token if isinstance(self.token, str) else _client().get_token()
        return own.strip() if own else None

    def _meaning(
        self, exc: Exception, repo: str, revision: str | None, name: str | None, *, writing: bool
    ) -> tuple[str, str | None, type[HubError]]:
        """What it means, what to do about it, and the class of our error."""
        from huggingface_hub import errors

        cause: BaseException | None = exc
        # What the client tried instead is said by these two, and why it had to by their cause.
        if isinstance(exc, errors.LocalEntryNotFoundError) or "Force download failed" in str(exc):
            cause = exc.__cause__ or exc
        gate = f"ask for it at {self.address}/{repo}"
        if self.repo_type != "model":
            gate = f"accept its terms at {self.address}/{self.repo_type}s/{repo}"
        meanings = {  # subclasses before their bases
            errors.OfflineModeIsEnabled: ("HF_HUB_OFFLINE forbids asking the Hub", "unset it"),
            errors.LocalTokenNotFoundError: ("needs a token", "run hf auth login, or set HF_TOKEN"),
            errors.GatedRepoError: ("access is gated", f"{gate}, then run hf auth login"),
            errors.RevisionNotFoundError: (
                f"has no revision {revision!r}",
                "check the branch, tag or commit (a commit has 40 digits)",
            ),
            errors.RepositoryNotFoundError: (
                f"no such {self.repo_type} at {self.address}"
                f"{', and no such folder here' if self.repo_type == 'model' else ''}",
                "check the name, or, if it is private, log in (hf auth login) with a token that may read it",
            ),
            errors.RemoteEntryNotFoundError: (
                f"holds no {name}"
                f"{', so it is no model or head, or an incomplete one' if self.repo_type == 'model' else ''}",
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
                f"{self.address} does not answer as a Hub does",
                "check the network and HF_ENDPOINT",
                UnreachableError,
            )
        return *self._local_trouble(cause), HubError

    def _local_trouble(self, cause: BaseException | None) -> tuple[str, str]:
        """What an error means that does not come from the Hub, and what to do about it."""
        if isinstance(cause, OSError) and cause.errno is not None:
            place = cause.filename or "a file of the cache or the network"
            return f"{place}: {cause.strerror}", "check the disk, HF_HOME and HF_HUB_CACHE"
        if isinstance(cause, RuntimeError) and "home directory" in str(cause):
            return NO_HOME, "set HF_HOME to a folder that can be written"
        return f"{_said(cause)} ({type(cause).__name__})", f"if it stays, delete this {self.repo_type} from the cache"

    def _status(self, status: int, said: str, *, writing: bool) -> tuple[str, str | None, type[HubError]]:
        if status == 429 or status >= 500:
            return f"{self.address} fails or is asked too often ({said})", "try again later", UnreachableError
        log_in = "log in (hf auth login) with a token that may"
        meanings: dict[int, tuple[str, str]] = {
            401: (f"{self.address} refuses the token", "run hf auth login, or set HF_TOKEN to a valid one"),
            403: (
                f"the name is taken by somebody else, or the token may not do this ({said})",
                f"choose another name, or {log_in}",
            )
            if writing
            else (f"{self.address} forbids it ({said})", log_in),
            409: (f"the name is taken ({said})", "choose another"),
            412: ("was changed meanwhile by somebody else", "run the same command again"),
        }
        what, fix = meanings.get(status, (f"{self.address} refuses ({said})", None))
        return what, fix, HubError

    def _revisions(self, repo: str) -> str:
        with suppress(Exception):  # a hint
            refs = self.api().list_repo_refs(repo, repo_type=self.repo_type)
            names = [ref.name for ref in (*refs.branches, *refs.tags)]
            return f"; it has {', '.join(names[:8])}{' and more' if len(names) > 8 else ''}"
        return ""

    def _redact(self, text: str) -> str:
        own = self._own_token()
        return _no_credentials(text.replace(own, "<token>") if own else text)


class DatasetAccess(HubAccess):
    """The same for repositories of datasets."""

    repo_type = "dataset"


def _no_credentials(text: str) -> str:
    """Without the user and password that addresses in it may hold."""
    return re.sub(r"(?<=//)[^/@\s]+@", "", text)


def _said(exc: BaseException | None) -> str:
    message = getattr(exc, "server_message", None) or str(exc) or type(exc).__name__
    return " ".join(message.split())[:300]
