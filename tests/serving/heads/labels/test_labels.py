"""Labels are read from what people have, and matched by path."""

from __future__ import annotations

import csv as csv_module
import json
import unicodedata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from safetensors.numpy import save_file

from robustfeat.errors import InputError
from robustfeat.serving.heads.features import Features, is_feature_file, open_array, open_features
from robustfeat.serving.heads.fitting.fit import fit_head
from robustfeat.serving.heads.labels.matching import match_labels
from robustfeat.serving.heads.labels.reading import read_labels
from robustfeat.serving.heads.predictions import predict_rows

Form = Literal["NFC", "NFD"]


@pytest.fixture
def features(tmp_path: Path, write_features: Any) -> Features:
    values = np.arange(20, dtype=np.float32).reshape(5, 4)
    values[3] = np.nan
    names = ["cat/1.jpg", "cat/2.jpg", "dog/a b.jpg", "dog/bad.jpg", "eel/deep/1.jpg"]
    return open_features(str(write_features(tmp_path / "f.npy", values, names, {3: "truncated"})))


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("shard.tar/cat/1.jpg", "cat"),
        ("x.parquet/000000001", None),
        ("/data/cat/1.jpg", None),
        ("shard.tar/1.jpg", None),
    ],
)
def test_archives_are_no_classes(path: str, label: str | None) -> None:
    assert read_labels(["folder"]).of(path) == (None if label is None else (label,))


def csv(tmp_path: Path, text: str) -> list[str]:
    (tmp_path / "labels.csv").write_text(text)
    return [str(tmp_path / "labels.csv")]


def test_the_first_folder_is_the_label(features: Features) -> None:
    found = match_labels(features, read_labels(["folder"]))
    assert found.classes == ("cat", "dog", "eel")
    assert (found.rows.tolist(), found.targets.tolist(), found.failed) == ([0, 1, 2, 4], [0, 0, 1, 2], 1)


@pytest.mark.parametrize(
    "text",
    [
        "path,label\ndog/a b.jpg,x\ncat/1.jpg,y\n",
        "\ufefflabel,ignored,File\nx,0,dog/a b.jpg\r\ny,1,cat/1.jpg\r\n\n",
        "filename,class\n./dog/a b.jpg,x\ncat/1.jpg, y \ncat/2.jpg,\n",
        'dog/a b.jpg,x\n"cat/1.jpg",y\n',
    ],
)
def test_csv_is_matched_by_path(text: str, features: Features, tmp_path: Path) -> None:
    found = match_labels(features, read_labels(csv(tmp_path, text)))
    assert found.classes == ("x", "y")
    assert (found.rows.tolist(), found.targets.tolist()) == ([0, 2], [1, 0])
    assert (found.failed, found.unlabelled.count, found.missing) == (0, 3, ())


@pytest.mark.parametrize(("there", "here"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_unicode_forms_of_one_name_match(there: Form, here: Form, tmp_path: Path, write_features: Any) -> None:
    names = [unicodedata.normalize(here, name) for name in ("é/ü.jpg", "é/å.jpg", "b.jpg")]
    features = open_features(str(write_features(tmp_path / "g.npy", np.zeros((3, 4), np.float32), names)))
    text = unicodedata.normalize(there, "path,label\né/ü.jpg,ä\né/å.jpg,b\nnone.jpg,b\n")
    found = match_labels(features, read_labels(csv(tmp_path, text)), classes=["ä", "b"])
    assert (found.rows.tolist(), found.targets.tolist(), found.missing) == ([0, 1], [0, 1], ("none.jpg",))


def test_two_files_of_one_name_in_two_forms_are_not_confused(tmp_path: Path, write_features: Any) -> None:
    names = [unicodedata.normalize("NFC", "é.jpg"), unicodedata.normalize("NFD", "é.jpg")]
    features = open_features(str(write_features(tmp_path / "g.npy", np.zeros((2, 4), np.float32), names)))
    both = read_labels(csv(tmp_path, f"path,label\n{names[0]},x\n{names[1]},y\n"))
    assert match_labels(features, both).targets.tolist() == [0, 1]
    with pytest.raises(InputError, match="rows 0 and 1 have the same path"):
        match_labels(features, read_labels(csv(tmp_path, f"path,label\n{names[0]},x\n")))


ROWS = ["cat/1.jpg", "dog/1.jpg", "dog/2.jpg", "é.jpg", "deep/down/3.jpg", "down/3.jpg"]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("/data/photos/dog/2.jpg", "dog/2.jpg"),
        ("photos/cat/1.jpg", "cat/1.jpg"),
        ("2.jpg", "dog/2.jpg"),
        (unicodedata.normalize("NFD", "/data/é.jpg"), "é.jpg"),
        ("/data/deep/down/3.jpg", None),  # it ends with two rows
        ("1.jpg", None),
        ("3.jpg", None),
        ("ther/cat/1.jpg", "cat/1.jpg"),
        ("at/1.jpg", None),
        ("/data/dog/2.JPG", None),
        ("C:\\photos\\dog\\2.jpg", "dog/2.jpg"),
        ("dog\\2.jpg", "dog/2.jpg"),
    ],
)
def test_paths_from_elsewhere_and_bare_names_mean_the_one_image(
    given: str, meant: str | None, tmp_path: Path, write_features: Any
) -> None:
    features = open_features(str(write_features(tmp_path / "g.npy", np.zeros((6, 4), np.float32), ROWS)))
    labels = read_labels(csv(tmp_path, f"path,label\n{given},x\n"))
    if meant is None:
        with pytest.raises(InputError, match="such that each matches only one image"):
            match_labels(features, labels)
    else:
        assert [ROWS[row] for row in match_labels(features, labels).rows] == [meant]


