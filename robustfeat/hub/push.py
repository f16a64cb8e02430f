"""Publishes a model folder or a head to a repository on the Hub, in one commit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robustfeat.errors import HubError, ModelFolderError
from robustfeat.hub.folder import CARD, ModelFolder, refuse_code
from robustfeat.hub.head_folder import HEAD, HeadFolder
from robustfeat.hub.parcel import Parcel, head_parcel, model_parcel
from robustfeat.hub.remote import HubAccess, RemoteFile, is_commit, is_hub_name, is_revision
from robustfeat.hub.snapshot import KINDS

__all__ = ["Change", "PushReport", "Target", "push_head", "push_model"]

_MAIN = "main"


@dataclass(frozen=True)
class Change:
    """A change to one file.

    Attributes:
        action: `add`, `replace` or `delete`.
        path: the file's path in the repository.
        size_bytes: bytes to send.
    """

    action: str
    path: str
    size_bytes: int


@dataclass(frozen=True)
class PushReport:
    """The result of a push or a dry run.

    Attributes:
        repo: ORG/NAME.
        address: the address of its page.
        revision: the revision to load: the tag, the branch or the pull request; None for main.
        commit: the newest commit; None for a dry run with changes.
        created: whether the repository is new.
        changes: changes to files; empty if nothing had to be sent.
        config_hash: the sha256 of config.json or head.json, which pins the model or the head.
        left_out: files of the folder that are not sent.
    """

    repo: str
    address: str
    revision: str | None
    commit: str | None
    created: bool
    changes: tuple[Change, ...]
    config_hash: str
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """The target of a push.

    Attributes:
        repo: ORG/NAME.
        private: create the repository as private.
        revision: the branch, main by default. It is created from main if missing.
        tag: a tag for the result. A tag never moves.
        create_pr: open a pull request instead of pushing.
        dry_run: change nothing.
        access: the Hub to use, and the credentials.
    """

    repo: str
    private: bool = False
    revision: str | None = None
    tag: str | None = None
    create_pr: bool = False
    dry_run: bool = False
    access: HubAccess = field(default_factory=HubAccess)


@dataclass(frozen=True)
class _Before:
    """The repository before the push: its existence, head, files, tags and branches."""

    exists: bool
    head: str | None
    files: dict[str, RemoteFile]
    tags: dict[str, str]
    branches: dict[str, str]


def push_model(folder: ModelFolder, target: Target) -> PushReport:
    """Makes a repository on the Hub equal to a model folder, and sends only changed files.

    The repository is created if missing. Files of an earlier version of the model are deleted if this one lacks them;
    other files on the Hub stay. Other files in the folder, such as a license, are sent too, unless they are hidden or
    links. A card that was edited on the Hub stays as long as neither the model nor the folder's card changes.

    Args:
        folder: a model folder with one-file ONNX (not compact).
        target: the repository and how to push.

    Raises:
        ModelFolderError: the folder is damaged, or the repository contains files that would prevent loading.
        HubError: the Hub refuses, fails or cannot be reached. The model on the Hub is then unchanged, but a new
            repository or branch stays. If only the tag failed, the message says so.
    """
    if not folder.is_own:
        raise ModelFolderError(
            f"{folder.path}: has another library's layout; a push needs golden images",
            fix=f"make a model folder of it with robustfeat import {folder.path}",
        )
    _check_request(target)
    if folder.compact:
        raise ModelFolderError(f"{folder.path}: is a compact folder; a push needs the ONNX network in one file")
    folder.verify()
    parcel = model_parcel(folder, target.repo)
    return _push(lambda _: parcel, target)


def push_head(folder: HeadFolder, target: Target, *, license_id: str | None = None) -> PushReport:
    """Makes a repository on the Hub equal to a head's folder, as `push_model` does.

    The reports of `svm fit` are not sent, since they show training images or name their files.

    Args:
        folder: the head.
        target: the repository and how to push.
        license_id: the Hub's name of a license, for a generated card. By default the license that is published.

    Raises:
        HeadError: a file looks like a secret, or both a card and a license are given.
        HubError: see `push_model`.
    """
    _check_request(target)

    def pack(published_license: str | None) -> Parcel:
        return head_parcel(folder, target.repo, license_id=license_id, published_license=published_license)

    pack(None)  # refuses what may not be sent before the Hub is asked
    return _push(pack, target)


def _push(pack: Callable[[str | None], Parcel], target: Target) -> PushReport:
    """Pushes what `pack` makes, given the license of the head that is published."""
    repo, revision, tag, access = target.repo, target.revision, target.tag, target.access
    api = access.api()
    if not target.dry_run:
        with access.explaining(repo, writing=True):
            api.whoami()
    before = _look(api, target)
    parcel = pack(_published_license(target, before))
    if problems := access.card_problems(repo, parcel.card):
        raise HubError(
            f"{repo}: the Hub refuses the metadata of {CARD} ({'; '.join(problems)[:300]}); nothing was sent",
            fix="correct it, or remove the card to generate a new one",
        )
    refuse_code(before.files, f"{repo} on the Hub")
    changes = _changes(parcel, before, _old_files(parcel, target, before))
    _refuse_taken_names(target, before, will_change=bool(changes))
    head, pull_request = before.head, None
    if target.dry_run:
        head = None if changes else head
    else:
        with access.explaining(repo, revision, writing=True):
            if not before.exists:
                api.create_repo(repo, private=target.private or None)  # None means the organisation's default
            if revision not in {None, _MAIN, *before.branches}:
                api.create_branch(repo, branch=revision)
            if changes:
                done = api.create_commit(
                    repo,
                    _operations(changes, parcel.contents),
                    commit_message=f"{parcel.name}, by robustfeat push",
                    revision=revision or _MAIN,
                    create_pr=target.create_pr,
                    parent_commit=head,
                )
                head, pull_request = done.oid, done.pr_revision
        if tag is not None and tag not in before.tags:
            _tag(api, target, tag, head, KINDS[parcel.key])
    where = pull_request or tag or (None if revision == _MAIN else revision)
    address = f"{access.address}/{repo}" + (f"/tree/{where}" if where else "")
    return PushReport(repo, address, where, head, not before.exists, changes, parcel.sha256, parcel.left_out)


def _check_request(target: Target) -> None:
    """Refuses impossible targets before any file is read or request sent."""
    repo, tag = target.repo, target.tag
    if not is_hub_name(repo):
        raise HubError(f"{repo}: not a Hub name; expected ORG/NAME, where ORG may be your user name")
    if target.access.offline:
        raise HubError(f"{repo}: nothing can be pushed while HF_HUB_OFFLINE is set", fix="unset it")
    for what, ref in (("branch", target.revision), ("tag", tag)):
        if ref is not None and (not is_revision(ref) or is_commit(ref) or ref.startswith("refs/")):
            raise HubError(f"{repo}: {ref!r} cannot be a {what}; expected a name such as v1")
    if tag is not None and tag in {target.revision, _MAIN}:
        raise HubError(f"{repo}: {tag!r} is a branch", fix="choose another name for the tag")


def _refuse_taken_names(target: Target, before: _Before, *, will_change: bool) -> None:
    """Refuses a branch name that is a tag, a tag name that is a branch, and a tag that would have to move."""
    repo, revision, tag = target.repo, target.revision, target.tag
    if revision in before.tags or tag in before.branches:
        raise HubError(
            f"{repo}: {revision if revision in before.tags else tag} is already the name of a tag or a branch",
            fix="choose another",
        )
    if tag in before.tags and (will_change or before.tags[tag] != before.head):
        raise HubError(f"{repo}: the tag {tag} exists, and tags never move", fix="choose another name")


def _tag(api: Any, target: Target, tag: str, commit: str | None, kind: str) -> None:
    try:
        with target.access.explaining(target.repo, commit, writing=True):
            api.create_tag(target.repo, tag=tag, revision=commit)
    except HubError as exc:
        raise HubError(f"{exc}; the {kind} itself was published, without the tag {tag}") from exc


def _look(api: Any, target: Target) -> _Before:
    from huggingface_hub.errors import RepositoryNotFoundError

    repo, access, branch = target.repo, target.access, target.revision or _MAIN
    with access.explaining(repo):
        try:
            info = api.model_info(repo)
        except RepositoryNotFoundError:
            if target.create_pr:
                what = f"{repo}: does not exist, so it takes no pull request"
                raise HubError(what, fix="push without `create_pr=True`") from None
            return _Before(False, None, {}, {}, {})
        if target.private and not info.private:
            what = f"{repo}: is public, but `private=True` was given; nothing was sent"
            raise HubError(what, fix="make it private on the Hub")
        refs = api.list_repo_refs(repo)
    heads = {ref.name: ref.target_commit for ref in refs.branches}
    if target.create_pr and branch not in heads:
        raise HubError(f"{repo}: has no branch {branch} for a pull request; it has {', '.join(heads)}")
    head = heads.get(branch, heads.get(_MAIN, info.sha))
    tags = {ref.name: ref.target_commit for ref in refs.tags}
    return _Before(True, head, access.files(repo, head), tags, heads)


def _published_license(target: Target, before: _Before) -> str | None:
    """The license in the card of the head on the Hub; None if there is no head, card or license."""
    if not {HEAD, CARD} <= before.files.keys():
        return None
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    text = Path(target.access.download(target.repo, CARD, before.head)).read_text("utf-8", "replace")
    try:
        data = ModelCard(text, ignore_metadata_errors=True).data
    except (ValueError, TypeError, YAMLError):
        return None
    found = data.get("license_name" if data.get("license") == "other" else "license")
    return found if isinstance(found, str) else None


def _old_files(parcel: Parcel, target: Target, before: _Before) -> set[str]:
    """The files of the model or head on the Hub; empty if there is none."""
    other = next((key for key in KINDS if key != parcel.key and key in before.files), None)
    if other is not None:
        raise HubError(
            f"{target.repo}: the name is taken: it has a {KINDS[other]} ({other})", fix="choose another name"
        )
    if parcel.key not in before.files or _same(parcel.contents[parcel.key], before.files[parcel.key]):
        return set()
    file = Path(target.access.download(target.repo, parcel.key, before.head))
    try:
        return parcel.files_of(file.read_bytes())
    except (ValueError, TypeError, KeyError, RecursionError):
        raise HubError(
            f"{target.repo}: the name is taken: it has a {parcel.key} that is not robustfeat's",
            fix="choose another name",
        ) from None


def _changes(parcel: Parcel, before: _Before, old: set[str]) -> tuple[Change, ...]:
    changes = []
    for path, content in sorted(parcel.contents.items()):
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        if path not in before.files:
            changes.append(Change("add", path, size))
        elif not _same(content, before.files[path]):
            changes.append(Change("replace", path, size))
    changes += [
        Change("delete", path, 0) for path in sorted(old) if path in before.files and path not in parcel.contents
    ]
    if not parcel.card_is_edited and [(change.action, change.path) for change in changes] == [("replace", CARD)]:
        return ()  # the card was edited on the Hub
    return tuple(changes)


def _same(content: Path | bytes, remote: RemoteFile) -> bool:
    data = content if isinstance(content, bytes) else content.read_bytes()
    if len(data) != remote.size:
        return False
    if remote.sha256 is not None:
        return hashlib.sha256(data).hexdigest() == remote.sha256
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == remote.blob_id


def _operations(changes: tuple[Change, ...], contents: Mapping[str, Path | bytes]) -> list[Any]:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    return [
        CommitOperationDelete(change.path)
        if change.action == "delete"
        else CommitOperationAdd(change.path, contents[change.path])
        for change in changes
    ]
