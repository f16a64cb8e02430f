"""Publishing: a model folder to a repository on the Hub, in one commit."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustfeat.errors import HubError, ModelFolderError
from robustfeat.hub.card import PLACE, render_card
from robustfeat.hub.folder import CARD, CONFIG, ModelFolder, file_sha256, refuse_code
from robustfeat.hub.remote import HubAccess, RemoteFile, is_commit, is_hub_name, is_revision

__all__ = ["Change", "PushReport", "push_model"]

_MAIN = "main"
_SECRET_NAMES = re.compile(
    r"id_(rsa|dsa|ecdsa|ed25519)|.*\.(pem|key|p12|pfx|kdbx|keystore|env)|credentials(\..*)?|\.?netrc"
)
_SECRETS = re.compile(
    rb"-----BEGIN [A-Z ]*PRIVATE KEY"
    rb"|\b(hf_[A-Za-z0-9]{30,}|AKIA[A-Z0-9]{16}|gh[pousr]_[A-Za-z0-9]{36,}|sk-[A-Za-z0-9_-]{32,})"
)


@dataclass(frozen=True)
class Change:
    """What a push does to one file: `add`, `replace` or `delete`.

    Attributes:
        action, path: what and where.
        size_bytes: what is sent.
    """

    action: str
    path: str
    size_bytes: int


@dataclass(frozen=True)
class PushReport:
    """What a push did, or would do.

    Attributes:
        repo: ORG/NAME.
        address: of its page.
        revision: what loads it: the tag, the branch, or the pull request's; None for main.
        commit: the repository's newest one; None for a dry run that would make it.
        created: whether the repository did not exist before.
        changes: empty where nothing had to be sent.
        config_hash: the sha256 of config.json, by which the model can be pinned.
    """

    repo: str
    address: str
    revision: str | None
    commit: str | None
    created: bool
    changes: tuple[Change, ...]
    config_hash: str


@dataclass(frozen=True)
class _Target:
    """The repository before the push: whether it is there, what it has, and what the branch holds."""

    exists: bool
    head: str | None
    files: dict[str, RemoteFile]
    tags: dict[str, str]
    branches: dict[str, str]


def push_model(
    folder: ModelFolder,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    access: HubAccess | None = None,
) -> PushReport:
    """Makes a repository on the Hub equal to a model folder, and sends only what differs.

    The repository is made where it does not exist. Files that an earlier version of the model had and this one has not
    are deleted; other files there stay. What else lies in the folder, such as a licence, is sent as well, unless it is
    hidden or a link. A card that was edited on the Hub stays as long as the model does not change,
    unless the folder's own card was edited, too.

    Args:
        folder: with its ONNX as one file (not a compact one).
        repo: ORG/NAME.
        private: make the repository a private one.
        revision: the branch; main by default, made from main where it does not exist.
        tag: a name for the result, which then never moves.
        create_pr: propose the commit as a pull request.
        dry_run: change nothing.
        access: which Hub, as whom.

    Raises:
        ModelFolderError: the folder is damaged, or the repository holds what would keep the model from loading.
        HubError: the Hub refuses, fails or cannot be reached. The model is then as it was there, though a repository or
            a branch that was made stays; the message says so where the model was published and its tag was not.
    """
    access = access or HubAccess()
    _check_request(folder, repo, access, revision=revision, tag=tag)
    folder.verify()
    card = _card(folder, repo)
    contents = _contents(folder, card)
    api = access.api()
    if not dry_run:
        with access.explaining(repo, writing=True):
            api.whoami()
    if problems := access.card_problems(repo, card):
        raise HubError(
            f"{repo}: the Hub refuses the metadata of {CARD} ({'; '.join(problems)[:300]}); nothing was sent",
            fix="correct it, or remove the file to have it written anew",
        )
    target = _look(api, access, repo, revision or _MAIN, private=private, create_pr=create_pr)
    refuse_code(target.files, f"{repo} on the Hub")
    old = _old_config(access, repo, target, contents)
    changes = _changes(folder, contents, target, old)
    _refuse_taken_names(repo, target, revision, tag, will_change=bool(changes))
    head, pull_request = target.head, None
    if dry_run:
        head = None if changes else head
    else:
        with access.explaining(repo, revision, writing=True):
            if not target.exists:
                api.create_repo(repo, private=private or None)  # None: as the organisation has it
            if revision not in {None, _MAIN, *target.branches}:
                api.create_branch(repo, branch=revision)
            if changes:
                done = api.create_commit(
                    repo,
                    _operations(changes, contents),
                    commit_message=f"{folder.config.name}, by robustfeat push",
                    revision=revision or _MAIN,
                    create_pr=create_pr,
                    parent_commit=head,
                )
                head, pull_request = done.oid, done.pr_revision
        if tag is not None and tag not in target.tags:
            _tag(api, access, repo, tag, head)
    where = pull_request or tag or (None if revision == _MAIN else revision)
    address = f"{access.address}/{repo}" + (f"/tree/{where}" if where else "")
    return PushReport(repo, address, where, head, not target.exists, changes, folder.config_hash)


def _check_request(folder: ModelFolder, repo: str, access: HubAccess, *, revision: str | None, tag: str | None) -> None:
    """Refuses what cannot be pushed, before anything is read or asked."""
    if not folder.is_own:
        raise ModelFolderError(
            f"{folder.path}: is in another library's layout, and what is pushed has golden images",
            fix=f"make a model folder of it with robustfeat import {folder.path}",
        )
    if not is_hub_name(repo):
        raise HubError(f"{repo}: not a name on the Hub; expected ORG/NAME, where ORG may be your user name")
    if access.offline:
        raise HubError(f"{repo}: nothing can be pushed while HF_HUB_OFFLINE is set", fix="unset it")
    for what, ref in (("branch", revision), ("tag", tag)):
        if ref is not None and (not is_revision(ref) or is_commit(ref) or ref.startswith("refs/")):
            raise HubError(f"{repo}: {ref!r} cannot be a {what}; expected a name such as v1")
    if tag is not None and tag in {revision, _MAIN}:
        raise HubError(f"{repo}: {tag!r} is a branch", fix="choose another name for the tag")
    if folder.compact:
        raise ModelFolderError(f"{folder.path}: is a compact folder; what is pushed needs its ONNX as one file")


def _refuse_taken_names(
    repo: str, target: _Target, revision: str | None, tag: str | None, *, will_change: bool
) -> None:
    """Refuses a branch that is a tag there, a tag that is a branch, and a tag that would have to move."""
    if revision in target.tags or tag in target.branches:
        raise HubError(
            f"{repo}: {revision if revision in target.tags else tag} names a tag or a branch already",
            fix="choose another",
        )
    if tag in target.tags and (will_change or target.tags[tag] != target.head):
        raise HubError(f"{repo}: the tag {tag} exists and stays where it is", fix="choose another name for it")


def _card(folder: ModelFolder, repo: str) -> str:
    card = folder.path / CARD
    try:
        text = card.read_bytes().decode() if card.is_file() else render_card(folder.config)
    except UnicodeDecodeError as exc:
        raise ModelFolderError(f"{card}: not UTF-8 ({exc.reason} at byte {exc.start})", fix="save it as UTF-8") from exc
    return text.replace(PLACE, repo)


def _contents(folder: ModelFolder, card: str) -> dict[str, Path | bytes]:
    """What the repository shall hold, by path."""
    # As they were verified, not as they are when the client sends them.
    files: dict[str, Path | bytes] = {name: folder.read(name) for name in folder.config.files}
    files[CONFIG] = folder.config_bytes
    for file in folder.path.rglob("*"):  # a licence, the card's pictures
        name = file.relative_to(folder.path).as_posix()
        if file.is_file() and not file.is_symlink() and not any(part.startswith(".") for part in Path(name).parts):
            files.setdefault(name, file)
    for name, content in files.items():
        if name not in folder.config.files and name != CONFIG:
            _refuse_secret(folder.path / name, content if isinstance(content, bytes) else content.read_bytes())
    _refuse_secret(folder.path / CARD, card.encode())
    return files | {CARD: card.encode()}


def _refuse_secret(file: Path, content: bytes) -> None:
    """What is pushed can be read by others, and stays in the repository's history."""
    if _SECRET_NAMES.fullmatch(file.name.lower()) or _SECRETS.search(content):
        raise ModelFolderError(
            f"{file}: looks like a key or a password, which a push would publish; nothing was sent",
            fix="move it out of the folder",
        )


