"""The reader of tar archives: the members that the standard library finds, and damage that it does not see."""

from __future__ import annotations

import contextlib
import io
import os
import random
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from robustfeat.errors import DataError, InputError, RobustFeatError
from robustfeat.serving.inputs.tar import TarMember, TarReader, open_tar


def read(place: Path, *, complete: bool = False) -> list[TarMember]:
    with open_tar(str(place), complete=complete) as archive:
        return list(archive.members())


def pack(place: Path, members: list[tuple[str, bytes]], kind: int = tarfile.GNU_FORMAT) -> bytearray:
    with tarfile.open(place, "w", format=kind) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return bytearray(place.read_bytes())


def sign(header: bytearray) -> bytearray:
    """The header with a checksum that fits."""
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return header


@pytest.mark.parametrize("kind", ["gnu", "posix", "ustar", "v7", "oldgnu"])
def test_members_are_those_of_the_standard_library(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "in"
    (source / "deep" / "empty").mkdir(parents=True)
    names = ["a.jpg", "deep/b é.jpg", "deep/zero.png", "note.txt"]
    if kind not in {"ustar", "v7"}:
        names.append("deep/" + "n" * 200 + ".jpg")
    for number, name in enumerate(names):
        (source / name).write_bytes(os.urandom(600 * number))
    (source / "soft.jpg").symlink_to("a.jpg")
    (source / "hard.jpg").hardlink_to(source / "deep" / "b é.jpg")
    if kind != "v7":
        os.mkfifo(source / "pipe.jpg")
    place = tmp_path / "a.tar"
    subprocess.run(["tar", "cf", place, f"--format={kind}", "-C", source, "."], check=True)
    found = read(place, complete=True)
    with tarfile.open(place) as archive:
        expected = [
            (member.name.removeprefix("./"), member.offset_data, member.size, member.isreg())
            for member in archive
            if not member.isdir()
        ]
    assert [(member.name, member.regular) for member in found] == [(name, regular) for name, *_, regular in expected]
    assert [member for member in found if member.regular] == [entry for entry in expected if entry[3]]
    assert len(found) == len(names) + (2 if kind == "v7" else 3)


@pytest.mark.parametrize("options", [["--format=gnu"], ["--format=posix"], ["--format=posix", "--sparse-version=0.1"]])
def test_sparse_members_are_named_and_passed_over(tmp_path: Path, options: list[str]) -> None:
    with open(tmp_path / "b.jpg", "wb") as handle:
        for place in range(50):  # more pieces than GNU's header holds
            handle.seek(place * 2**17)
            handle.write(b"x")
        handle.truncate(2**23)
    for name in ("a.jpg", "c.jpg"):
        (tmp_path / name).write_bytes(name.encode() * 300)
    files = ["a.jpg", "b.jpg", "c.jpg"]
    subprocess.run(["tar", "cSf", tmp_path / "a.tar", *options, "-C", tmp_path, *files], check=True)
    found = read(tmp_path / "a.tar")
    assert [(member.name, member.regular) for member in found] == [("a.jpg", True), ("b.jpg", False), ("c.jpg", True)]
    data = (tmp_path / "a.tar").read_bytes()
    assert data[found[2].offset : found[2].offset + found[2].size] == b"c.jpg" * 300
    with pytest.raises(InputError, match=r"a\.tar: damaged at byte [\d,]+: a sparse member begins there"):
        read(tmp_path / "a.tar", complete=True)


def test_only_a_complete_archive_needs_the_mark_of_its_end(tmp_path: Path) -> None:
    place = tmp_path / "a.tar"
    data = pack(place, [("a.jpg", b"x" * 512)])
    for content, message in (
        (data[:1024], "it has no end mark"),
        (data[:1100], "it has no end mark"),
        (data + data, "it has data after its end mark"),
    ):
        place.write_bytes(content)
        assert read(place) == [("a.jpg", 512, 512, True)]
        with pytest.raises(InputError, match=message):
            read(place, complete=True)


def test_a_checksum_of_signed_bytes_is_accepted(tmp_path: Path) -> None:
    place = tmp_path / "a.tar"
    data = pack(place, [("é.jpg", b"x")])
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(byte - 256 * (byte > 127) for byte in data[:512])
    place.write_bytes(data)
    assert [member.name for member in read(place)] == ["é.jpg"]


@pytest.mark.parametrize("digits", [b"-0000001000\0", b"+0000000000\0", b"0_000000000\0", b"0x000000000\0"])
def test_numbers_that_are_not_octal_are_damage(tmp_path: Path, digits: bytes) -> None:
    place = tmp_path / "a.tar"
    data = pack(place, [("a.jpg", b"x"), ("b.jpg", b"x" * 512)])
    header = data[1024:1536]
    header[124:136] = digits  # -512: the header would come again, for ever
    data[1024:1536] = sign(header)
    place.write_bytes(data)
    with pytest.raises(InputError, match="damaged at byte 1,024: expected the header of a member"):
        read(place)


@pytest.mark.parametrize(
    "record",
    [b"size=" + b"9" * 5000, b"size=12x", b"size=-1536", b"path", b"99999 path=a"],
    ids=["long", "text", "negative", "bare", "length"],
)
def test_extended_headers_that_make_no_sense_are_damage(tmp_path: Path, record: bytes) -> None:
    place = tmp_path / "a.tar"
    if record.startswith(b"size"):
        length = len(record) + 2 + len(str(len(record)))
        record = b"%d %s\n" % (length if len(str(length)) == len(str(len(record))) else length + 1, record)
    data = pack(place, [("x.jpg", record), ("b.jpg", b"x")])
    data[156:157] = b"x"
    data[:512] = sign(data[:512])
    place.write_bytes(data)
    with pytest.raises(InputError, match=r"damaged at byte [0-9,]+: its extended header is unreadable"):
        read(place)


@pytest.mark.parametrize(("record", "message"), [("path", "gives all members one name or size"), ("comment", None)])
def test_a_header_for_all_members_names_none_of_them(tmp_path: Path, record: str, message: str | None) -> None:
    """A million members, each with a name of a megabyte, would fill the disk with the list of inputs."""
    place = tmp_path / "a.tar"
    with tarfile.open(place, "w", format=tarfile.PAX_FORMAT, pax_headers={record: "x" * 2**20}) as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))
    if message is None:
        assert [member.name for member in read(place)] == ["a.jpg"]
    else:
        with pytest.raises(InputError, match=f"damaged at byte 0: an extended header there {message}"):
            read(place)