def test_a_row_of_its_own_name_is_not_taken_by_another_label(tmp_path: Path, write_features: Any) -> None:
    features = open_features(str(write_features(tmp_path / "g.npy", np.zeros((6, 4), np.float32), ROWS)))
    text = "path,label\ndog/2.jpg,x\n/data/dog/2.jpg,x\n/a/é.jpg,p\n/b/é.jpg,q\n"
    found = match_labels(features, read_labels(csv(tmp_path, text)))
    assert (found.rows.tolist(), found.classes) == ([2], ("x",))
    assert (found.missing, found.repeated) == (("/a/é.jpg", "/b/é.jpg"), 1)
    other = text.replace("/data/dog/2.jpg,x", "/data/dog/2.jpg,y")
    with pytest.raises(InputError, match=r"dog/2\.jpg is labelled 'x', and /data/dog/2\.jpg 'y'; leave one"):
        match_labels(features, read_labels(csv(tmp_path, other)))


def test_labels_given_twice_are_counted(features: Features, tmp_path: Path) -> None:
    found = match_labels(features, read_labels(csv(tmp_path, "path,label\ncat/1.jpg,x\ndog/a b.jpg,y\ncat/1.jpg,x\n")))
    assert found.targets.tolist() == [0, 1]
    assert "1 label given twice" in found.summary()


def test_a_column_may_be_named(features: Features, tmp_path: Path) -> None:
    (source,) = csv(tmp_path, "path,label,colour\ncat/1.jpg,x,red\ncat/2.jpg,x,blue\n")
    assert match_labels(features, read_labels([f"{source}:colour"])).classes == ("blue", "red")


def test_labels_without_a_row_and_failed_rows_are_counted(features: Features, tmp_path: Path) -> None:
    source = csv(tmp_path, "path,label\ncat/1.jpg,x\ndog/bad.jpg,y\ncat/2.jpg,y\nnone.jpg,y\n")
    found = match_labels(features, read_labels(source))
    assert (found.rows.tolist(), found.failed, found.missing) == ([0, 1], 1, ("none.jpg",))
    assert "1 more left out" in found.summary()
    assert "none.jpg" in found.summary()


def test_parquet_gives_names_to_numbers(tmp_path: Path, features: Features) -> None:
    about = {"info": {"features": {"kind": {"names": ["ant", "bee", "cow"], "_type": "ClassLabel"}}}}
    table = pyarrow.table({"path": ["cat/2.jpg", "cat/1.jpg", "eel/deep/1.jpg"], "kind": [2, 0, -1]})
    parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(about)}), tmp_path / "labels.parquet")
    found = match_labels(features, read_labels([f"{tmp_path}/labels.parquet:kind"]))
    assert found.classes == ("ant", "cow")
    assert (found.rows.tolist(), found.targets.tolist()) == ([0, 1], [0, 1])


def test_lists_of_classes_get_their_names(tmp_path: Path) -> None:
    about = {"info": {"features": {"tags": {"feature": {"names": ["ant", "bee"]}, "_type": "List"}}}}
    table = pyarrow.table({"path": ["a", "b"], "tags": [[1, 0], [1]]})
    parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(about)}), tmp_path / "t.parquet")
    assert read_labels([f"{tmp_path}/t.parquet:tags"], multi_label=True).by_path == {"a": ("ant", "bee"), "b": ("bee",)}


