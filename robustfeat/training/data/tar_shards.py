"""WebDataset shards: tar files in which an image and its label share a name, `KEY.jpg` and `KEY.cls` or `KEY.json`."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from robustfeat.errors import DataError
from robustfeat.serving.inputs.choice import IMAGE_SUFFIXES, say_left_out, suffix_kind
from robustfeat.serving.inputs.sources import ImageSource
from robustfeat.serving.inputs.tar import TarReader, open_tar
from robustfeat.training.data.image_set import ImageSet, sort_classes

__all__ = ["CLASSES_NAME", "TarSplit", "read_class_names", "read_shards"]

CLASSES_NAME = "classes.txt"

_LABEL_BYTES = 2**24
_NUMBER = re.compile(r"[0-9]+")
_NONE = re.compile(r"-[0-9]+")


class _Members:
    """Image bytes at their places in the shards."""

    def __init__(
        self,
        shards: Sequence[Path],
        starts: NDArray[np.int64],
        offsets: NDArray[np.int64],
        sizes: NDArray[np.int64],
        names: bytes,
        ends: NDArray[np.int64],
    ) -> None:
        # Arrays and one text: a million objects for a million images would be copied into each worker.
        self._shards, self._starts = shards, starts
        self._offsets, self._sizes, self._names, self._ends = offsets, sizes, names, ends

    def read(self, index: int) -> bytes:
        # Opened each time: there may be more shards than a process may have files open, and it costs microseconds.
        place = str(self._shards[self._shard(index)])
        return ImageSource("", place, "tar", int(self._offsets[index]), int(self._sizes[index])).read()

    def name(self, index: int) -> str:
        start = int(self._ends[index - 1]) if index else 0
        member = self._names[start : int(self._ends[index])].decode("utf-8", "replace")
        return f"{self._shards[self._shard(index)].name}/{member}"

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1


@dataclass(frozen=True)
class TarSplit:
    """The samples of a split's shards.

    Attributes:
        texts: the labels that occur, each once.
        labels: (N,) int64, positions in `texts`.
        digest: over the images' names and sizes.
        remark: the members that belong to no sample; empty without any.
    """

    source: _Members
    texts: tuple[str, ...]
    labels: NDArray[np.int64]
    digest: str
    remark: str

    def classes(self, names: tuple[str, ...] | None) -> tuple[str, ...]:
        """The class names from classes.txt, or else the labels, sorted as numbers if all are numbers."""
        return names or sort_classes(self.texts)

    def to_image_set(self, classes: tuple[str, ...], *, indexed: bool) -> ImageSet:
        """Labels as numbers within `classes`; `indexed`: numbers among the labels are such numbers already."""
        index = {name: number for number, name in enumerate(classes)}
        if indexed and all(_NUMBER.fullmatch(text) for text in self.texts):
            index = {str(number): number for number in range(len(classes))}
        numbers = np.array([index.get(text, -1) for text in self.texts], np.int64)
        labels = numbers[self.labels]
        if (labels < 0).any():
            row = int(np.argmax(labels < 0))
            raise DataError(
                f"{self.source.name(row)}: label {self.texts[self.labels[row]]!r} is none of the {len(classes)} "
                f"classes of {CLASSES_NAME if indexed else 'the training split'}"
            )
        digest = hashlib.sha256("\n".join(classes).encode(errors="surrogateescape"))
        digest.update(labels.tobytes())
        digest.update(self.digest.encode())
        remarks = (self.remark,) if self.remark else ()
        return ImageSet(classes, labels, self.source, digest.hexdigest(), remarks=remarks)


def read_shards(shards: Sequence[Path]) -> TarSplit:
    """The samples of uncompressed tar files, in order: their labels, and where their images are.

    Files of a shard are one sample where their names agree up to the first dot of the last part.

    Raises:
        DataError: a shard is damaged or compressed, or a sample has no image, no label or two of one.
    """
    texts: dict[str, int] = {}
    labels: list[NDArray[np.int64]] = []
    offsets: list[NDArray[np.int64]] = []
    sizes: list[NDArray[np.int64]] = []
    ends: list[NDArray[np.int64]] = []
    names: list[bytes] = []
    digest = hashlib.sha256()
    length = 0
    left_out: Counter[str] = Counter()
    for shard in shards:
        samples = list(_samples(shard, left_out))
        found = [sample.name.encode(errors="surrogateescape") for sample in samples]
        labels.append(np.array([texts.setdefault(sample.label, len(texts)) for sample in samples], np.int64))
        offsets.append(np.array([sample.offset for sample in samples], np.int64))
        sizes.append(np.array([sample.size for sample in samples], np.int64))
        ends.append(length + np.cumsum([len(name) for name in found], dtype=np.int64))
        names.append(b"".join(found))
        length += len(names[-1])
        digest.update(b"%s\0%d\0%s\0%s" % (os.fsencode(shard.name), len(found), names[-1], ends[-1].tobytes()))
        digest.update(sizes[-1].tobytes())
    if not length:
        raise DataError(f"{shards[0]}: holds no samples; expected images and their labels, KEY.jpg and KEY.cls")
    starts = np.concatenate([[0], np.cumsum([len(part) for part in labels])[:-1]]).astype(np.int64)
    source = _Members(
        shards, starts, np.concatenate(offsets), np.concatenate(sizes), b"".join(names), np.concatenate(ends)
    )
    said = say_left_out(left_out)
    remark = f"{shards[0]}{' and others' if len(shards) > 1 else ''}: {said}" if said else ""
    return TarSplit(source, tuple(texts), np.concatenate(labels), digest.hexdigest(), remark)


def read_class_names(file: Path) -> tuple[str, ...] | None:
    """The lines of classes.txt, the names of classes 0, 1, 2, ...; None where there is no such file.

    Raises:
        DataError: it is not text, or a line is empty or there twice.
    """
    try:
        names = tuple(line.strip() for line in file.read_text("utf-8-sig").rstrip().splitlines())
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "not UTF-8"
        raise DataError(f"{file}: cannot be read ({reason}); expected a class name a line") from exc
    first: dict[str, int] = {}
    for number, name in enumerate(names, start=1):
        if not name or first.setdefault(name, number) != number:
            reason = f"repeats line {first[name]}, {name!r}" if name else "is empty"
            raise DataError(f"{file}: line {number} {reason}; expected the name of class {number - 1}")
    return names or None


@dataclass(slots=True)
class _Sample:
    name: str = ""  # name of the image
    offset: int = 0
    size: int = 0
    label: str = ""
    label_kind: str = ""


def _samples(shard: Path, left_out: Counter[str]) -> Iterator[_Sample]:
    found: dict[str, _Sample] = {}
    with open_tar(str(shard), error=DataError, complete=True) as archive:
        for name, offset, size, regular in archive.members():
            folder, _, base = name.rpartition("/")
            stem, _, suffix = base.partition(".")
            kind = f".{suffix.lower()}"
            if not regular or not stem or (kind not in IMAGE_SUFFIXES and kind not in {".cls", ".json"}):
                left_out["hidden" if not stem else suffix_kind(base) if regular else "links"] += 1
                continue
            key = f"{folder}/{stem}" if folder else stem
            sample = found.setdefault(key, _Sample())
            if kind in IMAGE_SUFFIXES:
                if sample.name:
                    raise DataError(
                        f"{shard}: sample {key!r} has two images, {sample.name} and {name}", fix="remove one"
                    )
                sample.name, sample.offset, sample.size = name, offset, size
            elif sample.label_kind != ".cls" and (label := _read_label(archive, offset, size, kind, shard, name)):
                sample.label, sample.label_kind = label, kind
    for key, sample in found.items():
        if not sample.name:
            raise DataError(
                f"{shard}: sample {key!r} has no image; expected {key}.jpg, or another of Pillow's suffixes"
            )
        if not sample.label:
            raise DataError(
                f"{shard}: sample {key!r} has no label; expected {key}.cls, or {key}.json with label or cls, "
                "a number from 0 or text"
            )
        yield sample


def _read_label(archive: TarReader, offset: int, size: int, kind: str, shard: Path, name: str) -> str:
    if size > _LABEL_BYTES:
        raise DataError(f"{shard}: {name} has {size:,} bytes; a label may have {_LABEL_BYTES:,}", fix="pack it again")
    return _label(kind, archive.read(offset, size), shard, name)


def _label(kind: str, data: bytes, shard: Path, name: str) -> str:
    """A label as text, a number without leading zeros; empty where there is none, for which -1 stands as well."""
    try:
        text = data.decode("utf-8-sig").strip()
        if kind == ".json":
            about = json.loads(text)
            value = about.get("label", about.get("cls")) if isinstance(about, dict) else None
            text = str(value).strip() if isinstance(value, int | str) and not isinstance(value, bool) else ""
    except (ValueError, RecursionError) as exc:
        expected = "text in UTF-8" if kind == ".cls" else "JSON"
        raise DataError(f"{shard}: {name} is not {expected} ({exc})", fix="pack it again") from exc
    if _NONE.fullmatch(text):
        return ""
    return str(int(text)) if _NUMBER.fullmatch(text) and len(text) < 20 else text