def _tag(api: Any, access: HubAccess, repo: str, tag: str, commit: str | None) -> None:
    try:
        with access.explaining(repo, commit, writing=True):
            api.create_tag(repo, tag=tag, revision=commit)
    except HubError as exc:
        raise HubError(f"{exc}; the model itself was published, without the tag {tag}") from exc


def _look(api: Any, access: HubAccess, repo: str, branch: str, *, private: bool, create_pr: bool) -> _Target:
    from huggingface_hub.errors import RepositoryNotFoundError

    with access.explaining(repo):
        try:
            info = api.model_info(repo)
        except RepositoryNotFoundError:
            if create_pr:
                what = f"{repo}: does not exist, so it takes no proposals"
                raise HubError(what, fix="push without `create_pr=True`") from None
            return _Target(False, None, {}, {}, {})
        if private and not info.private:
            what = f"{repo}: is public, a private one was asked for, and nothing was sent"
            raise HubError(what, fix="make it private there")
        refs = api.list_repo_refs(repo)
    heads = {ref.name: ref.target_commit for ref in refs.branches}
    if create_pr and branch not in heads:
        raise HubError(f"{repo}: has no branch {branch} to propose a change to; it has {', '.join(heads)}")
    head = heads.get(branch, heads.get(_MAIN, info.sha))
    tags = {ref.name: ref.target_commit for ref in refs.tags}
    return _Target(True, head, access.files(repo, head), tags, heads)


