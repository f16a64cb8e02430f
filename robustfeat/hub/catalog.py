"""Finds and lists models: the built-in model, folders, the Hub and its cache."""

from __future__ import annotations

import itertools
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from robustfeat.errors import HubError, ModelFolderError
from robustfeat.hub.config import ModelConfig
from robustfeat.hub.folder import CONFIG, ModelFolder
from robustfeat.hub.head_card import HEAD_TAG
from robustfeat.hub.head_folder import HEAD, HeadFolder, resolve_head
from robustfeat.hub.onnx_layout import PROCESSORS, find_network, is_onnx_layout
from robustfeat.hub.pull import HubFolder, kept_list
from robustfeat.hub.remote import HubAccess, is_hub_name
from robustfeat.hub.snapshot import KINDS, Snapshot

__all__ = [
    "BUILTIN",
    "Listing",
    "builtin_model",
    "cached_models",
    "list_builtin",
    "open_repository",
    "public_models",
    "resolve",
    "resolve_model",
    "sample_images",
    "search_models",
    "search_others",
]

BUILTIN = "builtin"
"""The name of the model inside the package, accepted in place of a folder."""

TAG = "robustfeat"
"""Tag of robustfeat's models on the Hub."""

_MODELS = "models--"
_MOST_FOUND = 30  # each model takes one request

_PUBLIC = "public_models.json"
_TASKS = ("image-feature-extraction", "image-classification", "zero-shot-image-classification")
"""Hub tasks whose networks give useful features."""
_MOST_ASKED, _MOST_OTHERS = 50, 10  # per task


def builtin_model(*, config_hash: str | None = None) -> ModelFolder:
    """Opens the model inside the package."""
    place = Path(str(resources.files("robustfeat.hub").joinpath(BUILTIN)))
    folder = ModelFolder(place, config_hash=config_hash)
    folder.source = BUILTIN
    return folder


def sample_images() -> list[bytes]:
    """The built-in model's golden images, for models without golden images."""
    folder = resources.files("robustfeat.hub").joinpath(BUILTIN, "golden")
    files = sorted((file for file in folder.iterdir() if not file.name.endswith(".npy")), key=lambda file: file.name)
    return [file.read_bytes() for file in files]


def _accuracy(one: Mapping[str, Any]) -> str:
    """An entry of `accuracies` as text."""
    beside = f"; the built-in model {one['builtin']:.1f} %" if "builtin" in one else ""
    return f"{one['task']}: {one['percent']:.1f} % ({one['kind']}{beside})"


def resolve_model(
    name: str | os.PathLike[str] | None,
    *,
    revision: str | None = None,
    config_hash: str | None = None,
    access: HubAccess | None = None,
) -> ModelFolder:
    """Opens a model by the name that a user gives.

    Args:
        name: None or `builtin` for the built-in model, a folder, or ORG/NAME on the Hub if no such folder exists.
        revision: a branch, tag or commit on the Hub; main by default.
        config_hash: the sha256 that config.json must have.
        access: the Hub to use, and the credentials.

    Raises:
        ModelFolderError: the model does not exist or is damaged.
        HubError: the Hub refuses, fails or cannot be reached.
    """
    text = BUILTIN if name is None else os.fspath(name)
    hub_name = text != BUILTIN and is_hub_name(text) and isinstance(name, str)
    if hub_name and Path(text).exists() and not Path(text, CONFIG).is_file():
        raise ModelFolderError(f"{text}: a folder of this name hides the model on the Hub", fix="rename the folder")
    if hub_name and not Path(text).exists():
        return HubFolder(Snapshot(text, CONFIG, revision=revision, access=access), config_hash=config_hash)
    if revision is not None:
        raise ModelFolderError(
            f"{text}: is not a model on the Hub, so it has no revision {revision}", fix="leave that out"
        )
    return builtin_model(config_hash=config_hash) if text == BUILTIN else ModelFolder(text, config_hash=config_hash)


