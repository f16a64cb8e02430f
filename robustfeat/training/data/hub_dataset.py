"""Datasets of the Hugging Face Hub: `hf://datasets/ORG/NAME[@REVISION][/FOLDER]`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from robustfeat.errors import DataError, HubError, UnreachableError, first_line
from robustfeat.hub.remote import DatasetAccess, HubAccess, is_hub_name, is_revision
from robustfeat.training.data.row_groups import ParquetPart
from robustfeat.training.data.split_files import VALIDATION_NAMES, SplitFiles, find_split_files
from robustfeat.training.data.tar_shards import CLASSES_NAME

__all__ = ["FetchedDataset", "fetch_dataset", "is_hub_dataset", "list_remote_parquet"]

_URL = re.compile(
    r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>refs/(pr|convert)/[^/]+|[^/]+))?(/(?P<folder>.*))?"
)
_COUNT = re.compile(r".*-of-(?P<total>\d+)\.\w+")


def is_hub_dataset(root: str | os.PathLike[str]) -> bool:
    """Whether DATA is on the Hub."""
    return os.fspath(root).startswith("hf://")


@dataclass(frozen=True)
class FetchedDataset:
    """The files of a dataset, in the Hub's cache.

    Attributes:
        folder: the folder of the files.
        place: what messages call it.
    """

    folder: Path
    place: str
    files: SplitFiles


def fetch_dataset(url: str, parts: int | None = None) -> FetchedDataset:
    """Downloads the files of the training and validation splits, at one commit, as far as they are not there yet.

    Where the Hub cannot be asked (or HF_HUB_OFFLINE says not to), what the cache holds must do.

    Args:
        parts: only so many training files.

    Raises:
        DataError: the dataset has no such files, or has several configurations of them.
        HubError: it cannot be downloaded.
    """
    dataset = _Dataset.parse(url)
    access = dataset.access
    if access.offline:
        return dataset.cached(parts, "HF_HUB_OFFLINE forbids downloads; allow them once")
    try:
        commit, names = access.look(dataset.repo, dataset.revision)
    except UnreachableError as exc:
        try:
            return dataset.cached(parts, "")
        except HubError:
            raise exc from None
    inside, files = dataset.choose(names, parts)
    wanted = [inside + name for name in (*files.train, *files.validation)]
    if files.kind == "tar" and inside + CLASSES_NAME in names:
        wanted.append(inside + CLASSES_NAME)
    folder = access.download_all(dataset.repo, wanted, dataset.revision)
    if folder.name != commit:
        raise HubError(f"{dataset.place}: was changed meanwhile", fix="run the same command again")
    return FetchedDataset(folder / inside, f"{dataset.place}/{inside}".rstrip("/"), files)


def list_remote_parquet(url: str, parts: int | None = None) -> tuple[list[ParquetPart], list[ParquetPart]]:
    """The training and validation files, to be read where they are, at the commit that the revision names now.

    Raises:
        DataError: see `fetch_dataset`, or the files are tar shards.
        HubError: the Hub refuses or cannot be reached.
    """
    dataset = _Dataset.parse(url)
    access = dataset.access
    commit, _ = access.look(dataset.repo, dataset.revision)
    listed = access.files(dataset.repo, commit)
    inside, files = dataset.choose(listed, parts)
    if files.kind == "tar":
        raise DataError(f"{dataset.place}: holds tar shards, which cannot be streamed", fix="let them be downloaded")

    def part(name: str) -> ParquetPart:
        path = inside + name
        return _HubParquet(access, dataset.repo, commit, path, listed[path].size, f"{dataset.place}/{path}")

    return [part(name) for name in files.train], [part(name) for name in files.validation]


@dataclass(frozen=True)
class _Dataset:
    """Parses the URL. `folder` is empty or ends in a slash."""

    repo: str
    revision: str | None
    folder: str
    access: HubAccess

    @classmethod
    def parse(cls, url: str) -> _Dataset:
        match = _URL.fullmatch(url)
        revision = unquote(match["revision"]) if match and match["revision"] else None
        if not match or not is_hub_name(match["repo"]) or (revision is not None and not is_revision(revision)):
            raise DataError(f"{url}: expected hf://datasets/ORG/NAME, with @REVISION or /FOLDER after it where needed")
        folder = (match["folder"] or "").strip("/")
        return cls(match["repo"], revision, f"{folder}/" if folder else "", DatasetAccess())

    @property
    def place(self) -> str:
        """The name in messages."""
        return f"hf://datasets/{self.repo}" + (f"@{self.revision}" if self.revision else "")

    def choose(self, names: Sequence[str] | dict[str, Any], parts: int | None) -> tuple[str, SplitFiles]:
        """The folder with the splits' files, empty or with a slash at its end, and the files."""
        folders: dict[str, list[str]] = {}
        for name in names:
            if name.startswith(self.folder):
                inside, slash, base = name.rpartition("/")
                folders.setdefault(inside + slash, []).append(base)
        found: dict[str, SplitFiles] = {}
        compressed: DataError | None = None
        for inside, bases in sorted(folders.items()):
            try:
                files = find_split_files(bases, f"{self.place}/{inside}".rstrip("/"), parts)
            except DataError as exc:
                compressed = compressed or exc
            else:
                found |= {inside: files} if files else {}
        parquet = {inside: files for inside, files in found.items() if files.kind == "parquet"}
        found = parquet or found
        for inside in (self.folder, f"{self.folder}data/"):  # the configuration that the Hub takes by default
            if inside in found:
                return inside, found[inside]
        if len(found) == 1:
            return next(iter(found.items()))
        where = f"{self.place}/{self.folder}".rstrip("/")
        if found:
            choices = ", ".join(inside.rstrip("/") for inside in found)
            raise DataError(
                f"{where}: has several configurations ({choices})",
                fix=f"add one, as {self.place}/{choices.split(',')[0]}",
            )
        if compressed:
            raise compressed
        held = sorted(name for name in names if name.startswith(self.folder)) or sorted(names)
        some = ", ".join(held[:5]) + (", ..." if len(held) > 5 else "")
        raise DataError(f"{where}: holds neither train-*.parquet nor train-*.tar files; it holds {some or 'nothing'}")

    def cached(self, parts: int | None, reason: str) -> FetchedDataset:
        """The cached files, if the cache is all there is."""
        absent = HubError(f"{self.place}: is not in the cache, or not all of it; {reason}")
        folder = self.access.cached_folder(self.repo, self.revision)
        if folder is None:
            raise absent
        held = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]
        try:
            inside, files = self.choose(held, parts)
        except DataError as exc:
            raise absent from exc
        # Names such as train-00000-of-00005 state the number of files. For other names, the client may know it.
        for names, limit in ((files.train, parts), (files.validation, None)):
            match = _COUNT.fullmatch(names[0]) if names else None
            total = int(match["total"]) if match else len(names)
            if len(names) < min(total, limit or total):
                raise absent
        splits = {name.partition("-")[0] for name in files.validation} or set(VALIDATION_NAMES)
        splits |= {"train"} if parts is None else set()
        patterns = [*(f"{inside}{split}-*.{files.kind}" for split in splits), inside + CLASSES_NAME]
        if self.access.cached_folder(self.repo, self.revision, patterns) is None:
            raise absent
        return FetchedDataset(folder / inside, f"{self.place}/{inside}".rstrip("/"), files)


@dataclass(frozen=True)
class _HubParquet:
    """A Parquet file of the Hub at one commit."""

    access: HubAccess
    repo: str
    commit: str
    path: str
    size: int
    place: str

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def open(self) -> Any:
        return self.access.open(self.repo, self.path, self.commit, self.size)

    @contextmanager
    def explaining(self) -> Iterator[None]:
        import pyarrow

        with self.access.explaining(self.repo, self.commit, self.path):
            try:
                yield
            except (pyarrow.ArrowException, OSError) as exc:
                if not isinstance(exc, pyarrow.ArrowException) and (type(exc) is not OSError or exc.errno is not None):
                    raise  # the network's; Arrow's own have no number
                raise DataError(f"{self.place}: not a Parquet file, or damaged ({first_line(exc)})") from exc