def test_odd_cells_of_parquet_files(tmp_path: Path) -> None:
    columns = {"path": ["a", "b"], "number": [1.5, float("nan")], "raw": [b"x", b"y"], "class": [0, 7]}
    about = {"info": {"features": {"class": {"names": ["ant", "bee"]}}}}
    table = pyarrow.table(columns).replace_schema_metadata({"huggingface": json.dumps(about)})
    parquet.write_table(table, tmp_path / "t.parquet")
    assert read_labels([f"{tmp_path}/t.parquet:number"]).by_path == {"a": ("1.5",)}
    with pytest.raises(InputError, match="row 0: a label must be text or a number; got bytes"):
        read_labels([f"{tmp_path}/t.parquet:raw"])
    with pytest.raises(InputError, match="row 1: label 7 is not one of the 2 classes"):
        read_labels([f"{tmp_path}/t.parquet:class"])


def test_labels_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes(b"path,label\na.jpg,caf\xe9\n")
    with pytest.raises(InputError, match=r"line 2: the label 'caf.*' is not UTF-8"):
        read_labels([f"{tmp_path}/labels.csv"])


def test_rows_of_parquet_files_without_paths_are_those_that_embed_names(tmp_path: Path, write_features: Any) -> None:
    for name, labels in (("a", [1, None, 3]), ("b", [5, 6])):
        parquet.write_table(pyarrow.table({"label": labels}), tmp_path / f"{name}.parquet")
    names = ["b.parquet/000000001", "a.parquet/000000001", "a.parquet/000000002"]
    features = open_features(str(write_features(tmp_path / "f.npy", np.zeros((3, 4), np.float32), names)))
    found = match_labels(features, read_labels([f"{tmp_path}/a.parquet:label", f"{tmp_path}/b.parquet:label"]))
    assert [found.classes[at] for at in found.targets] == ["6", "3"]
    assert found.rows.tolist() == [0, 2]


def test_several_labels(tmp_path: Path, features: Features) -> None:
    source = csv(tmp_path, "path,label\ncat/1.jpg,x|y\ncat/2.jpg,\neel/deep/1.jpg,y\neel/deep/1.jpg,z\n")
    found = match_labels(features, read_labels(source, multi_label=True), multi_label=True)
    assert found.classes == ("x", "y", "z")
    assert found.targets.tolist() == [[True, True, False], [False, False, False], [False, True, True]]
    table = pyarrow.table({"path": ["cat/1.jpg", "cat/2.jpg"], "tags": [["b", "a"], []]})
    parquet.write_table(table, tmp_path / "tags.parquet")
    found = match_labels(features, read_labels([f"{tmp_path}/tags.parquet:tags"], multi_label=True), multi_label=True)
    assert found.targets.tolist() == [[True, True], [False, False]]
    with pytest.raises(InputError, match="list of labels; pass `multi_label=True`"):
        read_labels([f"{tmp_path}/tags.parquet:tags"])


def test_names_that_are_not_utf8_are_matched(tmp_path: Path, write_features: Any) -> None:
    file = write_features(tmp_path / "f.npy", np.zeros((2, 4), np.float32), ["?", "b.jpg"], hashes=False)
    index = file.with_suffix(".index.jsonl")
    first, second = index.read_text().splitlines()
    index.write_text(json.dumps(json.loads(first) | {"path_bytes": "/2EuanBn"}) + "\n" + second + "\n")
    (tmp_path / "labels.csv").write_bytes(b"path,label\n\xffa.jpg,x\nb.jpg,y\n")
    found = match_labels(open_features(str(file)), read_labels([f"{tmp_path}/labels.csv"]))
    assert found.targets.tolist() == [0, 1]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("mark", [",", ";", "\t"])
@pytest.mark.parametrize("column", ["path", "filepath", "image_path", "Img"])
def test_tables_of_spreadsheets_are_read(tmp_path: Path, encoding: str, mark: str, column: str) -> None:
    rows = [(column, "count", "label"), ("cat/1.jpg", "1", "x"), ('a "b", c;\td.jpg', "2", "é"), ("n.jpg", "3", "NA")]
    with open(tmp_path / "labels.csv", "w", encoding=encoding, newline="") as handle:
        csv_module.writer(handle, delimiter=mark).writerows(rows)
    assert read_labels([f"{tmp_path}/labels.csv"]).by_path == {"cat/1.jpg": ("x",), 'a "b", c;\td.jpg': ("é",)}


