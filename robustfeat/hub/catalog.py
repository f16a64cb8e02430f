"""Where models are found: the built-in one, folders, the Hub and its cache."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from robustfeat.errors import ModelFolderError
from robustfeat.hub.config import ModelConfig
from robustfeat.hub.folder import CONFIG, ModelFolder
from robustfeat.hub.onnx_layout import is_onnx_layout
from robustfeat.hub.pull import HubFolder
from robustfeat.hub.remote import HubAccess, is_hub_name

__all__ = ["BUILTIN", "Listing", "builtin_model", "cached_models", "resolve_model", "search_models"]

BUILTIN = "builtin"
"""The name of the model that the package carries; accepted wherever a model is."""

TAG = "robustfeat"
"""The Hub's tag of our models."""

_MODELS = "models--"
_MOST_FOUND = 30  # each costs a call


def builtin_model(*, config_hash: str | None = None) -> ModelFolder:
    """The model that the package carries."""
    place = Path(str(resources.files("robustfeat.hub").joinpath(BUILTIN)))
    folder = ModelFolder(place, config_hash=config_hash)
    folder.source = BUILTIN
    return folder


def resolve_model(
    name: str | os.PathLike[str] | None,
    *,
    revision: str | None = None,
    config_hash: str | None = None,
    access: HubAccess | None = None,
) -> ModelFolder:
    """The model that a user names.

    Args:
        name: None or `builtin` for the built-in one, a folder, or ORG/NAME on the Hub where no such folder exists.
        revision: a branch, tag or commit on the Hub; main by default.
        config_hash: the sha256 that config.json must have.
        access: which Hub, as whom.

    Raises:
        ModelFolderError: there is no such model, or it is damaged.
        HubError: the Hub refuses, fails or cannot be reached.
    """
    text = BUILTIN if name is None else os.fspath(name)
    hub_name = text != BUILTIN and is_hub_name(text) and isinstance(name, str)
    if hub_name and Path(text).exists() and not Path(text, CONFIG).is_file():
        raise ModelFolderError(f"{text}: a folder of this name is in the way of the model on the Hub", fix="rename it")
    if hub_name and not Path(text).exists():
        return HubFolder(text, revision=revision, access=access, config_hash=config_hash)
    if revision is not None:
        raise ModelFolderError(
            f"{text}: is no model on the Hub, so it has no revision {revision}", fix="leave that out"
        )
    return builtin_model(config_hash=config_hash) if text == BUILTIN else ModelFolder(text, config_hash=config_hash)


@dataclass(frozen=True)
class Listing:
    """A model in a list.

    Attributes:
        model: what a user types to get it.
        name: of the model, with its version; None where only the Hub knows.
        revision: the commit on the Hub.
        refs: the branches and tags that are known to lead there.
        size_bytes: on the disk, or of the repository's files.
        scores: measured numbers, in words.
        problem: why it cannot be used; None where nothing is known against it.
    """

    model: str
    name: str | None
    revision: str | None
    refs: tuple[str, ...]
    size_bytes: int | None
    scores: tuple[str, ...]
    problem: str | None = None


def cached_models(access: HubAccess | None = None) -> Iterator[Listing]:
    """Models in the cache of the Hub's libraries, in the order of their names: ours, and ONNX models of transformers.

    Those libraries leave out a repository with a single damaged snapshot; here only that snapshot is missing, or has a
    problem.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    repos = _folders(Path((access or HubAccess()).cache or HF_HUB_CACHE))
    for repo_id, repo in sorted((repo.name[len(_MODELS) :].replace("--", "/"), repo) for repo in repos):
        if not repo.name.startswith(_MODELS):
            continue
        refs = _read_refs(repo / "refs")
        snapshots = [_Snapshot.read(place) for place in _folders(repo / "snapshots")]
        for snapshot in sorted(snapshots, key=lambda one: (-one.modified, one.place.name)):
            try:
                data = json.loads((snapshot.place / CONFIG).read_bytes())
            except (OSError, ValueError, RecursionError):
                continue
            foreign = is_onnx_layout(data)
            if not foreign and (not isinstance(data, dict) or "robustfeat" not in data):
                continue
            # Other libraries' models lie there, too: those without a network that was downloaded are none of ours.
            if foreign and not any(snapshot.place.rglob("*.onnx")):
                continue
            commit = snapshot.place.name
            listing = Listing(repo_id, None, commit, tuple(sorted(refs.get(commit, ()))), snapshot.size_bytes, ())
            try:
                config = ModelFolder(snapshot.place).config if foreign else ModelConfig.from_dict(data, repo_id)
                scores = tuple(map(str, config.evaluations))
                yield replace(listing, name=config.name, scores=scores, problem=snapshot.problem)
            except ModelFolderError as exc:
                yield replace(listing, problem=str(exc))


@dataclass(frozen=True)
class _Snapshot:
    """The files of a commit in the cache: their size, when the latest was written, and what is wrong with them."""

    place: Path
    size_bytes: int
    modified: float
    problem: str | None

    @classmethod
    def read(cls, place: Path) -> _Snapshot:
        blobs: dict[tuple[int, int], os.stat_result] = {}
        missing = []
        for file in place.rglob("*"):
            try:
                status = file.stat()
            except OSError:
                missing.append(file.name)
                continue
            if stat.S_ISREG(status.st_mode):
                blobs[status.st_dev, status.st_ino] = status
        problem = f"{min(missing)} is a link to nothing; pull the model again" if missing else None
        modified = max((status.st_mtime for status in blobs.values()), default=0.0)
        return cls(place, sum(status.st_size for status in blobs.values()), modified, problem)


def _folders(place: Path) -> list[Path]:
    try:
        return [entry for entry in place.iterdir() if entry.is_dir()]
    except OSError:  # nothing was ever downloaded there, or others may not look
        return []


def _read_refs(place: Path) -> dict[str, list[str]]:
    """The branches and tags that are known, by their commit."""
    refs: dict[str, list[str]] = {}
    for file in place.rglob("*"):
        with suppress(OSError, UnicodeDecodeError):
            refs.setdefault(file.read_text("utf-8").strip(), []).append(file.relative_to(place).as_posix())
    return refs


def search_models(query: str, access: HubAccess | None = None) -> Iterator[Listing]:
    """The Hub's models that carry our tag, at most thirty.

    Args:
        query: part of their names; empty for all.

    Raises:
        HubError: the Hub refuses, fails or cannot be reached.
    """
    access = access or HubAccess()
    api = access.api()
    with access.explaining(query or "the Hub"):
        access.reach()
        for found in api.list_models(filter=TAG, search=query or None, limit=_MOST_FOUND):
            # The list itself has neither sizes nor scores.
            model = api.model_info(found.id, files_metadata=True)
            size = sum(file.size or 0 for file in model.siblings or ())
            yield Listing(model.id, None, model.sha, ("main",), size, tuple(_scores(model)))


def _scores(model: Any) -> Iterator[str]:
    """From where the Hub keeps the card's model-index: beside the rest of the card, or in it."""
    from huggingface_hub.repocard_data import model_index_to_eval_results

    results = getattr(model.card_data, "eval_results", None)
    if not results and model.model_index:
        with suppress(KeyError, TypeError, ValueError):  # cards are written by hand, too
            _, results = model_index_to_eval_results(model.model_index)
    for result in results or ():
        yield f"{result.dataset_name} {result.metric_name or result.metric_type} {result.metric_value}"