def resolve(name: str, *, revision: str | None = None, config_hash: str | None = None) -> ModelFolder | HeadFolder:
    """Opens a model or a head by the name that a user gives.

    Args:
        name: `builtin`, a folder, or ORG/NAME on the Hub if no such folder exists.
        revision: a branch, tag or commit on the Hub; main by default.
        config_hash: the sha256 that config.json or head.json must have.

    Raises:
        ModelFolderError, HeadError: the model or head does not exist or is damaged.
        HubError: the Hub refuses, fails or cannot be reached.
    """
    if is_hub_name(name) and not Path(name).exists():
        return open_repository(name, revision=revision, config_hash=config_hash)
    if Path(name, HEAD).is_file():
        return resolve_head(name, revision=revision, sha256=config_hash)
    return resolve_model(name, revision=revision, config_hash=config_hash)


def open_repository(
    repo: str, *, revision: str | None = None, config_hash: str | None = None, force: bool = False
) -> HubFolder | HeadFolder:
    """Opens the model or head in a repository on the Hub.

    Args:
        repo: ORG/NAME.
        revision, config_hash: see `resolve`.
        force: download cached files again.

    Raises:
        ModelFolderError, HeadError, HubError: see `resolve`.
    """
    snapshot = Snapshot(repo, *KINDS, revision=revision, force=force)
    if snapshot.key == HEAD:
        return HeadFolder(snapshot.path, sha256=config_hash, snapshot=snapshot)
    return HubFolder(snapshot, config_hash=config_hash)


@dataclass(frozen=True)
class Listing:
    """An entry in a list of models. Unknown values are None.

    Attributes:
        model: the argument that names the model; `timm:NAME` has to be imported.
        name: name of the model, with its version.
        revision: the commit on the Hub.
        refs: known branches and tags that point to this commit.
        size_bytes: size on the disk or in the repository.
        scores: accuracies, as text.
        problem: why the model cannot be used; None for no known problem.
        features: the length of a feature vector.
        image_size: the side of the network's input in pixels.
        license: the license, by the Hub's name if it has one.
        sources: where the scores were published.
        downloads: downloads in the last month.
    """

    model: str
    name: str | None
    revision: str | None
    refs: tuple[str, ...]
    size_bytes: int | None
    scores: tuple[str, ...]
    problem: str | None = None
    features: int | None = None
    image_size: int | None = None
    license: str | None = None
    sources: tuple[str, ...] = ()
    downloads: int | None = None

    def of(self, config: ModelConfig) -> Listing:
        """Fills in the facts from a config.json."""
        return replace(
            self,
            name=config.name,
            scores=tuple(map(str, config.evaluations)),
            features=config.feature_size or None,
            image_size=config.preprocessing.image_size,
        )


def list_builtin() -> Listing:
    """The entry of the built-in model."""
    own = builtin_model()
    return Listing(BUILTIN, None, None, (), own.size_bytes(), ()).of(own.config)


def public_models() -> Iterator[Listing]:
    """A short list of good public models, with published and measured facts.

    The facts are in `public_models.json`. docs/models.md helps to choose.
    """
    text = resources.files("robustfeat.hub").joinpath(_PUBLIC).read_text("utf-8")
    for entry in json.loads(text):
        yield Listing(
            entry["model"],
            None,
            None,
            (),
            entry["download_bytes"],
            tuple(map(_accuracy, entry["accuracies"])),
            features=entry["features"],
            image_size=entry["image_size"],
            license=entry["license"],
            sources=tuple(dict.fromkeys(one["source"] for one in entry["accuracies"])),
        )


