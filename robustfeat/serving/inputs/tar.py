"""Finds the members of uncompressed tar archives, local or remote, and reports damage."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, NamedTuple, NoReturn

from robustfeat.errors import InputError, RobustFeatError, first_line
from robustfeat.hub.image_files import name_contents
from robustfeat.serving.inputs.remote import is_remote, open_remote

__all__ = ["TarMember", "TarReader", "open_tar"]

_BLOCK = 512
_AHEAD = 8192  # one read gets a header and a small file
_MAX_EXTENSION_BYTES = 2**24
_REGULAR = b"0\0" + b"7"
_WITHOUT_CONTENT = b"123456"
_OCTAL = re.compile(rb"[0-7]*")
_SIZE = re.compile(r"[0-9]{1,18}")
_NAMED_BY = {b"path", b"size", b"GNU.sparse.name"}
_SPARSE = "GNU.sparse"


class TarMember(NamedTuple):
    """A member of an archive, except folders.

    Attributes:
        name: its path without a leading `./`. Bytes that are not UTF-8 are lone surrogates (`os.fsdecode`).
        offset, size: position and size of its bytes in the archive.
        regular: false for links, devices and sparse files, whose bytes cannot be read in place.
    """

    name: str
    offset: int
    size: int
    regular: bool


class TarReader:
    """Reads the headers of an archive.

    The standard library takes 2.5 times as long, and treats a damaged header as the end.

    Args:
        handle: the archive, opened for random access.
        place: the archive's name in messages.
        error: the class to raise for a damaged archive.
        complete: also refuse an archive with sparse files, without an end mark, or with data after it.

    Source: POSIX.1-2017, pax, and GNU tar's long names and sparse files.
    """

    def __init__(
        self, handle: IO[bytes] | Any, place: str, *, error: type[RobustFeatError] = InputError, complete: bool = False
    ) -> None:
        self._handle, self._place, self._error, self._complete = handle, place, error, complete
        self._window, self._window_at = b"", 0
        with self._readable():
            self._length: int = handle.seek(0, os.SEEK_END)

    def read(self, offset: int, size: int) -> bytes:
        """Reads bytes of the archive, fewer at its end."""
        first = offset - self._window_at
        if not 0 <= first <= len(self._window) - size:
            if offset >= self._length:
                return b""
            with self._readable():
                self._handle.seek(offset)
                self._window = self._handle.read(max(size, _AHEAD))
            self._window_at, first = offset, 0
        return self._window[first : first + size]

    def members(self) -> Iterator[TarMember]:
        """Yields the members in order, without folders.

        Raises:
            RobustFeatError: the archive is damaged or not a tar file.
        """
        offset = 0
        extra: dict[str, str] = {}
        while header := self._header(offset):
            kind = header[156:157]
            at = self._content(header, offset)
            size = self._size(header, kind, extra, offset)
            if at + size > self._length:
                self._damaged(offset, f"a member of {size:,} bytes begins there, but the file ends before it does")
            if kind in b"LKxXg" and size > _MAX_EXTENSION_BYTES:
                self._damaged(offset, f"an extended header of {size:,} bytes begins there")
            if kind == b"L":
                extra["path"] = os.fsdecode(self.read(at, size).partition(b"\0")[0])
            elif kind in b"xX":
                extra.update(self._records(self.read(at, size), offset))
            elif kind == b"g":
                if self._records(self.read(at, size), offset):
                    self._damaged(offset, "an extended header there gives all members one name or size")
            elif kind != b"K":
                sparse = kind == b"S" or _SPARSE in extra or "GNU.sparse.name" in extra
                if sparse and self._complete:
                    self._damaged(offset, "a sparse member begins there, which cannot be read")
                name = extra.get("GNU.sparse.name") or extra.get("path") or self._name(header)
                if kind != b"5" and not name.endswith("/"):
                    regular = kind in _REGULAR and not sparse
                    yield TarMember(name.removeprefix("./"), at, size, regular)
                extra = {}
            offset = at + -(-size // _BLOCK) * _BLOCK
        self._check_end(offset, extended=bool(extra))

    def _header(self, offset: int) -> bytes:
        """Reads a header; empty at the end of the members."""
        header = self.read(offset, _BLOCK)
        if not header.strip(b"\0") and (offset or len(header) == _BLOCK):
            return b""
        if len(header) < _BLOCK:
            self._refuse(offset, "the file ends inside a header; it is cut short")
        wanted = self._number(header[148:156], offset)
        blank = header[:148] + b" " * 8 + header[156:]
        # Some old programs sum signed bytes.
        if wanted != sum(blank) and wanted != sum(blank) - 256 * sum(byte > 127 for byte in blank):
            self._refuse(offset, "expected the header of a member")
        return header

    def _content(self, header: bytes, offset: int) -> int:
        """The position of a member's content, after its header and any extra headers of GNU's sparse files."""
        at = offset + _BLOCK
        more = header[156:157] == b"S" and header[482] != 0
        while more:
            block = self.read(at, _BLOCK)
            if len(block) < _BLOCK:
                self._damaged(offset, "a sparse member begins there, but the file ends before it does")
            more, at = block[504] != 0, at + _BLOCK
        return at

    def _size(self, header: bytes, kind: bytes, pax: dict[str, str], offset: int) -> int:
        if kind in _WITHOUT_CONTENT:  # links and folders, whose size field has no meaning
            return 0
        if kind in _REGULAR and "size" in pax:
            if not _SIZE.fullmatch(pax["size"]):
                self._damaged(offset, "its extended header is unreadable")
            return int(pax["size"])
        return self._number(header[124:136], offset)

    def _number(self, field: bytes, offset: int) -> int:
        if field[0] == 0x80:  # GNU's format for numbers that do not fit octal digits
            return int.from_bytes(field[1:], "big")
        digits = field.strip(b" \0")
        if not _OCTAL.fullmatch(digits):
            self._refuse(offset, "expected the header of a member")
        return int(digits or b"0", 8)

    def _name(self, header: bytes) -> str:
        name = header[:100].partition(b"\0")[0]
        prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
        return os.fsdecode(prefix + b"/" + name if prefix else name)

    def _records(self, data: bytes, offset: int) -> dict[str, str]:
        """Parses PAX lines, `LENGTH KEY=VALUE` with the length of the whole line, for a member's name and size."""
        records, at = {}, 0
        while at < len(data):
            # A header may have millions of records, so parsing one must only cost its own bytes.
            space = data.find(b" ", at, at + 19)
            digits = data[at:space] if space > 0 else b""
            if not digits.isdigit() or not len(digits) + 1 < int(digits) <= len(data) - at:
                self._damaged(offset, "its extended header is unreadable")
            key, _, value = data[space + 1 : at + int(digits) - 1].partition(b"=")
            if key in _NAMED_BY:
                records[key.decode()] = os.fsdecode(value)
            elif key.startswith(b"GNU.sparse"):
                records[_SPARSE] = ""
            at += int(digits)
        return records

    def _check_end(self, offset: int, *, extended: bool) -> None:
        if extended or offset > self._length or (self._complete and offset + _BLOCK > self._length):
            self._damaged(offset, "it has no end mark; it is cut short")
        if not self._complete:
            return
        while rest := self.read(offset, 2**20):
            if rest.strip(b"\0"):
                self._damaged(offset, "it has data after its end mark; archives were joined, or it is altered")
            offset += len(rest)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise self._error(f"{self._place}: cannot be read ({exc.strerror or first_line(exc)})") from exc

    def _refuse(self, offset: int, what: str) -> NoReturn:
        if offset == 0:
            head = self.read(0, _AHEAD)
            if head[257:262] != b"ustar" and (found := name_contents(head)):
                raise self._error(f"{self._place}: not a tar file; it is {found[0]}", fix=found[1])
            raise self._error(f"{self._place}: not a tar file; expected an uncompressed one, for example by tar cf")
        self._damaged(offset, what)

    def _damaged(self, offset: int, what: str) -> NoReturn:
        raise self._error(f"{self._place}: damaged at byte {offset:,}: {what}", fix="copy or pack it again")


@contextmanager
def open_tar(place: str, *, error: type[RobustFeatError] = InputError, complete: bool = False) -> Iterator[TarReader]:
    """Opens an archive by its path or URL; see `TarReader`.

    Raises:
        RobustFeatError: the archive cannot be opened.
    """
    try:
        if is_remote(place):
            filesystem, path = open_remote(place)
            handle = filesystem.open(path, "rb")
        else:
            handle = open(place, "rb", buffering=0)  # noqa: SIM115 - closed below, as the remote one is
    except OSError as exc:
        raise error(f"{place}: cannot be read ({exc.strerror or first_line(exc)})") from exc
    with handle:
        yield TarReader(handle, place, error=error, complete=complete)