def _old_config(access: HubAccess, repo: str, target: _Target, contents: dict[str, Path | bytes]) -> dict[str, Any]:
    """The files that the model there vouches for, by name; none where there is no model."""
    if CONFIG not in target.files or _same(contents[CONFIG], target.files[CONFIG]):
        return {}
    file = Path(access.download(repo, CONFIG, target.head))
    try:
        files = json.loads(file.read_bytes())["robustfeat"]["files"]
        return dict(files)
    except (ValueError, TypeError, KeyError, RecursionError):
        raise HubError(
            f"{repo}: the name is taken: it holds a {CONFIG} that is not robustfeat's", fix="choose another name"
        ) from None


def _changes(
    folder: ModelFolder, contents: dict[str, Path | bytes], target: _Target, old: dict[str, Any]
) -> tuple[Change, ...]:
    changes = []
    for path, content in sorted(contents.items()):
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        if path not in target.files:
            changes.append(Change("add", path, size))
        elif not _same(content, target.files[path]):
            changes.append(Change("replace", path, size))
    changes += [Change("delete", path, 0) for path in sorted(old) if path in target.files and path not in contents]
    card = folder.path / CARD
    generated = not card.is_file() or file_sha256(card) == folder.config.card_sha256
    if generated and [(change.action, change.path) for change in changes] == [("replace", CARD)]:
        return ()  # it was edited on the Hub
    return tuple(changes)


def _same(content: Path | bytes, remote: RemoteFile) -> bool:
    data = content if isinstance(content, bytes) else content.read_bytes()
    if len(data) != remote.size:
        return False
    if remote.sha256 is not None:
        return hashlib.sha256(data).hexdigest() == remote.sha256
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == remote.blob_id


def _operations(changes: tuple[Change, ...], contents: dict[str, Path | bytes]) -> list[Any]:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    return [
        CommitOperationDelete(change.path)
        if change.action == "delete"
        else CommitOperationAdd(change.path, contents[change.path])
        for change in changes
    ]
