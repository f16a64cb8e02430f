"""Features that have no names of rows, with labels in the order of the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from robustfeat.errors import InputError
from robustfeat.serving.heads.features import count_unnamed_rows, open_array
from robustfeat.serving.heads.labels.matching import match_labels
from robustfeat.serving.heads.labels.reading import read_labels

NAMES = ["cat", "dog", None, "eel", "cat"]
KNOWN = {str(row): (name,) for row, name in enumerate(NAMES) if name}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("l.txt", "cat\ndog\n\neel\ncat\n"),
        ("l.txt", "\ufeffcat\r\ndog\r\nNA\r\neel\r\ncat"),
        ("l.csv", "label\ncat\ndog\nNA\neel\ncat\n"),
        ("l.csv", 'label\ncat\ndog\n""\neel\ncat\n\n'),
        ("l.csv", "id;label;note\n7;cat;\n8;dog;\n9;;\n7;eel;\n7;cat;\n"),
        ("l.tsv", "n\tclass\n1\tcat\n2\tdog\n3\tNULL\n4\teel\n5\tcat\n"),
    ],
)
def test_the_row_of_a_label_is_its_place(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, "utf-8", newline="")
    assert read_labels([str(tmp_path / name)], rows=5).by_path == KNOWN


def test_arrays_and_parquet_files_are_lists_of_labels_too(tmp_path: Path) -> None:
    np.save(tmp_path / "y.npy", np.array([3, 1, 4]))
    assert read_labels([f"{tmp_path}/y.npy"], rows=3).by_path == {"0": ("3",), "1": ("1",), "2": ("4",)}
    np.save(tmp_path / "y.npy", np.array(["a", "é", "a"]))
    assert read_labels([f"{tmp_path}/y.npy"], rows=3).by_path == {"0": ("a",), "1": ("é",), "2": ("a",)}
    parquet.write_table(pyarrow.table({"image": [b"x", b"y", b"z"], "kind": ["a", None, "b"]}), tmp_path / "l.parquet")
    assert read_labels([f"{tmp_path}/l.parquet:kind"], rows=3).by_path == {"0": ("a",), "2": ("b",)}
    (tmp_path / "l.csv").write_text('label\na\n""\nb\n')  # as pandas writes a missing one in a single column
    assert read_labels([f"{tmp_path}/l.csv"], rows=3).by_path == {"0": ("a",), "2": ("b",)}
    several = [f"{tmp_path}/l.csv", f"{tmp_path}/y.npy"]
    assert read_labels(several, rows=6).by_path == {"0": ("a",), "2": ("b",), "3": ("a",), "4": ("é",), "5": ("a",)}


def test_several_labels_of_a_row_are_in_its_line(tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text("a|b\n\nNA\nb\n")
    found = read_labels([f"{tmp_path}/l.txt"], rows=4, multi_label=True)
    assert found.by_path == {"0": ("a", "b"), "1": (), "3": ("b",)}


def test_rows_without_names_are_labelled_but_for_failed_ones(tmp_path: Path) -> None:
    values = np.arange(20, dtype=np.float32).reshape(5, 4)
    values[3] = np.nan
    np.save(tmp_path / "x.npy", values)
    (tmp_path / "l.txt").write_text("cat\ndog\n\neel\ncat\n")
    assert count_unnamed_rows(str(tmp_path / "x.npy")) == 5
    features = open_array(str(tmp_path / "x.npy"))
    found = match_labels(features, read_labels([f"{tmp_path}/l.txt"], rows=5))
    assert (found.rows.tolist(), found.targets.tolist(), found.classes) == ([0, 1, 4], [0, 1, 0], ("cat", "dog"))
    assert (found.failed, found.unlabelled.count, found.missing) == (1, 1, ())


def test_files_of_embed_and_others_have_names(tmp_path: Path, write_features: Any) -> None:
    file = write_features(tmp_path / "f.npy", np.zeros((2, 4), np.float32), ["a", "b"])
    for gone in (None, ".index.jsonl"):  # a part of what embed wrote is no plain array
        if gone:
            file.with_suffix(gone).unlink()
        assert count_unnamed_rows(str(file)) is None
    for other in ("photos", "f.parquet", "none.npy", "s3://bucket/f.npy"):
        assert count_unnamed_rows(str(tmp_path / other)) is None


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("l.txt", "a\nb\n", r"has 2 labels and no paths; expected one label for each of the 3 rows, in order"),
        ("l.txt", "a\nb\nc\nd\n", r"has 4 labels and no paths; expected one label for each of the 3 rows"),
        ("l.csv", "label\na\nb\n\n", r"has 2 labels .*; write NA where a label is missing"),
        (
            "l.csv",
            "path,label\na.jpg,a\nb.jpg,b\nc.jpg,c\n",
            r"l\.csv: has paths \(column path\), but the rows",
        ),
        (
            "l.csv",
            "a\nb\nc\nd\n",
            r"expected label or .*:COLUMN, or write a label per line to FILE\.txt",
        ),
        ("l.json", "[]", r"expected labels in the order of the rows, which have no names: FILE\.csv, .*FILE\.npy"),
        ("l.npy", "junk", r"l\.npy: not a \.npy file of labels \("),
        ("l.txt", "\n\n\n", "contains no labels"),
    ],
)
def test_what_is_no_label_for_each_row_is_refused(name: str, content: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=reason) as caught:
        read_labels([str(tmp_path / name)], rows=3)
    assert "\n" not in str(caught.value)


def test_other_lists_without_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the rows have no paths; pass the path of each row as `names=FILE`"):
        read_labels(["folder"], rows=3)
    parquet.write_table(pyarrow.table({"path": ["a"], "kind": ["a"]}), tmp_path / "l.parquet")
    with pytest.raises(InputError, match=r"has paths \(column path\)"):
        read_labels([f"{tmp_path}/l.parquet:kind"], rows=1)
    np.save(tmp_path / "y.npy", np.zeros((3, 2)))
    with pytest.raises(InputError, match=r"must have an \(n,\) array of text or numbers; got \(3, 2\) float64"):
        read_labels([f"{tmp_path}/y.npy"], rows=3)
    with pytest.raises(InputError, match=r"path_column=id: needs a file of labels; leave it out"):
        read_labels(["folder"], path_column="id")
