"""Which images the arguments of `robustfeat embed` name, and in which order; all of it on this machine."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from robustfeat import FeatureExtractor
from robustfeat.errors import InputError
from robustfeat.serving.bulk import pipeline
from robustfeat.serving.bulk.embedding import embed_files
from robustfeat.serving.decoding import parts
from robustfeat.serving.decoding.pool import DecoderPool
from robustfeat.serving.decoding.worker import Decoded, Task
from robustfeat.serving.inputs import input_list
from robustfeat.serving.inputs.choice import Choice, say_left_out
from robustfeat.serving.inputs.input_list import InputList
from robustfeat.serving.inputs.listing import list_folder, list_inputs
from robustfeat.serving.inputs.parquet import ParquetImages
from robustfeat.serving.inputs.sources import ImageSource
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    return FeatureExtractor.from_pretrained(threads=1, streams=1)


def listed(*arguments: str | Path, **options: Any) -> list[ImageSource]:
    with list_inputs(arguments, **options) as found:
        return list(found)


def paths(*arguments: str | Path, **options: Any) -> list[str]:
    return [image.path for image in listed(*arguments, **options)]


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(os.fsencode(name))
    return root


def embedded(extractor: FeatureExtractor, out: Path, *arguments: str | Path, **options: Any) -> list[dict[str, Any]]:
    """The index of an embedding run; the features are checked against it."""
    with list_inputs(arguments, **options) as found:
        embed_files(extractor, found, out, workers=1, quiet=True)
    index = [json.loads(line) for line in out.with_suffix(".index.jsonl").read_bytes().splitlines()]
    finite = np.isfinite(np.load(out)).all(1)
    assert [row["error"] is None for row in index] == finite.tolist()
    return index


# tar


def pack(place: Path, *members: tuple[str, bytes] | tarfile.TarInfo, kind: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(place, "w", format=kind) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return place


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_members_of_a_tar_are_rows_in_the_byte_order_of_their_names(tmp_path: Path, kind: int) -> None:
    long = "/".join(["folder"] * 12) + "/long.jpg"
    names = ["b.jpg", "a/z.PNG", "a-1/y.jpg", "Z.jpg", "é.jpg", "empty.jpg", long, "./dot/x.jpg"]
    files = [(name, os.urandom(len(name) * 100 if name != "empty.jpg" else 0)) for name in names]
    place = pack(tmp_path / "shard.tar", special("a", tarfile.DIRTYPE), *files, ("labels.json", b"{}"), kind=kind)
    with list_inputs([place]) as found:
        images, left_out = list(found), found.left_out
    expected = sorted((f"shard.tar/{name.removeprefix('./')}".encode(), name) for name in names)
    assert [image.path.encode() for image in images] == [path for path, _ in expected]
    assert left_out == {".json": 1}
    with tarfile.open(place) as archive:
        for image, (_, name) in zip(images, expected, strict=True):
            member = archive.extractfile(name)
            assert member is not None
            assert image.read() == member.read() == dict(files)[name]


def test_hidden_members_of_a_tar_are_ignored_and_links_fail(
    tmp_path: Path, extractor: FeatureExtractor, example_files: list[Path]
) -> None:
    good = example_files[0].read_bytes()
    place = pack(
        tmp_path / "shard.tar",
        ("./.hidden.jpg", good),
        (".git/a.jpg", good),
        ("a/.cache/a.jpg", good),
        ("../outside.jpg", good),
        ("good.jpg", good),
        special("hard.jpg", tarfile.LNKTYPE, "good.jpg"),
        special("pipe.jpg", tarfile.FIFOTYPE),
        special("soft.jpg", tarfile.SYMTYPE, "/etc/hostname"),
        ("good.jpg", b"a second one of that name"),
    )
    with list_inputs([place]) as found:
        assert found.left_out == {"hidden": 3}
    index = embedded(extractor, tmp_path / "feats.npy", place)
    link = "a link or special member of the archive"
    assert [(row["path"].removeprefix("shard.tar/"), row["error"]) for row in index] == [
        ("../outside.jpg", None),
        ("good.jpg", None),
        ("good.jpg", "not an image of these formats: JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF, HEIF"),
        ("hard.jpg", link),
        ("pipe.jpg", link),
        ("soft.jpg", link),
    ]


def test_names_of_a_tar_that_are_not_utf8_keep_their_bytes(tmp_path: Path) -> None:
    pack(tmp_path / "shard.tar", (os.fsdecode(b"\xff\xe9.jpg"), b"data"), kind=tarfile.GNU_FORMAT)
    (image,) = listed(tmp_path / "shard.tar")
    assert os.fsencode(image.path) == b"shard.tar/\xff\xe9.jpg"
    assert "path_bytes" in image.index_fields()


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Three members, each with a header and 1024 bytes, and two closing blocks in a record of 10,240."""
    files = [(f"{name}.jpg", bytes([number]) * 1000) for number, name in enumerate("abc")]
    return pack(tmp_path / "shard.tar", *files, kind=tarfile.USTAR_FORMAT)


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (0, "not a tar file"),
        (100, "not a tar file"),
        (2 * 1536 + 100, "damaged at byte 3,072: the file ends inside a header"),
        (2 * 1536 + 512, "damaged at byte 3,072: a member of 1,000 bytes begins there"),
        (2 * 1536 + 900, "damaged at byte 3,072: a member of 1,000 bytes begins there"),
        (3 * 1536 - 1, "damaged at byte 4,608: it has no end mark"),
        (1536 + 700, "damaged at byte 1,536: a member of 1,000 bytes begins there"),
        (3 * 1536, None),  # the closing blocks hold nothing
    ],
)
def test_a_tar_cut_short_is_refused_when_anything_is_missing(archive: Path, length: int, message: str | None) -> None:
    os.truncate(archive, length)
    if message is None:
        assert paths(archive) == ["shard.tar/a.jpg", "shard.tar/b.jpg", "shard.tar/c.jpg"]
        return
    with pytest.raises(InputError, match=message) as caught:
        list_inputs([archive])
    assert str(archive) in str(caught.value)