def test_headers_with_random_numbers_end_in_members_or_damage(tmp_path: Path) -> None:
    """Each member takes at least its header, so that no archive has more of them than its size allows."""
    place = tmp_path / "a.tar"
    original = pack(place, [("a.jpg", b"x" * 700), ("n" * 200 + ".jpg", b"x")], tarfile.PAX_FORMAT)
    draw = random.Random(0)
    fields = [(124, 12), (156, 1), (100, 8), (345, 20), (482, 1)]
    for _ in range(500):
        data = bytearray(original)
        for start in draw.sample(range(0, len(data) - 1023, 512), 2):
            at, length = draw.choice(fields)
            kinds = [b"\x80" + draw.randbytes(11), b"\xff" * 12, b"-0000001000\0", draw.randbytes(12), b"SLKxg5"]
            data[start + at : start + at + length] = draw.choice(kinds)[:length].ljust(length, b"\0")
            data[start : start + 512] = sign(data[start : start + 512])
        place.write_bytes(data)
        with contextlib.suppress(InputError):
            found = read(place)
            assert len(found) <= len(data) // 512
            assert all(0 <= member.offset <= member.offset + member.size <= len(data) for member in found)


def test_extended_headers_of_any_size_are_not_read(tmp_path: Path) -> None:
    place = tmp_path / "a.tar"
    data = pack(place, [("x.jpg", b""), ("b.jpg", b"x")])
    data[156:157], data[124:136] = b"L", b"%011o\0" % 2**28
    data[:512] = sign(data[:512])
    with open(place, "wb") as handle:
        handle.write(data)
        handle.truncate(2**29)
    with pytest.raises(InputError, match="damaged at byte 0: an extended header of 268,435,456 bytes"):
        read(place)


def extended(place: Path, records: bytes) -> None:
    """An archive of one member, with these PAX records before it."""
    data = pack(place, [("x.jpg", records), ("b.jpg", b"x")])
    data[156:157] = b"x"
    data[:512] = sign(data[:512])
    place.write_bytes(data)


def test_millions_of_records_cost_their_own_bytes(tmp_path: Path) -> None:
    """Read by cutting off one after the other, these took hours."""
    place = tmp_path / "a.tar"
    extended(place, b"5 a=\n" * 400_000)
    began = time.process_time()
    assert [member.name for member in read(place)] == ["b.jpg"]
    assert time.process_time() - began < 5


def test_records_that_are_not_needed_are_not_kept(tmp_path: Path) -> None:
    place = tmp_path / "a.tar"
    records = b"".join(b"26 GNU.sparse.%010d=\n" % number for number in range(1000))
    extended(place, records)
    with open_tar(str(place)) as archive:
        assert [member.regular for member in archive.members()] == [False]
        assert len(archive._records(records, 0)) == 1


def test_an_extended_header_without_its_member_is_damage(tmp_path: Path) -> None:
    place = tmp_path / "a.tar"
    data = pack(place, [("n" * 200, b"x")])
    place.write_bytes(data[:1024])
    with pytest.raises(InputError, match="damaged at byte 1,024: it has no end mark"):
        read(place)


def test_errors_are_of_the_kind_that_is_asked_for(tmp_path: Path) -> None:
    missing = open_tar(str(tmp_path / "a.tar"), error=DataError)
    with pytest.raises(DataError, match=r"a\.tar: cannot be read \(No such file or directory\)"), missing:
        pass
    with pytest.raises(DataError, match="notes: not a tar file; expected an uncompressed one"):
        list(TarReader(io.BytesIO(b"notes"), "notes", error=DataError).members())


@pytest.mark.parametrize("error", [InputError, DataError])
def test_an_archive_that_is_a_pipe_is_named(tmp_path: Path, error: type[RobustFeatError]) -> None:
    place = tmp_path / "a.tar"
    os.mkfifo(place)
    writer = os.open(place, os.O_RDWR)  # so that opening to read does not wait
    try:
        with pytest.raises(error, match=f"{place}: cannot be read"), open_tar(str(place), error=error):
            pass
    finally:
        os.close(writer)
