"""Defines `Labels`, the labels of images by path."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from robustfeat.errors import InputError
from robustfeat.serving.heads.cells import SEPARATOR

__all__ = ["Labels", "Unlabelled", "check_label"]


@dataclass(frozen=True)
class Labels:
    """Labels by path.

    Attributes:
        source: where the labels come from, for messages.
        by_path: path to labels, one or several; None if the first folder of each path is its label.
        repeated: number of lines that repeat another one.
    """

    source: str
    by_path: Mapping[str, tuple[str, ...]] | None
    repeated: int = 0

    def key(self, path: str) -> str | None:
        """The labelled path of an image: an equal path, or else the only one with an equal normalised text.

        macOS writes é as two characters, other systems as one. Tables often have spaces beside their separators.
        """
        if self.by_path is None or path in self.by_path:
            return path
        return self._by_form.get(_form(path))

    @cached_property
    def _by_form(self) -> dict[str, str]:
        forms = [(_form(path), path) for path in self.by_path or ()]
        counts = Counter(form for form, _ in forms)
        return {form: path for form, path in forms if counts[form] == 1}

    def matched(self, paths: Iterable[str]) -> Labels:
        """Matches labels with images whose paths are written in another way.

        Such a label belongs to the only image whose path ends with the label's path or is its end. So absolute paths
        and bare file names are found, unless they are ambiguous.

        Raises:
            InputError: an image has one label by its own path and another one by such a path.
        """
        if self.by_path is None:
            return self
        keys = {path: self.key(path) for path in paths}
        by_path, repeated = dict(self.by_path), self.repeated
        for image, others in self._other_names(keys).items():
            own = keys[image]
            if own is not None:
                for other in others:
                    self._require_same(own, other)
                    del by_path[other]
                repeated += len(others)
            elif len(others) == 1:
                by_path[image] = by_path.pop(others[0])
        return replace(self, by_path=by_path, repeated=repeated)

    def _other_names(self, keys: Mapping[str, str | None]) -> dict[str, list[str]]:
        """Labelled paths by image that match it by their ends; `keys` has each image's labelled path or None."""
        used, images = set(keys.values()), _by_name(keys)
        found: dict[str, list[str]] = {}
        for path in self.by_path or ():
            if path not in used:
                meant = [image for image in images.get(_name(path), ()) if _ends(image, path)]
                if len(meant) == 1:
                    found.setdefault(meant[0], []).append(path)
        return found

    def _require_same(self, path: str, other: str) -> None:
        assert self.by_path is not None
        if self.by_path[path] != self.by_path[other]:
            one, another = (SEPARATOR.join(self.by_path[name]) for name in (path, other))
            raise InputError(f"{self.source}: {path} is labelled {one!r}, and {other} {another!r}", fix="leave one")

    def of(self, path: str) -> tuple[str, ...] | None:
        """The labels of an image; None if it has no label, or is in no class folder."""
        if self.by_path is not None:
            key = self.key(path)
            return None if key is None else self.by_path[key]
        folder, slash, rest = path.partition("/")
        if folder.endswith(".tar"):
            folder, slash, rest = rest.partition("/")
        if not slash or not folder or folder.endswith(".parquet"):
            return None
        return (check_label(folder, path),)


def _by_name(paths: Iterable[str]) -> dict[str, list[str]]:
    """Groups paths by file name."""
    named: dict[str, list[str]] = {}
    for path in dict.fromkeys(paths):
        named.setdefault(_name(path), []).append(path)
    return named


def _name(path: str) -> str:
    return _plain(path).rpartition("/")[2]


def _ends(path: str, other: str) -> bool:
    """Whether one path is the end of the other."""
    one, another = f"/{_plain(path)}", f"/{_plain(other)}"
    return one.endswith(another) or another.endswith(one)


def _plain(path: str) -> str:
    """`_form` with slashes instead of Windows's backslashes."""
    return _form(path).replace("\\", "/")


def _form(path: str) -> str:
    """Normalises Unicode and strips spaces."""
    return unicodedata.normalize("NFC", path).strip()


class Unlabelled:
    """Counts paths without a label.

    Args:
        labels: the labels.

    Attributes:
        count: number of paths so far.
        first: the first path.
    """

    def __init__(self, labels: Labels) -> None:
        self._where = "in no class folder" if labels.by_path is None else "without a label"
        self.count, self.first = 0, ""

    def add(self, path: str) -> None:
        """Counts a path."""
        self.first = self.first if self.count else path
        self.count += 1

    def summary(self, what: str) -> str:
        """The count and the first path as text; empty if there are none. `what` names them in the plural."""
        return f"{what} {self._where}: {self.count:,}, such as {self.first}" if self.count else ""


def check_label(label: str, place: str) -> str:
    """Normalises a label to Unicode's form NFC.

    Raises:
        InputError: the label is not UTF-8; `place` is its place for the message.
    """
    try:
        label.encode()
    except UnicodeEncodeError:
        raise InputError(f"{place}: the label {label!r} is not UTF-8", fix="write it in that encoding") from None
    return unicodedata.normalize("NFC", label)