def test_a_tar_with_a_damaged_header_is_refused(archive: Path) -> None:
    data = bytearray(archive.read_bytes())
    for at, message in ((1536 + 5, "damaged at byte 1,536: expected the header"), (5, "not a tar file")):
        data[at] ^= 0xFF
        archive.write_bytes(data)
        with pytest.raises(InputError, match=message):
            list_inputs([archive])


def test_a_tar_that_shrinks_after_it_was_listed_gives_failed_rows(archive: Path) -> None:
    images = listed(archive)
    os.truncate(archive, 1536 + 600)
    assert images[0].read() == b"\0" * 1000
    for image in images[1:]:
        with pytest.raises(OSError, match="ends before this member does"):
            image.read()


@pytest.mark.parametrize("name", ["shard.tar.gz", "shard.tgz", "shard.tar.bz2", "shard.tar.zst", "SHARD.TXZ"])
def test_compressed_tars_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"whatever it holds")
    with pytest.raises(InputError, match=r"decompress it to a \.tar first"):
        list_inputs([tmp_path / name])


def test_files_that_are_left_out_are_counted_by_kind(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "a.jpg",
        "b.JFIF",
        "c.jpe",
        "deep/d.PSD",
        "e.psd",
        "IMG_0001",
        "f.\x1b[31m",
        ".git/a.jpg",
        ".b.jpg",
        ".DS_Store",
        "._a.jpg",
        "Thumbs.db",
    )
    (tmp_path / "self").symlink_to(".")
    with list_inputs([tmp_path]) as found:
        assert [image.path for image in found] == ["a.jpg", "b.JFIF", "c.jpe"]
        said = say_left_out(found.left_out)
    assert said == "files left out: 7 (.psd 2, hidden 2, folders in themselves 1, others 1, without suffix 1)"


def test_what_is_left_out_is_said_in_one_line_of_any_number_of_kinds() -> None:
    choice = Choice()
    for number in range(2000):
        choice.takes(f"{number}.x{number}")
    assert len(choice.left_out) == 1001
    assert say_left_out(choice.left_out).startswith("files left out: 2,000 (others 1,000, .x0 1, ")
    assert len(say_left_out(choice.left_out)) < 200
    assert say_left_out({}) == ""


