"""WebDataset shards: what is a sample, what its label means, and what damage is called."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from robustfeat.errors import DataError
from robustfeat.training.data.batches import EpochPlan, TrainingBatches, load_batches
from robustfeat.training.data.image_set import _Subset
from robustfeat.training.data.opening import open_training_data
from robustfeat.training.data.tar_shards import _Members
from tests.training.data.test_batches import jpeg, value_of

Members = Iterable[tuple[str, bytes]]


def pack(file: Path, members: Members, kind: int = tarfile.GNU_FORMAT) -> None:
    with tarfile.open(file, "w", format=kind) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def samples(values: Iterable[int], labels: Iterable[object]) -> Members:
    for value, label in zip(values, labels, strict=True):
        yield f"{value:06}.png", jpeg(value)
        yield f"{value:06}.cls", str(label).encode()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    pack(tmp_path / "train-0000.tar", samples([0, 10, 20], [2, 10, 2]))
    pack(tmp_path / "train-0001.tar", samples([30, 40], [0, 10]))
    pack(tmp_path / "val-0000.tar", samples([50], [10]))
    return tmp_path


def test_samples_keep_their_order_across_shards(shards: Path) -> None:
    train, validation = open_training_data(shards)
    assert train.classes == ("0", "2", "10")  # by number
    assert train.labels.tolist() == [1, 2, 1, 0, 2]
    assert [value_of(train, row) for row in range(5)] == [0, 10, 20, 30, 40]
    assert (validation.labels.tolist(), value_of(validation, 0)) == ([2], 50)
    assert train.source.name(3) == "train-0001.tar/000030.png"
    assert train.blocks is None


def test_parts_limits_the_shards(shards: Path) -> None:
    assert len(open_training_data(shards, parts=1)[0]) == 3


def test_a_share_is_held_out_without_validation(shards: Path) -> None:
    (shards / "val-0000.tar").unlink()
    train, validation = open_training_data(shards, val_fraction=0.2)
    assert sorted(value_of(data, row) for data in (train, validation) for row in range(len(data))) == [
        0,
        10,
        20,
        30,
        40,
    ]


def test_workers_read_what_one_process_reads(shards: Path) -> None:
    train, _ = open_training_data(shards)
    alone, workers = (
        list(load_batches(TrainingBatches(train, 16, EpochPlan(train, 2, seed=0, epoch=0)), w)) for w in (0, 2)
    )
    assert len(alone) == len(workers) == 2
    assert all(a.images.equal(b.images) and a.labels.equal(b.labels) for a, b in zip(alone, workers, strict=True))


def test_numbers_are_lines_of_classes_txt(shards: Path) -> None:
    names = [f"class {number}" for number in range(11)]
    (shards / "classes.txt").write_text("\n".join(names) + "\n")
    train, validation = open_training_data(shards)
    assert train.classes == tuple(names)
    assert (train.labels.tolist(), validation.labels.tolist()) == ([2, 10, 2, 0, 10], [10])
    (shards / "classes.txt").write_text("\n".join(names[:10]))
    with pytest.raises(
        DataError, match=r"train-0000\.tar/000010\.png: label '10' is none of the 10 classes of classes"
    ):
        open_training_data(shards)


@pytest.mark.parametrize(("text", "message"), [("a\n\nb", "line 2 is empty"), ("a\nb\na\n", "line 3 repeats line 1")])
def test_bad_class_names_are_explained(shards: Path, text: str, message: str) -> None:
    (shards / "classes.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        open_training_data(shards)


def test_labels_in_json_and_as_text(tmp_path: Path) -> None:
    about = [{"label": "pear"}, {"cls": "apple"}, {"label": "pear", "cls": "no"}, {"width": 3}]
    members = [(f"a/{row}.JPEG", jpeg(row)) for row in range(4)]
    members += [(f"a/{row}.json", json.dumps(label).encode()) for row, label in enumerate(about)]
    members += [("a/3.cls", b"\xef\xbb\xbfapple\n"), ("a/3.txt", b"a caption"), ("README.md", b"about")]
    pack(tmp_path / "train-0.tar", members)
    pack(tmp_path / "test-0.tar", [("x.webp", jpeg(9)), ("x.cls", b"pear")])
    train, test = open_training_data(tmp_path)
    assert (train.classes, train.labels.tolist()) == (("apple", "pear"), [1, 0, 1, 0])
    assert test.labels.tolist() == [1]
    (tmp_path / "classes.txt").write_text("pear\nplum\napple\n")
    assert open_training_data(tmp_path)[0].labels.tolist() == [0, 2, 0, 2]


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_names_of_any_length_in_every_format(tmp_path: Path, kind: int) -> None:
    folders = ["", "./", "é/", "/".join(["folder" * 5] * 5) + "/"]
    if kind != tarfile.USTAR_FORMAT:
        folders += ["f" * 300 + "/", "n" * 98 + "ü/"]
    members = []
    for row, folder in enumerate(folders):
        members += [(f"{folder}s.png", jpeg(row)), (f"{folder}s.cls", str(row).encode())]
    # Files of one name in two folders are two samples, and "." in a folder's name ends no key.
    members += [("v1.0/s.png", jpeg(77)), ("v1.0/s.cls", b"5")]
    pack(tmp_path / "train-0.tar", members[2:], kind)
    pack(tmp_path / "val-0.tar", members[-2:], kind)
    train, _ = open_training_data(tmp_path)
    assert [value_of(train, row) for row in range(len(train))] == [*range(1, len(folders)), 77]
    with tarfile.open(tmp_path / "train-0.tar") as archive:
        names = [member.name.removeprefix("./") for member in archive if member.name.endswith(".png")]
    assert [train.source.name(row) for row in range(len(train))] == [f"train-0.tar/{name}" for name in names]


def test_what_gnu_tar_packs_is_read(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for row in range(30):
        (tmp_path / "in" / "deep" / f"{row}.png").write_bytes(jpeg(row))
        (tmp_path / "in" / "deep" / f"{row}.cls").write_text(f"{row % 3}\n")
    for name in ("train-0.tar", "val-0.tar"):
        subprocess.run(["tar", "cf", tmp_path / name, "-C", tmp_path / "in", "."], check=True)
    train, _ = open_training_data(tmp_path)
    values = [value_of(train, row) for row in range(30)]
    assert sorted(values) == list(range(30))
    assert train.labels.tolist() == [number % 3 for number in values]


PNG = ("a.png", jpeg(1))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            [PNG, ("b.png", b""), ("b.cls", b"1")],
            "sample 'a' has no label; expected a.cls, or a.json with label or cls",
        ),
        ([PNG, ("a.cls", b" \n")], "sample 'a' has no label"),
        ([PNG, ("a.cls", b"-1\n")], "sample 'a' has no label"),
        ([PNG, ("a.json", b'{"label": 1.5}')], "sample 'a' has no label"),
        ([PNG, ("a.json", b"[]")], "sample 'a' has no label"),
        ([PNG, ("a.json", b"{")], "a.json is not JSON"),
        ([PNG, ("a.json", b"[" * 100_000)], "a.json is not JSON"),
        ([PNG, ("a.json", b"9" * 100_000)], "a.json is not JSON"),
        ([PNG, ("a.cls", bytes(2**24 + 1))], "a.cls has 16,777,217 bytes; a label may have 16,777,216"),
        ([PNG, ("a.cls", b"\xff")], "a.cls is not text in UTF-8"),
        ([("x/a.cls", b"1")], "sample 'x/a' has no image"),
        ([PNG, ("a.jpg", b""), ("a.cls", b"1")], "sample 'a' has two images, a.png and a.jpg"),
        ([], "holds no samples"),
    ],
)
def test_what_is_no_sample_is_named(tmp_path: Path, members: Members, message: str) -> None:
    pack(tmp_path / "train-0.tar", members)
    with pytest.raises(DataError, match=rf"train-0\.tar: .*{message}"):
        open_training_data(tmp_path)


def test_a_label_that_training_lacks_is_named(shards: Path) -> None:
    pack(shards / "val-0000.tar", samples([50], [7]))
    with pytest.raises(
        DataError, match=r"val-0000\.tar/000050\.png: label '7' is none of the 3 classes of the training"
    ):
        open_training_data(shards)


def test_a_shard_cut_anywhere_is_damaged(shards: Path) -> None:
    file = shards / "train-0001.tar"
    data = file.read_bytes()
    content = len(data.rstrip(b"\0"))
    for length in {0, 100, 512, 600, 1024, content - 1, content, *range(512, content, 512)}:
        file.write_bytes(data[:length])
        with pytest.raises(
            DataError, match=r"train-0001\.tar: (damaged at byte [\d,]+: |not a tar file|holds no samples)"
        ):
            open_training_data(shards)


def test_damage_is_named_with_its_place(shards: Path) -> None:
    file = shards / "train-0001.tar"
    data = file.read_bytes()
    second = 512 + -(-len(jpeg(30)) // 512) * 512
    file.write_bytes(data[: second + 3] + b"\xff" + data[second + 4 :])
    with pytest.raises(DataError, match=rf"train-0001\.tar: damaged at byte {second:,}: expected the header"):
        open_training_data(shards)
    file.write_bytes(data + data)
    with pytest.raises(DataError, match=r"train-0001\.tar: damaged at byte \S+ it has data after its end mark"):
        open_training_data(shards)
    file.write_bytes(b"junk" * 500)
    with pytest.raises(DataError, match=r"train-0001\.tar: not a tar file"):
        open_training_data(shards)


@pytest.mark.parametrize("suffix", [".tar.gz", ".tgz"])
def test_compressed_shards_are_refused(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"train-0{suffix}").write_bytes(b"")
    with pytest.raises(DataError, match=rf"train-0{suffix}: .*; unpack it to a \.tar"):
        open_training_data(tmp_path)


def test_links_and_hidden_files_are_no_images(tmp_path: Path) -> None:
    file = tmp_path / "train-0.tar"
    pack(file, [("._a.png", b"apple"), *samples([1, 2], [0, 1])])
    with tarfile.open(file, "a") as archive:
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname, link.size = tarfile.SYMTYPE, "000001.png", 0
        archive.addfile(link)
    (tmp_path / "val-0.tar").write_bytes(file.read_bytes())
    assert len(open_training_data(tmp_path)[0]) == 2


def test_fingerprint_changes_with_names_labels_and_sizes(shards: Path) -> None:
    prints = {open_training_data(shards)[0].fingerprint, open_training_data(shards)[0].fingerprint}
    assert len(prints) == 1
    for members in (
        samples([30, 40], [0, 2]),
        samples([30, 41], [0, 10]),
        [*samples([30], [0]), ("000040.png", jpeg(40) + b"\0"), ("000040.cls", b"10")],
    ):
        pack(shards / "train-0001.tar", members)
        prints.add(open_training_data(shards)[0].fingerprint)
    assert len(prints) == 4


def test_a_shard_that_shrank_since_is_an_undecodable_image(shards: Path) -> None:
    train, _ = open_training_data(shards)
    os.truncate(shards / "train-0001.tar", 520)
    batch = TrainingBatches(train, 16, EpochPlan(train, 5, seed=0, epoch=0))[0]
    assert len(batch.labels) == 3
    assert "000030.png: the archive ends before this member does" in " ".join(batch.failures)


def test_many_samples_take_little_memory(tmp_path: Path) -> None:
    pack(tmp_path / "train-0.tar", [(f"{n}{s}", b"1") for n in range(20_000) for s in (".png", ".cls")])
    train, _ = open_training_data(tmp_path)
    assert isinstance(train.source, _Subset)
    source = train.source._source
    assert isinstance(source, _Members)
    held = sum(part.nbytes for part in (source._offsets, source._sizes, source._ends)) + len(source._names)
    assert len(source._offsets) == 20_000
    assert held < 20_000 * 40
    assert np.all(np.diff(source._offsets) > 0)
