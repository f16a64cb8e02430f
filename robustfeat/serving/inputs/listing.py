"""Lists the images that a command's arguments name."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from robustfeat.errors import InputError, first_line
from robustfeat.serving.inputs.choice import IMAGE_SUFFIXES, Choice, is_hidden, say_left_out
from robustfeat.serving.inputs.input_list import InputList
from robustfeat.serving.inputs.parquet import find_images, parquet_path
from robustfeat.serving.inputs.remote import forbids, is_remote, open_remote, remote_entries
from robustfeat.serving.inputs.sources import ImageSource
from robustfeat.serving.inputs.tar import open_tar
from robustfeat.system import INHERITS

__all__ = ["list_folder", "list_inputs"]

_PARQUET = re.compile(r"(?P<file>.*\.parquet)(:(?P<column>[^:/]+))?", re.IGNORECASE | re.DOTALL)
_ARCHIVE = re.compile(r"\.(zip|rar|7z)$", re.IGNORECASE)
_TABLE = re.compile(r"\.(txt|lst|csv|tsv|jsonl?|ndjson)$", re.IGNORECASE)
_COMPRESSED_TAR = re.compile(r"\.(tgz|tbz2?|txz|tar\.\w+)$", re.IGNORECASE)


def list_inputs(
    arguments: Sequence[str | Path],
    *,
    files_from: str | Path | None = None,
    null: bool = False,
    match: Sequence[str] = (),
    folder: Path | None = None,
) -> InputList:
    """Lists the images that the arguments name, in the order of the arguments.

    An argument is local or a URL that fsspec knows (s3://, gs://, hf://, ...). It is one of these:

    - a folder. Every file in it with an image suffix is a row, in the byte order of the relative paths. Broken links
      and unreadable files are rows, too. Other and hidden files are counted by kind.
    - a file, which is always a row, or a glob, whose files are rows and whose folders are listed.
    - FILE.tar, whose members with an image suffix are rows, or FILE.parquet (FILE.parquet:COLUMN) with its rows.
    - `-`, which means `files_from="-"`.

    Args:
        arguments: see above.
        files_from: a file with more arguments, one per line; `-` for stdin. A missing file in it is a failed row.
        null: the lines of `files_from` end in NUL.
        match: patterns that choose files of folders and archives instead of their suffix; see `Choice`.
        folder: see `InputList`.

    Raises:
        InputError: an argument does not exist or cannot be read, a folder lies in another one, or there are no images.
    """
    try:
        listing = InputList(choice=Choice(match), folder=folder)
    except OSError as exc:
        raise InputError(
            f"{folder}: the list of inputs cannot be written ({exc.strerror})", fix="choose another `out`"
        ) from exc
    try:
        _require_apart([str(argument).removeprefix("file://") for argument in arguments])
        for argument in map(str, arguments):
            if argument == "-":
                _list_lines("-", null, listing)
            else:
                _list_argument(argument, listing)
        if files_from is not None:
            _list_lines(str(files_from), null, listing)
        if not len(listing):
            places = ", ".join(map(str, arguments)) or str(files_from)
            aside = f"; {said}" if (said := say_left_out(listing.left_out)) else ""
            wanted = (
                f"matching {' or '.join(match)}" if match else f"with the suffixes {', '.join(sorted(IMAGE_SUFFIXES))}"
            )
            raise InputError(
                f"{places}: no images found{aside}; expected files {wanted}, "
                "or archives named themselves: FILE.tar, FILE.parquet"
            )
    except BaseException as exc:
        listing.close()
        if isinstance(exc, OSError):
            raise InputError(f"the list of inputs cannot be written ({exc.strerror or exc})", fix="free space") from exc
        raise
    return listing


def _require_apart(arguments: Sequence[str]) -> None:
    """Refuses a folder inside another one: each of its images would be two rows under two paths."""
    folders = {os.path.realpath(one): one for one in arguments if not is_remote(one) and os.path.isdir(one)}
    for real, folder in folders.items():
        above = real
        while (parent := os.path.dirname(above)) != above:
            above = parent
            if above in folders:
                raise InputError(
                    f"{folder}: lies in {folders[above]}, so that its images would be two rows each",
                    fix=f"leave out {folder}",
                )


def list_folder(root: Path) -> tuple[list[ImageSource], dict[str, int]]:
    """The images under `root` in the byte order of their relative paths, and the number of other files by kind."""
    listing = InputList()
    with listing:
        _list_argument(os.fspath(root), listing)
        return list(listing), listing.left_out


def _list_argument(argument: str, listing: InputList) -> None:
    argument = argument.removeprefix("file://")
    if _ARCHIVE.search(argument) and not os.path.isdir(argument):
        raise InputError(
            f"{argument}: archives of this kind are not supported", fix="unpack it, or pack its files as a .tar"
        )
    if _TABLE.search(argument) and not os.path.isdir(argument):
        raise InputError(
            f"{argument}: not an image", fix="pass a list of paths as `files_from`, tables of images as Parquet"
        )
    if is_remote(argument):
        _list_remote(argument, listing)
    elif os.path.isdir(argument):
        listing.extend_sorted(_walk(argument, listing))
    elif os.path.lexists(argument):
        _list_file(argument, os.path.basename(argument), listing)
    elif (match := _PARQUET.fullmatch(argument)) and match["column"] and os.path.exists(match["file"]):
        _list_file(argument, os.path.basename(match["file"]), listing)
    elif glob.has_magic(argument):
        listing.extend_sorted(_glob(argument, listing))
    else:
        raise InputError(f"{argument}: no such file or folder; expected a folder of images or an image file")


def _list_file(file: str, path: str, listing: InputList) -> None:
    """Lists one local or remote file, an image or an archive of images. `path` is its path in the index."""
    if (match := _PARQUET.fullmatch(file)) is not None:
        name, place = path.removesuffix(f":{match['column']}"), match["file"]
        place = place if is_remote(place) else os.path.abspath(place)
        column, rows = find_images(place, match["column"])
        for row in range(rows):
            listing.append(ImageSource(parquet_path(name, row), place, "parquet", row, 0, column))
    elif file.lower().endswith(".tar"):
        listing.extend_sorted(_tar_members(file, path, listing))
    elif _COMPRESSED_TAR.search(file):
        raise InputError(f"{file}: a compressed archive has no random access", fix="decompress it to a .tar first")
    else:
        listing.append(ImageSource(path, file if is_remote(file) else os.path.abspath(file)))


def _list_lines(place: str, null: bool, listing: InputList) -> None:
    try:
        with sys.stdin.buffer if place == "-" else open(place, "rb") as handle:
            if INHERITS:  # another program may have made a terminal or pipe non-blocking
                os.set_blocking(handle.fileno(), True)
            for number, line in enumerate(_split(handle, b"\0" if null else b"\n")):
                entry = os.fsdecode(line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line).removeprefix("file://")
                entry = entry if null else entry.removesuffix("\r")
                if not entry:
                    continue
                if not is_remote(entry) and os.path.isdir(entry):
                    prefix = entry.rstrip("/") + "/"
                    listing.extend_sorted(_walk(entry, listing, prefix))
                else:
                    _list_file(entry, entry.removeprefix("./"), listing)
    except OSError as exc:
        raise InputError(f"cannot be read ({exc.strerror})", argument="files_from", value=place) from exc


def _split(handle: IO[bytes], separator: bytes) -> Iterator[bytes]:
    if separator == b"\n":
        for line in handle:
            yield line.removesuffix(b"\n")
        return
    rest = b""
    while block := handle.read(2**16):
        *lines, rest = (rest + block).split(separator)
        yield from lines
    yield rest


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a circular link, or a link to a forbidden place
        return False


def _walk(root: str, listing: InputList, prefix: str = "") -> Iterator[ImageSource]:
    base = os.path.abspath(root)
    # Follow linked folders, except a folder inside itself.
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while waiting:
        relative, above = waiting.pop()
        folder = os.path.join(base, relative)
        try:
            status = os.stat(folder)
            here = (status.st_dev, status.st_ino)
            if here in above:
                listing.choice.leave_out("folders in themselves")
                continue
            with os.scandir(folder) as entries:
                for entry in entries:
                    path = f"{relative}/{entry.name}" if relative else entry.name
                    if _is_folder(entry):
                        if is_hidden(entry.name):
                            listing.choice.leave_out("hidden")
                        else:
                            waiting.append((path, above | {here}))
                    elif listing.choice.takes(path):
                        yield ImageSource(prefix + path, os.path.join(base, path))
        except OSError as exc:
            place = os.path.join(root, relative) if relative else root
            raise _unlisted(place, exc) from exc


def _unlisted(place: str, exc: OSError) -> InputError:
    return InputError(f"{place}: cannot be listed ({exc.strerror})", fix="make it readable or leave it out")


def _glob(pattern: str, listing: InputList) -> Iterator[ImageSource]:
    root = _fixed_folder(pattern)

    def is_above(status: os.stat_result, folder: str) -> bool:
        inner = folder[len(root) :].strip("/").split("/")
        return any(
            os.path.samestat(status, os.stat(os.path.join(root or ".", *inner[:depth])))
            for depth in range(len(inner) + 1)
        )

    def entries(folder: str) -> Iterator[tuple[str, bool]]:
        try:
            with os.scandir(folder or ".") as found:
                for entry in found:
                    is_folder = _is_folder(entry)
                    if not (is_folder and entry.is_symlink() and is_above(entry.stat(), folder)):
                        yield entry.name, is_folder
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as exc:
            raise _unlisted(folder, exc) from exc

    for match, is_folder in _matches(entries, root, pattern):
        path = match[len(root) :].lstrip("/")
        if not is_folder:
            yield from _sources_of(match, path, listing)
        elif "**" not in pattern:  # with **, the folder's files match by themselves
            yield from _walk(match, listing, f"{path}/")


def _matches(
    entries: Callable[[str], Iterable[tuple[str, bool]]], root: str, pattern: str
) -> Iterator[tuple[str, bool]]:
    """Yields matching paths, and whether each is a folder.

    The rules are those that `glob.iglob(recursive=True)` has, but circular links end.

    Args:
        entries: lists a folder: names, and whether each is a folder. Empty for a missing folder.
        root: the part of the pattern without wildcards.
        pattern: the whole pattern.
    """

    def under(folder: str, parts: Sequence[str]) -> Iterator[tuple[str, bool]]:
        part, *rest = parts
        if rest and not glob.has_magic(part):
            yield from under(os.path.join(folder, part), rest)
            return
        if part == "**" and rest:
            yield from under(folder, rest)
        for name, is_folder in list(entries(folder)):
            place = os.path.join(folder, name)
            if name.startswith(".") and not part.startswith("."):
                continue
            if part == "**" and is_folder:
                yield from under(place, parts)
            elif part == "**" or fnmatch.fnmatchcase(name, part):
                if not rest:
                    yield place, is_folder
                elif is_folder and part != "**":
                    yield from under(place, rest)

    wanted = [part for part in pattern[len(root) :].split("/") if part]
    for place, is_folder in under(root, wanted):
        if is_folder or not pattern.endswith("/"):
            yield place, is_folder


def _sources_of(file: str, path: str, listing: InputList) -> Iterator[ImageSource]:
    with InputList(choice=listing.choice) as found:
        _list_file(file, path, found)
        yield from found


def _fixed_folder(pattern: str) -> str:
    """The part of a pattern before its first folder with a wildcard. Paths of its files are relative to it."""
    parts = pattern.split("/")
    fixed = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    return "/".join(parts[:fixed]) or ("/" if pattern.startswith("/") else "")


def _tar_members(file: str, path: str, listing: InputList) -> Iterator[ImageSource]:
    place = file if is_remote(file) else os.path.abspath(file)
    with open_tar(file) as archive:
        for member in archive.members():
            if not listing.choice.takes(member.name):
                continue
            if member.regular:
                yield ImageSource(f"{path}/{member.name}", place, "tar", member.offset, member.size)
            else:
                reason = "a link or special member of the archive"
                yield ImageSource(f"{path}/{member.name}", place, "failed", detail=reason)


def _list_remote(url: str, listing: InputList) -> None:
    match = _PARQUET.fullmatch(url)
    filesystem, path = open_remote(match["file"] if match else url)

    def walk(root: str, prefix: str = "") -> Iterator[ImageSource]:
        waiting = [""]
        while waiting:
            relative = waiting.pop()
            for name, is_folder in remote_entries(filesystem, f"{root}/{relative}".rstrip("/")):
                place = f"{relative}{name}"
                if is_folder:
                    if is_hidden(name):
                        listing.choice.leave_out("hidden")
                    else:
                        waiting.append(f"{place}/")
                elif listing.choice.takes(place):
                    yield ImageSource(prefix + place, filesystem.unstrip_protocol(f"{root}/{place}"))

    def matches() -> Iterator[ImageSource]:
        root = _fixed_folder(path)
        pattern = f"{path}/" if url.endswith("/") else path
        for place, is_folder in _matches(lambda folder: remote_entries(filesystem, folder), root, pattern):
            relative = place[len(root) :].lstrip("/")
            if not is_folder:
                yield from _sources_of(filesystem.unstrip_protocol(place), relative, listing)
            elif "**" not in pattern:
                yield from walk(place, f"{relative}/")

    try:
        filesystem.invalidate_cache()
        try:
            kind = filesystem.info(path)["type"]  # `isfile` and `isdir` return False when the network fails
        except FileNotFoundError as exc:
            if forbids(exc):
                raise
            kind = None
        if kind == "directory":
            listing.extend_sorted(walk(path))
        elif kind is not None:
            _list_file(url, url.rpartition("/")[2], listing)
        elif glob.has_magic(path):
            listing.extend_sorted(matches())
        else:
            raise InputError(f"{url}: no such file or folder")
    except InputError:
        raise
    except Exception as exc:  # each filesystem raises its own errors
        reason = forbids(exc) or f"{type(exc).__name__}: {first_line(exc)}"
        raise InputError(f"{url}: cannot be listed ({reason})") from exc