@pytest.mark.parametrize(
    ("patterns", "taken"),
    [
        (["*.jpg"], ["a.JPG", "deep/b.jpg"]),
        (["img_*", "*.psd"], ["IMG_1", "deep/c.psd"]),
        (["deep/*.jpg"], ["deep/b.jpg"]),
        (["*"], ["IMG_1", "a.JPG", "a.seg.png", "deep/b.jpg", "deep/c.psd"]),
    ],
)
def test_patterns_choose_files_of_folders_and_archives(tmp_path: Path, patterns: list[str], taken: list[str]) -> None:
    names = ["a.JPG", "a.seg.png", "deep/b.jpg", "deep/c.psd", "IMG_1", ".hidden.jpg"]
    folder = touch(tmp_path / "in", *names)
    place = pack(tmp_path / "shard.tar", *((name, b"x") for name in names))
    assert paths(folder, match=patterns) == taken
    assert paths(place, match=patterns) == [f"shard.tar/{name}" for name in taken]
    with pytest.raises(
        InputError, match=r"files left out: 6 \(not matched 5, hidden 1\); expected files matching \*\.bmp"
    ):
        list_inputs([folder], match=["*.bmp"])


def test_archives_within_a_folder_are_other_files(tmp_path: Path, archive: Path) -> None:
    touch(tmp_path, "a.jpg", "b.parquet")
    with list_inputs([tmp_path]) as found:
        assert [image.path for image in found] == ["a.jpg"]
        assert found.left_out == {".parquet": 1, ".tar": 1}


# Parquet


def structs(data: Sequence[bytes | None]) -> list[dict[str, Any] | None]:
    """As the datasets library of Hugging Face stores images."""
    return [None if value is None else {"bytes": value, "path": f"{number}.jpg"} for number, value in enumerate(data)]


