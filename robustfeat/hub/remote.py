"""The Hugging Face Hub: its names and files, and what its errors mean.

Everything that speaks to the Hub does so inside `explaining`: its client raises its own errors, those of its HTTP
library (another one in each major version) and the system's, and their texts run over many lines.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from robustfeat.errors import HubError, RobustFeatError

__all__ = ["HubAccess", "RemoteFile", "UnreachableError", "is_hub_name"]

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CONTACT_S = 3.0
"""How long the Hub may take to say what it has, before the cache answers; HF_HUB_ETAG_TIMEOUT overrides it."""


def _client() -> Any:
    """The Hub's client library."""
    # Or it asks the Hub, before the first call of a day, how to recognise who is using it.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import huggingface_hub.constants

    return huggingface_hub


class UnreachableError(HubError):
    """The Hub gives no answer, or fails: what the cache holds is the best there is."""


def is_commit(revision: str | None) -> bool:
    """Whether this is a commit's full hash, whose content never changes."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def is_hub_name(name: str) -> bool:
    """Whether this can be the name of a repository: ORG/NAME."""
    return _NAME.fullmatch(name) is not None and not name.endswith((".", "/", ".git")) and ".." not in name


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
    """

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
        parts = urlsplit(self.endpoint or _client().constants.ENDPOINT)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))

    def api(self) -> Any:
        """The client."""
        return _client().HfApi(endpoint=self.endpoint, token=self.token, library_name="robustfeat")

    def look(self, repo: str, revision: str | None) -> tuple[str, list[str]]:
        """The commit that a revision names, and the files there: one call, which is not repeated when it fails.

        Raises:
            UnreachableError: there is no answer within seconds.
            HubError: the Hub refuses.
        """
        own = _client().constants.HF_HUB_ETAG_TIMEOUT
        with self.explaining(repo, revision):
            timeout = own if "HF_HUB_ETAG_TIMEOUT" in os.environ else _CONTACT_S
            info = self.api().model_info(repo, revision=revision, timeout=timeout)
            return info.sha, [file.rfilename for file in info.siblings or ()]

    def files(self, repo: str, revision: str) -> dict[str, RemoteFile]:
        """What a repository holds at a revision, by path.

        Raises:
            HubError: it cannot be listed.
        """
        with self.explaining(repo, revision):
            entries = self.api().list_repo_tree(repo, recursive=True, revision=revision)
            return {
                entry.path: RemoteFile(entry.path, entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs else None)
                for entry in entries
                if hasattr(entry, "size")  # folders have none
            }

    def cached(self, repo: str, name: str, revision: str | None) -> str | None:
        """The path of a file in the cache, if it is there; nothing is asked of the network."""
        found = _client().try_to_load_from_cache(repo, name, cache_dir=self.cache, revision=revision)
        return found if isinstance(found, str) else None

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
                    revision=revision,
                    token=self.token,
                    cache_dir=self.cache,
                    endpoint=self.endpoint,
                    force_download=force,
                    library_name="robustfeat",
                )
            )

    @contextmanager
    def explaining(self, repo: str, revision: str | None = None, name: str | None = None) -> Iterator[None]:
        """Makes every error of the Hub's client a `HubError`: one line, with the next step and without the token."""
        try:
            yield
        except RobustFeatError:
            raise
        except Exception as exc:
            meaning, kind = self._meaning(exc, repo, revision, name)
            raise kind(self._redact(f"{repo}: {meaning}")) from exc

    def _meaning(self, exc: Exception, repo: str, revision: str | None, name: str | None) -> tuple[str, type[HubError]]:
        from huggingface_hub import errors

        cause = exc.__cause__ if isinstance(exc, errors.LocalEntryNotFoundError) else exc
        meanings = {  # subclasses before their bases
            errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE forbids asking the Hub; unset it",
            errors.LocalTokenNotFoundError: "needs a token; run hf auth login, or set HF_TOKEN",
            errors.GatedRepoError: f"access is gated; ask for it at {self.address}/{repo}, then run hf auth login",
            errors.RevisionNotFoundError: f"has no revision {revision!r}; {{revisions}}",
            errors.RepositoryNotFoundError: f"no such model at {self.address}, and no such folder here; check the "
            "name, or, if it is private, log in (hf auth login) with a token that may read it",
            errors.RemoteEntryNotFoundError: f"holds no {name}, so it is not a model of robustfeat, or an incomplete "
            "one; check the name and the revision",
        }
        for kind, meaning in meanings.items():
            if isinstance(cause, kind):
                return meaning.replace("{revisions}", self._revisions(repo)), HubError
        if isinstance(cause, errors.HfHubHTTPError) and cause.response is not None:
            return self._status(cause.response.status_code, _said(cause))
        if isinstance(cause, OSError) and cause.errno is not None:
            place = cause.filename or "the cache"
            return f"{place}: cannot be written ({cause.strerror}); free space or set HF_HOME", HubError
        if isinstance(cause, (ValueError, OSError)) and _of_the_client(cause):
            return _said(cause), HubError
        reason = f"{type(cause).__name__}: {_said(cause)}" if cause else "no answer"
        return f"{self.address} cannot be reached ({reason}); check the network and HF_ENDPOINT", UnreachableError

    def _status(self, status: int, said: str) -> tuple[str, type[HubError]]:
        changed = "was changed meanwhile by somebody else; run the same command again"
        meanings = {
            401: f"{self.address} refuses the token; run hf auth login, or set HF_TOKEN to a valid one",
            403: "the name is taken by somebody else, or the token may not do this; choose another name, or log in "
            "(hf auth login) with a token that may",
            409: changed,
            412: changed,
            429: f"{self.address} limits how often it is asked; wait some minutes, or log in",
        }
        if status >= 500:
            return f"{self.address} fails ({said}); try again later", UnreachableError
        return meanings.get(status, f"{self.address} refuses ({said})"), HubError

    def _revisions(self, repo: str) -> str:
        with suppress(Exception):  # a hint
            refs = self.api().list_repo_refs(repo)
            names = [ref.name for ref in (*refs.branches, *refs.tags)]
            return f"it has {', '.join(names[:8])}{' and more' if len(names) > 8 else ''}"
        return "check the branch, tag or commit"

    def _redact(self, text: str) -> str:
        import huggingface_hub
        import huggingface_hub.constants

        own = self.token if isinstance(self.token, str) else huggingface_hub.get_token()
        return text.replace(own, "<token>") if own else text


def _said(exc: BaseException) -> str:
    message = getattr(exc, "server_message", None) or str(exc) or type(exc).__name__
    return " ".join(message.split())[:300]


def _of_the_client(exc: BaseException) -> bool:
    """Whether the client itself found something wrong, rather than its HTTP library."""
    trace = exc.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith("huggingface_hub")