def cached_models(access: HubAccess | None = None) -> Iterator[Listing]:
    """Models in the cache of the Hub's libraries, sorted by name: robustfeat's, and ONNX models of transformers.

    The Hub's client skips a repository if one snapshot is damaged. This list skips only that snapshot, or reports its
    problem.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    access = access or HubAccess()
    cache = access.cache or Path(HF_HUB_CACHE)
    repos = _folders(cache)
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
            # The cache also holds other libraries' models. Skip those that robustfeat never opened.
            if foreign and not kept_list(snapshot.place).is_file():
                continue
            commit = snapshot.place.name
            listing = Listing(repo_id, None, commit, tuple(sorted(refs.get(commit, ()))), snapshot.size_bytes, ())
            try:
                here = replace(access, cache_dir=cache, local_files_only=True)
                opened = HubFolder(Snapshot(repo_id, CONFIG, revision=commit, access=here)).config if foreign else None
                yield replace(listing.of(opened or ModelConfig.from_dict(data, repo_id)), problem=snapshot.problem)
            except (ModelFolderError, HubError) as exc:
                yield replace(listing, problem=str(exc))


@dataclass(frozen=True)
class _Snapshot:
    """The files of one commit in the cache: total size, newest modification time, and any problem."""

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
        problem = f"{min(missing)} is a broken link; pull the model again" if missing else None
        modified = max((status.st_mtime for status in blobs.values()), default=0.0)
        return cls(place, sum(status.st_size for status in blobs.values()), modified, problem)


def _folders(place: Path) -> list[Path]:
    try:
        return [entry for entry in place.iterdir() if entry.is_dir()]
    except OSError:  # nothing was downloaded yet, or the folder is not readable
        return []


def _read_refs(place: Path) -> dict[str, list[str]]:
    """Known branches and tags, by commit."""
    refs: dict[str, list[str]] = {}
    for file in place.rglob("*"):
        with suppress(OSError, UnicodeDecodeError):
            refs.setdefault(file.read_text("utf-8").strip(), []).append(file.relative_to(place).as_posix())
    return refs


def search_models(query: str, access: HubAccess | None = None) -> Iterator[Listing]:
    """Lists the Hub's models with robustfeat's tag, at most thirty.

    Args:
        query: a part of the name; empty for all.

    Raises:
        HubError: the Hub refuses, fails or cannot be reached.
    """
    with _searching(query, access) as api:
        ours = api.list_models(filter=TAG, search=query or None)
        # The Hub also treats the library's name as a tag.
        models = (found for found in ours if HEAD_TAG not in (found.tags or ()))
        for found in itertools.islice(models, _MOST_FOUND):
            # The Hub's list has neither sizes nor scores.
            model = api.model_info(found.id, files_metadata=True)
            size = sum(file.size or 0 for file in model.siblings or ())
            yield Listing(model.id, None, model.sha, ("main",), size, tuple(_scores(model)))


def search_others(query: str, access: HubAccess | None = None) -> Iterator[Listing]:
    """Lists the most downloaded image models on the Hub that others made and robustfeat loads as ONNX, per task.

    Args:
        query: a part of the name; empty for all.

    Raises:
        HubError: the Hub refuses, fails or cannot be reached.
    """
    seen = set()
    with _searching(query, access) as api:
        for task in _TASKS:
            wanted = {"pipeline_tag": task, "search": query or None, "sort": "downloads", "limit": _MOST_ASKED}
            found = api.list_models(filter="onnx", full=True, fetch_config=True, **wanted)
            loadable = (one for one in found if one.id not in seen and _loads(one))
            for model in itertools.islice(loadable, _MOST_OTHERS):
                seen.add(model.id)
                terms = next((tag.partition(":")[2] for tag in model.tags or () if tag.startswith("license:")), None)
                yield Listing(
                    model.id,
                    None,
                    model.sha,
                    ("main",),
                    None,
                    (),
                    license=terms,
                    downloads=model.downloads,
                )


@contextmanager
def _searching(query: str, access: HubAccess | None) -> Iterator[Any]:
    """The Hub's client, once the Hub answers. Errors in the block become `HubError`."""
    access = access or HubAccess()
    with access.explaining(query or "the Hub"):
        access.reach()
        yield access.api()


def _loads(model: Any) -> bool:
    """Whether a model in the Hub's list is not robustfeat's and can be loaded by name."""
    names = {file.rfilename for file in model.siblings or ()}
    described = is_onnx_layout(model.config) and any(name in names for name in PROCESSORS)
    return TAG not in (model.tags or ()) and described and find_network(names, "fp32") is not None


def _scores(model: Any) -> Iterator[str]:
    """Reads the scores in a card's model-index, which the Hub lists inside or outside the card's data."""
    from huggingface_hub.repocard_data import model_index_to_eval_results

    results = getattr(model.card_data, "eval_results", None)
    if not results and model.model_index:
        with suppress(KeyError, TypeError, ValueError):  # cards may be written by hand
            _, results = model_index_to_eval_results(model.model_index)
    for result in results or ():
        yield f"{result.dataset_name} {result.metric_name or result.metric_type} {result.metric_value}"