@pytest.mark.parametrize("kind", ["struct", "binary", "large_binary", "large struct", "view", "dictionary"])
@pytest.mark.parametrize("rows_in_group", [1, 7, 1000])
def test_rows_of_a_parquet_file_are_those_that_were_written(tmp_path: Path, kind: str, rows_in_group: int) -> None:
    count = 40 if rows_in_group < 1000 else 2500
    data = [None if number % 11 == 5 else os.urandom(number % 50) for number in range(count)]
    binary = {"large": pa.large_binary(), "view": pa.binary_view()}.get(re.split("[ _]", kind)[0], pa.binary())
    column = (
        pa.array(structs(data), pa.struct({"bytes": binary, "path": pa.string()}))
        if kind.endswith("struct")
        else pa.array(data, binary)
    )
    column = column.dictionary_encode() if kind == "dictionary" else column
    table = pa.table({"label": pa.array(range(count)), "image": column, "text": pa.array(["x"] * count)})
    parquet.write_table(table, tmp_path / "part.parquet", row_group_size=rows_in_group)
    images = listed(tmp_path / "part.parquet")
    assert [image.path for image in images] == [f"part.parquet/{row:09}" for row in range(count)]
    reader = ParquetImages(images[0].file, images[0].detail)
    expected = ["the row holds no image" if value is None else value for value in data]
    assert [reader.read(image.at) for image in images] == expected
    # As a resumed run begins: anywhere, and also further on or back.
    for row in (count // 2, count // 2 + 1, count - 1, 3, 3, 0, count // 3):
        assert reader.read(row) == expected[row]


def test_a_null_struct_holds_no_image_whatever_lies_below_it(tmp_path: Path) -> None:
    fields = [pa.array([b"a", b"b", None]), pa.array(["a", "b", "c"])]
    column = pa.StructArray.from_arrays(fields, ["bytes", "path"], mask=pa.array([False, True, False]))
    parquet.write_table(pa.table({"image": column}), tmp_path / "part.parquet")
    reader = ParquetImages(str(tmp_path / "part.parquet"), "image")
    assert [reader.read(row) for row in range(3)] == [
        b"a",
        "the row holds no image",
        "the row holds the path 'c' and no bytes; write the images into the file",
    ]


@pytest.mark.parametrize("kind", ["binary", "large_binary", "struct", "dictionary"])
def test_a_cell_over_the_limit_is_not_copied(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from robustfeat.serving.inputs import parquet as reading

    cells = pa.array([b"abc", b"x" * 11, None], pa.large_binary() if kind == "large_binary" else pa.binary())
    if kind == "struct":
        paths = pa.array(["a", "b", "c"])
        cells = pa.StructArray.from_arrays([cells, paths], ["bytes", "path"])
    elif kind == "dictionary":
        cells = cells.dictionary_encode()
    parquet.write_table(pa.table({"image": cells}), tmp_path / "a.parquet")
    monkeypatch.setattr(reading, "MAX_FILE_BYTES", 10)
    images = reading.ParquetImages(str(tmp_path / "a.parquet"), "image")
    missing = "the row holds the path 'c' and no bytes; write the images into the file"
    none = missing if kind == "struct" else "the row holds no image"
    assert [images.read(row) for row in range(3)] == [b"abc", "over the limit of 10 bytes", none]


def test_rows_that_few_bytes_blow_up_are_read_one_at_a_time(
    tmp_path: Path, extractor: FeatureExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 rows of 2 MiB in some hundred bytes: neither Arrow nor the decoders' tasks hold many of them."""
    place, image = tmp_path / "part.parquet", bytes(2**21)
    parquet.write_table(pa.table({"image": [image] * 24}), place, compression="zstd")
    assert place.stat().st_size < 2000
    held, most, submit = 0, 0, DecoderPool.submit

    def watched(pool: DecoderPool, task: Task) -> Future[Decoded]:
        nonlocal held, most
        size = sum(len(data) for data in task.data or () if isinstance(data, bytes))
        held, most = held + size, max(most, held + size)

        def finished(_: Future[Decoded]) -> None:
            nonlocal held
            held -= size

        future = submit(pool, task)
        future.add_done_callback(finished)
        return future

    monkeypatch.setattr(DecoderPool, "submit", watched)
    monkeypatch.setattr(pipeline, "_HELD_BYTES", 2**23)
    monkeypatch.setattr(parts, "_PART_BYTES", 2**22)
    before = pa.default_memory_pool().max_memory()
    index = embedded(extractor, tmp_path / "feats.npy", place)
    assert len(index) == 24
    assert 0 < most <= 2**23
    assert pa.default_memory_pool().max_memory() <= max(before, 2**24)


def test_more_rows_than_bytes_are_refused(tmp_path: Path) -> None:
    place = tmp_path / "part.parquet"
    parquet.write_table(pa.table({"image": pa.nulls(100_000, pa.binary())}), place)
    with pytest.raises(InputError, match=r"part\.parquet: claims 100,000 rows in [0-9,]+ bytes; write it again"):
        list_inputs([place])


def test_rows_of_parquet_that_hold_no_image_are_failed_rows(
    tmp_path: Path, extractor: FeatureExtractor, example_files: list[Path]
) -> None:
    good = [file.read_bytes() for file in example_files[:3]]
    data = [good[0], None, b"no image", good[1], b"", good[2]]
    parquet.write_table(pa.table({"image": structs(data)}), tmp_path / "part.PARQUET", row_group_size=4)
    index = embedded(extractor, tmp_path / "feats.npy", tmp_path / "part.PARQUET", example_files[0])
    assert [row["error"] for row in index] == [
        None,
        "the row holds no image",
        "not an image of these formats: JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF, HEIF",
        None,
        "the file is empty",
        None,
        None,
    ]
    features = np.load(tmp_path / "feats.npy")
    np.testing.assert_allclose(features[0], features[6], rtol=1e-5, atol=1e-6)


def test_the_column_of_parquet_is_found_or_named(tmp_path: Path) -> None:
    place = tmp_path / "part.parquet"
    data = [b"one", b"two"]
    parquet.write_table(pa.table({"left": data, "right": data[::-1], "label": ["a", "b"]}), place)
    with pytest.raises(InputError, match=r"left, right; name one as part\.parquet:COLUMN"):
        list_inputs([place])
    for column, expected in (("left", data), ("right", data[::-1])):
        images = listed(f"{place}:{column}")
        assert [image.path for image in images] == ["part.parquet/000000000", "part.parquet/000000001"]
        reader = ParquetImages(images[0].file, images[0].detail)
        assert [reader.read(row) for row in range(2)] == expected
    for column in ("label", "nothing"):
        with pytest.raises(InputError, match=f"no column '{column}' of image bytes; it has left, right"):
            list_inputs([f"{place}:{column}"])
    # Where one of several is called image, it is meant.
    parquet.write_table(pa.table({"thumbnail": data, "image": structs(data)}), place)
    assert {image.detail for image in listed(place)} == {"image"}
    parquet.write_table(pa.table({"label": ["a", "b"]}), place)
    with pytest.raises(
        InputError, match="no single column of image bytes; it has none; write the images' bytes into it"
    ):
        list_inputs([place])


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1000\n"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.zip", b"PK", r"archives of this kind are not supported; unpack it, or pack its files as a \.tar"),
        ("list.TXT", b"a.jpg", "not an image; pass a list of paths as `files_from`"),
        ("a.csv", b"a.jpg,1", "not an image; pass a list of paths as `files_from`, tables of images as Parquet"),
        ("a.tar", LFS_POINTER, "not a tar file; it is a Git LFS pointer, not the file itself; run git lfs pull there"),
        ("a.parquet", LFS_POINTER, "not a Parquet file; it is a Git LFS pointer"),
        ("b.tar", b"PK\x03\x04" + bytes(600), "not a tar file; it is a zip archive; unpack it"),
    ],
)
def test_inputs_of_other_kinds_are_called_by_their_names(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=f"{re.escape(name)}: {message}"):
        list_inputs([tmp_path / name])


