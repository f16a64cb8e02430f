"""Models of transformers, in folders and on the Hub, and which of their files an import takes. Loads no PyTorch.

Weights are read from safetensors files, networks from ONNX files. Pickles and programs are neither downloaded nor read.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robustfeat.errors import HubError, InputError, UnreachableError, first_line
from robustfeat.hub.folder import CARD, CONFIG, WEIGHTS, file_sha256
from robustfeat.hub.onnx_layout import PROCESSORS, find_network
from robustfeat.hub.remote import HubAccess, is_commit, is_revision

__all__ = ["Repository", "open_repository", "uses_pytorch"]

_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"[\w.-]+\.safetensors")
_FORBIDDEN = "HF_HUB_OFFLINE or local_files_only forbids downloads"
_PICKLES = re.compile(r"(pytorch_model.*\.bin|tf_model\.h5|flax_model\.msgpack|model.*\.pth?)")


@dataclass(frozen=True)
class Repository:
    """A model of transformers.

    Attributes:
        source: what a user types to import it: hf:ORG/NAME, or the folder.
        path: the folder of its files, or of the downloads.
        names: its files.
        config, processor: the contents of config.json, and of the file by which images are prepared.
        repo, commit: ORG/NAME and the commit on the Hub; None for a folder.
        access: the Hub that it comes from.
    """

    source: str
    path: Path
    names: tuple[str, ...]
    config: Mapping[str, Any]
    processor: Mapping[str, Any] | None
    repo: str | None = None
    commit: str | None = None
    access: HubAccess = field(default_factory=HubAccess)

    @property
    def origin(self) -> str:
        """The source for others to read, who need not know the folders of this machine."""
        return self.source if self.repo else self.label

    @property
    def label(self) -> str:
        """A name for the model."""
        return self.repo.replace("/", "-") if self.repo else self.path.absolute().name

    @property
    def model_type(self) -> str:
        """The model type in config.json."""
        return str(self.config.get("model_type"))

    @property
    def has_weights(self) -> bool:
        """Whether there are weights for PyTorch that can be read without running code."""
        return WEIGHTS in self.names or _INDEX in self.names

    @property
    def has_network(self) -> bool:
        """Whether there is an ONNX file of the whole network in fp32."""
        return find_network(self.names, "fp32") is not None

    def weight_files(self) -> list[Path]:
        """The safetensors files, downloaded if needed and verified by the Hub's hashes.

        Raises:
            InputError: the list of their names is damaged, or one is missing.
            HubError: one cannot be downloaded, or is another one.
        """
        names = [WEIGHTS]
        if WEIGHTS not in self.names:
            self.fetch([_INDEX])
            index = _read_json(self.path / _INDEX, self.source)
            listed = index.get("weight_map")
            names = sorted(set(map(str, listed.values()))) if isinstance(listed, Mapping) else []
            odd = [name for name in names if not _SHARD.fullmatch(name) or name not in self.names]
            if not names or odd:
                what = f"lists {odd[0]!r}, which is not there" if odd else "lists no files"
                raise InputError(f"{self.source}: {_INDEX} {what}", fix="download or save the model again")
        self._verify(self.fetch(names))
        return [self.path / name for name in names]

    def _verify(self, names: Sequence[str]) -> None:
        """Verifies new downloads by their hashes, since the Hub's client only compares sizes."""
        if not names or self.repo is None or self.commit is None:
            return
        told = self.access.files(self.repo, self.commit)
        for name in names:
            wanted = told[name].sha256 if name in told else None
            if wanted and file_sha256(self.path / name) != wanted:
                self.path.joinpath(name).resolve().unlink()  # else it would be taken from the cache next time
                raise HubError(f"{self.repo}: {name} was altered on its way", fix="run the same command again")

    def license(self) -> str | None:
        """The license that the model's card names, as the Hub calls it."""
        from huggingface_hub.repocard import metadata_load

        if CARD not in self.names:
            return None
        self.fetch([CARD])
        try:
            data = metadata_load(self.path / CARD) or {}
        except Exception:  # cards are written by hand: YAML, its types and its encoding may be anything
            return None
        named = data.get("license_name") if data.get("license") == "other" else data.get("license")
        return named if isinstance(named, str) else None

    def fetch(self, names: Sequence[str]) -> list[str]:
        """Downloads those that are not here, and gives their names.

        Raises:
            HubError: one cannot be downloaded.
        """
        missing = [name for name in names if not (self.path / name).is_file()]
        if not missing or self.repo is None:
            return []
        if self.access.offline:
            raise HubError(
                f"{self.repo}: {missing[0]} is not in the cache, and {_FORBIDDEN}",
                fix="allow them once",
            )
        self.access.download_all(self.repo, missing, self.commit)
        return missing