@pytest.mark.parametrize("missing", ["NA", "N/A", "#N/A", "<NA>", "NaN", "nan", "NULL", "null", "", " "])
def test_a_missing_label_is_no_class(tmp_path: Path, missing: str) -> None:
    file = csv(tmp_path, f"path,label\na.jpg,{missing}\nb.jpg,x\nc.jpg,None\n")
    assert read_labels(file).by_path == {"b.jpg": ("x",), "c.jpg": ("None",)}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("path,label\ncat/1.jpg,x\ncat/1.jpg,y\n", "line 3: cat/1.jpg is labelled a second time .'y', and 'x' before"),
        (
            "name,kind\ncat/1.jpg,x\n",
            r"has the columns name, kind; expected a column of paths; name it one of path, .*filename",
        ),
        ("path,label\ncat/1.jpg\n", "line 2: has 1 column; expected 2"),
        ("", "is empty"),
        ("path," + "l" * 200_000 + "\ncat/1.jpg,x\n", r"not a CSV file \(line 1: "),
        ("path,label\n", "contains no labels"),
        ("path,label\nphotos/cat/9.jpg,x\n", "none of its 1 paths .*there 'photos/cat/9.jpg', here 'cat/1.jpg'"),
        ("path,label\ndog/bad.jpg,x\n", "1 labelled image failed, and there is no other"),
        ("path,label\ncat/1.jpg,zebra\n", "is labelled 'zebra', which is not one of the head's 2 classes .x, y"),
    ],
)
def test_labels_that_cannot_be_used_are_refused(text: str, reason: str, features: Features, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=reason):
        match_labels(features, read_labels(csv(tmp_path, text)), classes=["x", "y"])


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("labels.txt", "expected folder, FILE.csv"),
        ("none.csv", "cannot be read"),
        ("none.parquet", "name the column"),
        ("none.parquet:label", "cannot be read"),
    ],
)
def test_sources_that_are_none_are_refused(source: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        read_labels([str(tmp_path / source)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("end", [b"\0", b"\0\xd8", b"\0\xdc\0\xd8"])
def test_damaged_utf_16_is_no_text(end: bytes, tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_bytes("path,label\ncat/1.jpg,x".encode("utf-16") + end)
    with pytest.raises(InputError, match=r"l\.csv: not text in UTF-8 or UTF-16"):
        read_labels([str(tmp_path / "l.csv")])


def test_class_names_that_are_none_are_passed_over(tmp_path: Path) -> None:
    for about in (b"[" * 100_000, b'{"info": {"features": {"label": {"names": [1, [2]]}}}}'):
        table = pyarrow.table({"path": ["a.jpg"], "label": [1]}).replace_schema_metadata({"huggingface": about})
        parquet.write_table(table, tmp_path / "t.parquet")
        assert read_labels([f"{tmp_path}/t.parquet:label"]).of("a.jpg") == ("1",)


def test_a_missing_column_is_said(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"a": [1], "b": [2]}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match="has no column 'label'; it has a, b"):
        read_labels([f"{tmp_path}/t.parquet:label"])


def test_a_path_in_two_rows_is_refused(tmp_path: Path, write_features: Any) -> None:
    file = write_features(tmp_path / "f.npy", np.zeros((3, 4), np.float32), ["a.jpg", "b.jpg", "a.jpg"])
    features = open_features(str(file))
    assert match_labels(features, read_labels(csv(tmp_path, "path,label\nb.jpg,x\n"))).rows.tolist() == [1]
    with pytest.raises(InputError, match=r"rows 0 and 2 have the same path, a\.jpg"):
        match_labels(features, read_labels(csv(tmp_path, "path,label\na.jpg,x\n")))


def test_an_image_outside_class_folders_is_refused(tmp_path: Path, write_features: Any) -> None:
    file = write_features(tmp_path / "f.npy", np.zeros((1, 4), np.float32), ["a.jpg"])
    with pytest.raises(InputError, match=r"a\.jpg: is in no class folder"):
        match_labels(open_features(str(file)), read_labels(["folder"]))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("rows", r"has \(2, 4\) features, not \(3, 4\)"),
        ("index", "has 2 rows, .* has 3"),
        ("numbers", "row 2 in line 2"),
        ("junk", "not what robustfeat embed writes"),
        ("meta", "not what robustfeat embed writes"),
        ("no meta", "f.meta.json: no such file"),
        ("nan", r"row 1 \(b\) is not finite, but has no error in the index"),
        ("pickle", r"it has \|O; expected <f4"),
        ("big-endian", r"it has >f4; expected <f4"),
        ("columns", r"it has <f4, in Fortran's order; expected <f4, row by row"),
        ("cut", r"f.npy: .*ends"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(
    change: str, reason: str, tmp_path: Path, write_features: Any
) -> None:
    values = np.zeros((3, 4), np.float32)
    file = write_features(tmp_path / "f.npy", values, ["a", "b", "c"], hashes=False)
    index, meta = file.with_suffix(".index.jsonl"), file.with_suffix(".meta.json")
    lines = index.read_text().splitlines(keepends=True)
    if change == "rows":
        np.save(file, values[:2])
    elif change == "index":
        index.write_text("".join(lines[:2]))
    elif change == "numbers":
        index.write_text(lines[0] + lines[2] + lines[1])
    elif change == "junk":
        index.write_text("path\n" * 3)
    elif change == "meta":
        meta.write_text("{}")
    elif change == "no meta":
        meta.unlink()
    elif change == "nan":
        values[1, 2] = np.nan
        np.save(file, values)
    elif change == "pickle":
        np.save(file, np.array([{"a": 1}], object), allow_pickle=True)
    elif change == "big-endian":
        np.save(file, values.astype(">f4"))
    elif change == "columns":
        np.save(file, np.asfortranarray(values))
    elif change == "cut":
        file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(InputError, match=reason):
        open_features(str(file)).check()


@pytest.mark.parametrize("changed", ["features", "index"])
def test_one_changed_byte_is_found(changed: str, tmp_path: Path, write_features: Any) -> None:
    file = write_features(tmp_path / "f.npy", np.ones((3, 4), np.float32), ["a", "b", "c"])
    place = file if changed == "features" else file.with_suffix(".index.jsonl")
    data = bytearray(place.read_bytes())
    data[-2 if changed == "features" else data.index(b"0" * 64)] ^= 1
    place.write_bytes(data)
    with pytest.raises(InputError, match=f"{place.name}: the sha256 must be .*; the files do not belong together"):
        open_features(str(file))


@pytest.mark.parametrize(
    "change",
    ["two tensors", "F64", "cut", "long header", "deep", "reversed", "float64", "text", "no column", "archive"],
)
def test_altered_files_of_features_are_refused(change: str, tmp_path: Path, write_features: Any) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    names = ["a.jpg", "b.jpg", "c.jpg"]
    suffix = ".safetensors" if change in {"two tensors", "F64", "cut", "long header", "deep"} else ".parquet"
    written = write_features(tmp_path / "f.npy", values, names, hashes=False)
    file = written.with_suffix(".npy" if change == "archive" else suffix)
    kind = pyarrow.list_(pyarrow.float64() if change == "float64" else pyarrow.float32(), 4)
    if change == "two tensors":
        save_file({"features": values, "more": values}, file)
    elif change == "F64":
        save_file({"features": values.astype(np.float64)}, file)
    elif suffix == ".safetensors":
        save_file({"features": values}, file)
        data = file.read_bytes()
        altered = {"cut": data[:-16], "long header": b"\xff" * 8 + data[8:], "deep": data[:8] + b"[" * 100_000}
        file.write_bytes(altered[change])
    elif change == "archive":
        with file.open("wb") as handle:
            np.savez(handle, features=values)
    else:
        columns: dict[str, Any] = {"path": names[::-1] if change == "reversed" else names}
        if change == "text":
            columns["features"] = names
        elif change != "no column":
            columns["features"] = pyarrow.array(values.tolist(), kind)
        parquet.write_table(pyarrow.table(columns), file)
    with pytest.raises(InputError) as caught:
        open_features(str(file))
    assert "\n" not in str(caught.value)


def test_features_without_rows_are_refused(tmp_path: Path, write_features: Any) -> None:
    with pytest.raises(InputError, match="has no rows"):
        open_features(str(write_features(tmp_path / "f.npy", np.empty((0, 4), np.float32), [])))


@pytest.mark.parametrize("kind", ["svm", "logistic", "naive-bayes", "nearest-mean"])
def test_features_that_do_not_vary_end_in_one_line_or_a_head(kind: str, tmp_path: Path, write_features: Any) -> None:
    names = [f"{row % 2}/{row}.jpg" for row in range(40)]
    features = open_features(str(write_features(tmp_path / "f.npy", np.ones((40, 4), np.float32), names)))
    labelled = match_labels(features, read_labels(["folder"]))
    if kind != "naive-bayes":
        assert fit_head(features, labelled, kind=kind)[0].predict(features.values).shape == (40,)
    else:
        with pytest.raises(InputError, match="these features cannot be fitted: "):
            fit_head(features, labelled, kind=kind)


def test_every_format_of_embed_is_read(example_files: list[Path], tmp_path: Path) -> None:
    from robustfeat import FeatureExtractor
    from robustfeat.serving.bulk.embedding import embed_files
    from robustfeat.serving.inputs.listing import list_inputs

    extractor = FeatureExtractor.from_pretrained(threads=1, streams=1)
    expected = extractor.embed(example_files[:5])
    for suffix in (".npy", ".parquet", ".safetensors"):
        out = str(tmp_path / f"as{suffix[1:]}{suffix}")
        with list_inputs(example_files[:5]) as inputs:
            embed_files(extractor, inputs, out, quiet=True)
        assert is_feature_file(out)
        features = open_features(out)
        np.testing.assert_allclose(features.values, expected, rtol=1e-4, atol=1e-5)
        assert list(features.paths) == [file.name for file in example_files[:5]]
    assert not is_feature_file(str(tmp_path / "images.parquet"))
    assert not is_feature_file(str(tmp_path))


def test_an_array_made_elsewhere_is_read_with_its_names(tmp_path: Path, write_features: Any) -> None:
    values = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float64)
    values[3] = np.nan
    np.save(tmp_path / "other.npy", values)
    names = [f"{'ab'[row % 2]}/é{row}.jpg" for row in range(20)]
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n", "utf-8")
    features = open_array(str(tmp_path / "other.npy"), str(tmp_path / "names.txt"))
    assert features.paths == names
    assert features.errors == {3: "not finite"}
    assert features.good.sum() == 19
    labelled = match_labels(features, read_labels(["folder"]))
    head, _ = fit_head(features, labelled)
    assert (len(labelled.rows), labelled.failed, head.model) == (19, 1, None)
    assert [one.error for one in predict_rows(head, features)] == [None] * 3 + ["not finite"] + [None] * 16
    shorter = open_features(str(write_features(tmp_path / "f.npy", np.ones((20, 4), np.float32), names)))
    with pytest.raises(InputError, match=r"takes 6 features, .*f\.npy has 4"):
        head.predict(shorter)
    np.save(tmp_path / "other.npy", values[:, :4])
    with pytest.raises(InputError, match=r"takes 6 features, .*other\.npy has 4"):
        head.predict(open_array(str(tmp_path / "other.npy"), str(tmp_path / "names.txt")))


def test_names_end_at_newlines_alone(tmp_path: Path) -> None:
    np.save(tmp_path / "other.npy", np.ones((5, 2)))
    names = ["a\u2028.jpg", "b\x85.jpg", "c\x0b\x0c.jpg", "d\x1c\x1d\x1e.jpg", "\udcff.jpg"]
    for end in ("", "\n", "\r\n"):
        text = (end or "\n").join(names) + end
        (tmp_path / "names.txt").write_bytes(text.encode("utf-8-sig", "surrogateescape"))
        assert open_array(str(tmp_path / "other.npy"), str(tmp_path / "names.txt")).paths == names


@pytest.mark.parametrize(
    ("content", "names", "reason"),
    [
        (np.ones((3, 2)), "a\nb\n", r"names=.*: has 2 lines; expected the paths of the 3 rows"),
        (np.ones((1, 2)), "", r"names=.*: has 0 lines; expected the paths of the 1 rows"),
        (np.ones(3), "a\nb\nc\n", r"must have an \(n, D\) array of floats; got \(3,\) float64"),
        (np.ones((3, 2), int), "a\nb\nc\n", r"got \(3, 2\) int64"),
        (np.array([[{}]], object), "a\n", r"not a \.npy file of numbers \("),
        (b"junk", "a\n", r"not a \.npy file of numbers"),
        (np.ones((1, 2)), None, r"names=.*: cannot be read \(No such file"),
    ],
)
def test_arrays_that_cannot_be_used_are_refused(content: Any, names: str | None, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "other.npy"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        np.save(file, content, allow_pickle=True)
    if names is not None:
        (tmp_path / "names.txt").write_text(names)
    with pytest.raises(InputError, match=reason) as caught:
        open_array(str(file), str(tmp_path / "names.txt"))
    assert "\n" not in str(caught.value)