def test_parquet_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "part.parquet"
    with pytest.raises(InputError, match="no such file or folder"):
        list_inputs([place])
    with pytest.raises(InputError, match="no such file or folder"):
        list_inputs([f"{place}:image"])
    parquet.write_table(pa.table({"image": [os.urandom(1000) for _ in range(100)]}), place, row_group_size=10)
    data = place.read_bytes()
    for damaged in (b"", data[:-10], data[: len(data) // 2]):
        place.write_bytes(damaged)
        with pytest.raises(InputError, match=r"part\.parquet: not a readable Parquet file"):
            list_inputs([place])
    place.write_bytes(data)
    images = listed(place)
    parquet.write_table(pa.table({"image": [b"x"]}), place)  # replaced by a shorter one after it was listed
    with pytest.raises(InputError, match=r"part\.parquet: cannot be read"):
        ParquetImages(images[-1].file, "image").read(images[-1].at)


# Globs


def test_globs_give_what_the_shell_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["b.jpg", "a/z.jpg", "a-1/y.png", "a/b/c/x.jpg", "[1].jpg", "notes.txt", ".hidden.jpg", ".git/c.jpg"]
    touch(tmp_path, *names)
    monkeypatch.chdir(tmp_path)
    for prefix in ("", f"{tmp_path}/", "./", f"../{tmp_path.name}/"):
        assert paths(f"{prefix}*.jpg") == ["[1].jpg", "b.jpg"]
        assert paths(f"{prefix}?.jpg") == ["b.jpg"]
        assert paths(f"{prefix}**/*.jpg") == ["[1].jpg", "a/b/c/x.jpg", "a/z.jpg", "b.jpg"]
        assert paths(f"{prefix}**/x.*") == ["a/b/c/x.jpg"]
        assert paths(f"{prefix}a*") == ["a-1/y.png", "a/b/c/x.jpg", "a/z.jpg"]  # folders are read as such
        assert paths(f"{prefix}*/") == ["a-1/y.png", "a/b/c/x.jpg", "a/z.jpg"]
        assert paths(f"{prefix}a/*/c/*.jpg") == ["b/c/x.jpg"]  # relative to the folder before the first wildcard
        assert paths(f"{prefix}n*") == ["notes.txt"]  # a file that matches is always a row
        assert paths(f"{prefix}.*.jpg") == [".hidden.jpg"]
        assert paths(f"{prefix}[ab].jpg") == ["b.jpg"]
        assert paths(f"{prefix}[1].jpg") == ["[1].jpg"]  # there is such a file
        with pytest.raises(InputError, match="no images found"):
            list_inputs([f"{prefix}*.webp"])


def test_globs_of_archives_give_their_images(tmp_path: Path, archive: Path) -> None:
    parquet.write_table(pa.table({"image": [b"x"]}), tmp_path / "part.parquet")
    expected = ["part.parquet/000000000", "shard.tar/a.jpg", "shard.tar/b.jpg", "shard.tar/c.jpg"]
    assert paths(tmp_path / "*[rt]") == expected


def test_a_glob_in_quotes_is_read_by_the_command(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b/c.jpg")
    command = [sys.executable, "-m", "robustfeat", "embed", f"{tmp_path}/**/*.jpg", "--out", f"{tmp_path}/x.npy"]
    result = subprocess.run([*command, "--quiet"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 3, result.stderr  # neither is an image
    index = [json.loads(line) for line in (tmp_path / "x.index.jsonl").read_text().splitlines()]
    assert [row["path"] for row in index] == ["a.jpg", "b/c.jpg"]


# Lists


def test_lists_hold_names_of_any_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(touch(tmp_path, "folder/b.jpg", "folder/a/c.jpg", "folder/notes.txt"))
    odd = [" spaces  .jpg", "'quotes\"", "back\\slash", "*.jpg", "[1].jpg", "é", "#", os.fsdecode(b"\xff.jpg"), "-"]
    lines = [*odd, "./dot.jpg", "missing.jpg", "folder", "folder/b.jpg", "folder/b.jpg", str(tmp_path / "folder/b.jpg")]
    expected = [*odd, "dot.jpg", "missing.jpg", "folder/a/c.jpg", *["folder/b.jpg"] * 3, str(tmp_path / "folder/b.jpg")]
    place = tmp_path / "list"
    for end, options in (("\n", {}), ("\r\n", {}), ("\0", {"null": True})):
        for start, finish in itertools.product((b"", b"\xef\xbb\xbf"), (end, "", end * 3)):
            place.write_bytes(start + os.fsencode(end.join(lines) + finish))
            assert paths(files_from=place, **options) == expected
    place.write_bytes(b"new\nline.jpg\0return.jpg\r\0" + b"x" * 70_000 + b"\0")
    assert paths(files_from=place, null=True) == ["new\nline.jpg", "return.jpg\r", "x" * 70_000]


def test_lists_come_behind_the_arguments_and_name_archives_and_urls_too(tmp_path: Path, archive: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "list").write_text(f"\ufeff{archive}\nfile://{tmp_path}/b.jpg\n\ns3://bucket/c.jpg\n")
    assert paths(tmp_path / "a.jpg", files_from=tmp_path / "list") == [
        "a.jpg",
        *(f"{archive}/{name}.jpg" for name in "abc"),
        f"{tmp_path}/b.jpg",
        "s3://bucket/c.jpg",
    ]
    assert paths(f"file://{tmp_path}/a.jpg") == ["a.jpg"]


@pytest.mark.parametrize("arguments", [["-"], ["--files-from=-", "--null"]])
def test_a_list_on_stdin_gives_failed_rows_where_files_are_missing(
    tmp_path: Path, example_files: list[Path], arguments: list[str]
) -> None:
    lines = [str(example_files[0]), "missing.jpg", str(example_files[1]), str(example_files[0])]
    command = [sys.executable, "-m", "robustfeat", "embed", *arguments, "--out", str(tmp_path / "x.npy"), "--quiet"]
    text = ("\0" if "--null" in arguments else "\n").join(lines)
    result = subprocess.run(command, input=text, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 3, result.stderr
    index = [json.loads(line) for line in (tmp_path / "x.index.jsonl").read_text().splitlines()]
    assert [row["path"] for row in index] == lines
    assert [row["error"] for row in index] == [None, "No such file or directory", None, None]
    features = np.load(tmp_path / "x.npy")
    np.testing.assert_array_equal(np.isfinite(features).all(1), [True, False, True, True])
    np.testing.assert_allclose(features[0], features[3], rtol=1e-5, atol=1e-6)


def test_lists_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"files_from=.*none: cannot be read"):
        list_inputs([], files_from=tmp_path / "none")
    with pytest.raises(InputError, match="cannot be read"):
        list_inputs([], files_from=tmp_path)
    (tmp_path / "list").write_text("\n\n")
    with pytest.raises(InputError, match="list: no images found"):
        list_inputs([], files_from=tmp_path / "list")
    (tmp_path / "list").write_text("missing.tar\n")
    with pytest.raises(InputError, match=r"missing\.tar: cannot be read \(No such file or directory\)"):
        list_inputs([], files_from=tmp_path / "list")


# Folders


@pytest.mark.parametrize(("rows", "runs"), [(1, 2), (7, 3), (200, 64), (201, 64), (10**6, 64)])
def test_folders_that_do_not_fit_in_memory_are_sorted_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, runs: int
) -> None:
    monkeypatch.setattr(input_list, "_SORT_ROWS", rows)
    monkeypatch.setattr(input_list, "_MERGE_RUNS", runs)
    names = [f"{'aZ-é_0'[number * 5 % 6]}{number % 9}{'/' * (number % 3 > 0)}{number}.jpg" for number in range(199)]
    names.append(os.fsdecode(b"a\xff.jpg"))
    assert len({*names}) == 200
    touch(tmp_path, *names)
    images, left_out = list_folder(tmp_path)
    assert [os.fsencode(image.path) for image in images] == sorted(map(os.fsencode, names))
    assert [image.file for image in images] == [f"{tmp_path}/{image.path}" for image in images]
    assert left_out == {}


@pytest.mark.parametrize(("rows", "runs"), [(1, 2), (7, 3)])
def test_members_of_one_name_stay_in_order_when_sorted_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, runs: int
) -> None:
    monkeypatch.setattr(input_list, "_SORT_ROWS", rows)
    monkeypatch.setattr(input_list, "_MERGE_RUNS", runs)
    place = pack(tmp_path / "shard.tar", *((f"{number % 5}.jpg", bytes([number])) for number in range(50)))
    expected = sorted(range(50), key=lambda number: number % 5)
    assert [image.read()[0] for image in listed(place)] == expected


def test_any_part_of_a_long_list_can_be_read(tmp_path: Path) -> None:
    images = [ImageSource(f"é{number}\n.jpg", f"/{number}", at=number) for number in range(9000)]
    with InputList(images) as found:
        assert len(found) == 9000
        for start, stop in ((0, 9000), (0, 1), (4095, 4097), (4096, 4096), (8191, 8999), (8999, 10_000), (9000, 9001)):
            assert [ImageSource.from_line(line) for line in found.lines(start, stop)] == images[start:stop]
        assert list(found) == images
        with InputList(images) as same, InputList(images[1:]) as other:
            assert found.sha256 == same.sha256 != other.sha256


def test_a_folder_inside_another_one_is_refused(tmp_path: Path) -> None:
    inner = tmp_path / "photos" / "2024" / "may"
    inner.mkdir(parents=True)
    (inner / "a.jpg").touch()
    (tmp_path / "photos-2").mkdir()
    (tmp_path / "photos-2" / "b.jpg").touch()
    (tmp_path / "link").symlink_to(inner)
    outer = tmp_path / "photos"
    for folder in (inner, tmp_path / "link"):
        for arguments in ([outer, folder], [folder, outer]):
            said = rf"{folder}: lies in {outer}, so that its images would be two rows each; leave out {folder}"
            with pytest.raises(InputError, match=said):
                list_inputs(arguments)
    with list_inputs([outer, inner / "a.jpg", tmp_path / "photos-2", outer]) as found:
        assert [image.path for image in found] == ["2024/may/a.jpg", "a.jpg", "b.jpg", "2024/may/a.jpg"]


def test_linked_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    root = touch(tmp_path / "root", "a/x.jpg", "b/y.jpg", "b/c/z.jpg")
    touch(tmp_path / "elsewhere", "w.jpg")
    (root / "elsewhere").symlink_to(tmp_path / "elsewhere")
    (root / "twice").symlink_to("elsewhere")
    (root / "b" / "up").symlink_to("..")
    (root / "b" / "c" / "self").symlink_to(".")
    (root / "a" / "across").symlink_to("../b")
    (root / "b" / "c" / "back").symlink_to("../../a")
    (root / "dangling.jpg").symlink_to("nowhere.jpg")
    (root / "linked.jpg").symlink_to("a/x.jpg")
    (root / "round.jpg").symlink_to("round.jpg")
    expected = [
        "a/across/c/z.jpg", "a/across/y.jpg", "a/x.jpg", "b/c/back/x.jpg", "b/c/z.jpg", "b/y.jpg", "dangling.jpg",
        "elsewhere/w.jpg", "linked.jpg", "round.jpg", "twice/w.jpg",
    ]  # fmt: skip
    assert paths(root) == expected
    assert paths(root / "**" / "*.jpg") == expected
    (tmp_path / "list").write_text(str(root))
    assert paths(files_from=tmp_path / "list") == [f"{root}/{path}" for path in expected]


def test_folders_that_may_not_be_read_are_never_left_out() -> None:
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as place:  # which another user may enter
        root = Path(place)
        root.chmod(0o755)
        touch(root, "a.jpg", "secret/b.jpg")
        (root / "secret").chmod(0)
        try:
            if user == 0:  # who may read everything
                os.seteuid(65534)
            for argument in (root, root / "**" / "*.jpg", root / "*"):
                with pytest.raises(InputError, match="secret: cannot be listed"):
                    list_inputs([argument])
        finally:
            os.seteuid(user)
            (root / "secret").chmod(0o700)