def open_repository(source: str, revision: str | None = None, access: HubAccess | None = None) -> Repository:
    """Opens a model of transformers; of one on the Hub it downloads what says what the model is.

    Args:
        source: hf:ORG/NAME, or a folder.
        revision: a branch, tag or commit on the Hub; main by default.
        access: the Hub to use, and the credentials.

    Raises:
        InputError: there is no such model, or it is not one of transformers.
        HubError: the Hub refuses, fails or cannot be reached, and the cache does not have it.
    """
    if not source.startswith("hf:"):
        path = Path(source)
        names = tuple(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
        return _read(source, path, names)
    repo, access = source.removeprefix("hf:"), access or HubAccess()
    if revision is not None and not is_revision(revision):
        raise HubError(f"{repo}: the revision must be a branch, a tag or a commit; got {revision!r}")
    if access.offline or is_commit(revision):
        cached = access.cached_folder(repo, revision, [CONFIG])
        # A copy without weights may be of another use of the model: then the Hub is asked for them.
        if cached is not None and (access.offline or any((cached / name).is_file() for name in (WEIGHTS, _INDEX))):
            return _read_cached(source, cached, access)
        if access.offline:
            raise HubError(
                f"{repo}: is not in the cache, and HF_HUB_OFFLINE or local_files_only forbids downloads",
                fix="allow them once",
            )
    try:
        commit, listed = access.look(repo, revision)
    except UnreachableError:
        cached = access.cached_folder(repo, revision, [CONFIG])
        if cached is None:
            raise
        return _read_cached(source, cached, access)
    wanted = [name for name in (CONFIG, *PROCESSORS) if name in listed]
    if CONFIG not in wanted:
        raise InputError(f"{source}: holds no {CONFIG}, so it is no model of transformers", fix="check the name")
    path = access.download_all(repo, wanted, revision)
    if path.name != commit:
        raise HubError(f"{repo}: was changed meanwhile", fix="run the same command again")
    return _read(source, path, tuple(listed), repo, commit, access)


def uses_pytorch(repository: Repository) -> bool:
    """Whether PyTorch and transformers read the weights; otherwise the ONNX file is taken.

    Raises:
        InputError: there are only weights for PyTorch, and PyTorch or transformers is not installed.
    """
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if repository.has_weights and not missing:
        return True
    if repository.has_network:
        return False
    raise InputError(
        f"{repository.source}: holds weights for PyTorch and no ONNX file, and {' and '.join(missing)} "
        f"{'is' if len(missing) == 1 else 'are'} not installed",
        fix="pip install 'robustfeat[transformers]'",
    )


def _read_cached(source: str, path: Path, access: HubAccess) -> Repository:
    names = tuple(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    return _read(source, path, names, source.removeprefix("hf:"), path.name, access)


def _read(
    source: str,
    path: Path,
    names: tuple[str, ...],
    repo: str | None = None,
    commit: str | None = None,
    access: HubAccess | None = None,
) -> Repository:
    if CONFIG not in names:
        onnx = sorted(name for name in names if name.endswith(".onnx"))
        fix = f"import {path / onnx[0]} by itself" if onnx and repo is None else "check the name"
        raise InputError(f"{source}: holds no {CONFIG}, so it is no model of transformers", fix=fix)
    config = _read_json(path / CONFIG, source)
    _refuse_others(source, config, path, repo)
    processor = None
    if found := next((name for name in PROCESSORS if name in names), None):
        content = _read_json(path / found, source)
        own = content.get("image_processor")
        processor = own if isinstance(own, dict) else content
    made = Repository(source, path, names, config, processor, repo, commit, access or HubAccess())
    _refuse_unusable(made)
    return made


def _read_json(file: Path, source: str) -> dict[str, Any]:
    try:
        data = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as exc:
        raise InputError(
            f"{source}: {file.name} is not valid JSON ({first_line(exc)})", fix="download it again"
        ) from exc
    if not isinstance(data, dict):
        raise InputError(f"{source}: {file.name} must hold an object", fix="download it again")
    return data


def _refuse_others(source: str, config: Mapping[str, Any], path: Path, repo: str | None) -> None:
    """Refuses what another command, or another kind of import, is for."""
    if "robustfeat" in config:
        fix = f"use it as it is, or copy it with robustfeat pull {repo}" if repo else "use it as it is"
        raise InputError(f"{source}: is a model folder of robustfeat already", fix=fix)
    if "model_type" not in config and isinstance(config.get("architecture"), str):
        place = f"hf-hub:{repo}" if repo else f"local-dir:{path}"
        raise InputError(f"{source}: is a model of timm ({config['architecture']})", fix=f"import timm:{place}")
    if not isinstance(config.get("model_type"), str):
        raise InputError(f"{source}: {CONFIG} names no model_type, so it is no model of transformers")


def _refuse_unusable(made: Repository) -> None:
    """Refuses a model without readable weights or network, or without a way to prepare images."""
    if not made.has_weights and not made.has_network:
        others = sorted(name for name in made.names if _PICKLES.fullmatch(name))
        found = f"; {others[0]} may run code when it is loaded" if others else ""
        raise InputError(
            f"{made.source}: holds neither {WEIGHTS} nor an ONNX file of the whole network{found}",
            fix="save it with transformers' save_pretrained, or use another revision",
        )
    if made.processor is None:
        raise InputError(
            f"{made.source}: holds no {PROCESSORS[0]}, so nothing says how images are prepared (model type "
            f"{made.model_type!r})",
            fix="use a model for images",
        )
