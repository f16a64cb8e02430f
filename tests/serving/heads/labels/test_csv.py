"""Tables of labels as programs write them. Each case says what writes such a file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from robustfeat.errors import InputError
from robustfeat.serving.heads.labels.labels import Labels
from robustfeat.serving.heads.labels.matching import match_paths
from robustfeat.serving.heads.labels.reading import read_labels

PATHS = ["cat/1.jpg", "cat/2.jpg", "dog/a, b.jpg", "dog/é.jpg"]
WANTED = {"cat/1.jpg": ("cat",), "cat/2.jpg": ("cat",), "dog/a, b.jpg": ("dog",), "dog/é.jpg": ("dog, large",)}


def read(tmp_path: Path, content: bytes, name: str = "labels.csv", column: str = "", path: str | None = None) -> Labels:
    (tmp_path / name).write_bytes(content)
    return read_labels([f"{tmp_path / name}{column}"], path_column=path)


def labels_of(found: Labels) -> dict[str, tuple[str, ...]]:
    """Labels by the path of the row that they mean."""
    rows = match_paths("the rows", PATHS, found)
    return {PATHS[row]: (rows.classes[target],) for row, target in zip(rows.rows, rows.targets, strict=True)}


QUOTED = 'path,label\ncat/1.jpg,cat\ncat/2.jpg,cat\n"dog/a, b.jpg",dog\ndog/é.jpg,"dog, large"\n'
SEMICOLONS = "path;label\ncat/1.jpg;cat\ncat/2.jpg;cat\ndog/a, b.jpg;dog\ndog/é.jpg;dog, large\n"
TABS = SEMICOLONS.replace(";", "\t")
FORMS = {
    "quotes: only where they are needed": QUOTED,
    "quotes: around every cell": re.sub(r'^"?(.*?)"?,"?([a-z]+(?:, large)?)"?$', r'"\1","\2"', QUOTED, flags=re.M),
    "quotes: doubled within a cell of another column": QUOTED.replace("label\n", 'label,note\n', 1)
    .replace("cat\n", 'cat,"5"" wide"\n').replace("dog\n", "dog,\n").replace('large"\n', 'large",\n'),
    "quotes: a line break within a cell": QUOTED.replace("label\n", "label,note\n", 1)
    .replace("cat\n", 'cat,"two\nlines"\n').replace("dog\n", "dog,\n").replace('large"\n', 'large",\n'),
    "quotes: a header over two lines": QUOTED.replace("path,label", 'path,"the\nlabel",label')
    .replace(",cat\n", ",x,cat\n").replace(",dog\n", ",x,dog\n").replace('jpg,"dog', 'jpg,x,"dog'),
    "semicolons: commas within cells": SEMICOLONS,
    "semicolons: a comma within the header": SEMICOLONS.replace("label", "label;size, weight, age")
    .replace("cat\n", "cat;1\n").replace("dog\n", "dog;1\n").replace("large\n", "large;1\n"),
    "semicolons: decimals with a comma": SEMICOLONS.replace("path;label", "score;path;label")
    .replace("\ncat/", "\n0,5;cat/").replace("\ndog/", "\n0,25;dog/"),
    "semicolons: Excel's line above the header": "sep=;\n" + SEMICOLONS,
    "semicolons: no header, commas in names": SEMICOLONS.partition("\n")[2],
    "tabs: commas within cells": TABS,
    "tabs: no header": TABS.partition("\n")[2],
    "tabs: semicolons within another column": TABS.replace("label", "label\tnote;a;b;c")
    .replace("cat\n", "cat\tx\n").replace("dog\n", "dog\tx\n").replace("large\n", "large\tx\n"),
    "tabs: Excel's line above the header": "sep=\t\n" + TABS,
    "tabs: Windows paths": TABS.replace("/", "\\"),
    "spaces beside the separators":
        'path ; label\n cat/1.jpg ; cat\ncat/2.jpg; cat \n"dog/a, b.jpg";dog\ndog/é.jpg ;dog, large\n',
    "empty rows of a spreadsheet": SEMICOLONS.replace("\ndog/a", "\n;\n\n;\ndog/a") + ";\n;\n",
    "empty columns of a spreadsheet": re.sub(r"$", ";;", SEMICOLONS.rstrip("\n"), flags=re.M) + "\n",
    "a first column of row numbers": SEMICOLONS.replace("path;", ";path;")
    .replace("\ncat/", "\n0;cat/").replace("\ndog/", "\n1;dog/"),
    "headers in capitals": SEMICOLONS.replace("path;label", "Image_Path;LABEL"),
}  # fmt: skip


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("form", FORMS)
def test_tables_of_every_form_are_read(form: str, encoding: str, end: str, tmp_path: Path) -> None:
    content = FORMS[form].replace("\n", end).encode(encoding)
    assert labels_of(read(tmp_path, content)) == WANTED


@pytest.mark.parametrize("name", ["labels.tsv", "LABELS.TSV", "Labels.Csv"])
def test_a_table_may_be_called_tsv(name: str, tmp_path: Path) -> None:
    assert labels_of(read(tmp_path, TABS.encode(), name)) == WANTED


MISSING = "path,label\ncat/1.jpg,cat\ncat/2.jpg,{}\n"


@pytest.mark.parametrize("cell", ['"NA"', " ", '""', "'NA", "#N/A", "<NA>"])
def test_cells_that_say_missing_are_no_label(cell: str, tmp_path: Path) -> None:
    found = read(tmp_path, MISSING.format(cell).encode())
    wanted = {"cat/1.jpg": ("cat",)}
    assert found.by_path == (wanted if cell != "'NA" else wanted | {"cat/2.jpg": ("'NA",)})


@pytest.mark.parametrize(
    "content",
    [
        'path,label\ncat/1.jpg,cat\ncat/2.jpg,\n"dog/a, b.jpg",\ndog/é.jpg,\n',
        'path,label\ncat/1.jpg,cat\ncat/2.jpg,NaN\n"dog/a, b.jpg",NaN\ndog/é.jpg,NaN\n',
        '"path","label"\n"cat/1.jpg","cat"\n"cat/2.jpg",""\n"dog/a, b.jpg",""\n"dog/é.jpg",""\n',
        "path;label\ncat/1.jpg;cat\ncat/2.jpg;\ndog/a, b.jpg;\ndog/é.jpg;\n",
        ",path,label\n0,cat/1.jpg,cat\n1,cat/2.jpg,\n",
    ],
)
def test_what_pandas_writes_for_a_missing_label_is_none(content: str, tmp_path: Path) -> None:
    """As pandas 3.1 wrote None, NaN and NA: by default, with na_rep, quoting=QUOTE_ALL, sep and the index."""
    assert labels_of(read(tmp_path, content.encode())) == {"cat/1.jpg": ("cat",)}


def test_names_that_mean_missing_elsewhere_are_labels(tmp_path: Path) -> None:
    found = read(tmp_path, b"path,label\na.jpg,None\nb.jpg,none\nc.jpg,n\nd.jpg,-\ne.jpg,0\n")
    assert [one for (one,) in (found.by_path or {}).values()] == ["None", "none", "n", "-", "0"]


@pytest.mark.parametrize(
    ("header", "column", "path", "wanted"),
    [
        ("path,label,label", "", None, "has 2 columns named label"),
        ("path,LABEL,Label ", "", None, "has 2 columns named label"),
        ("path,kind,kind", ":kind", None, "has 2 columns named kind"),
        ("path,path,label", "", None, "has 2 columns named path"),
        ("id,id,label", "", "id", "has 2 columns named id"),
    ],
)
def test_two_columns_of_the_name_that_is_meant_are_refused(
    header: str, column: str, path: str | None, wanted: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"{wanted}; give each column its own name"):
        read(tmp_path, f"{header}\na.jpg,x,y\n".encode(), column=column, path=path)


def test_two_columns_of_another_name_are_no_matter(tmp_path: Path) -> None:
    found = read(tmp_path, b"path,note,note,label\na.jpg,1,2,x\n")
    assert found.by_path == {"a.jpg": ("x",)}
    assert read(tmp_path, b"path,label,Label\na.jpg,1,2\n", column=":Label").by_path == {"a.jpg": ("2",)}


@pytest.mark.parametrize(
    ("content", "path", "wanted"),
    [
        ("id,kind,label\na.jpg,x,y\n", "id", {"a.jpg": ("y",)}),
        ("path,id,label\nz.jpg,a.jpg,y\n", "id", {"a.jpg": ("y",)}),
        ("Image ID;label\na.jpg;y\n", "image id", {"a.jpg": ("y",)}),
        ("ID,id,label\nz.jpg,a.jpg,y\n", "id", {"a.jpg": ("y",)}),
        (" id , label\na.jpg,y\n", "id", {"a.jpg": ("y",)}),
    ],
)
def test_the_column_of_paths_may_be_named(
    content: str, path: str, wanted: dict[str, tuple[str, ...]], tmp_path: Path
) -> None:
    assert read(tmp_path, content.encode(), path=path).by_path == wanted


NAMES = "path, file, filename, file_name, filepath, file_path, image, image_path, image_name, img, img_path"


@pytest.mark.parametrize(
    ("content", "path", "reason"),
    [
        (
            "id,label\na.jpg,x\n",
            None,
            f"expected a column of paths; name it one of {NAMES}, or pass its name as `path_c",
        ),
        ("id,label\na.jpg,x\n", "key", "path_column=key: .*has the columns id, label; expected key with the paths"),
        ("a.jpg,x\n", "key", "has the columns a.jpg, x; expected key with the paths"),
        ("path,kind\na.jpg,x\n", None, r"expected label or labels or class for the labels; name it as labels.csv:COL"),
        ("label\nx\n", None, "has the columns label; expected a column of paths"),
    ],
)
def test_a_column_that_is_missing_is_said_with_the_names_that_would_do(
    content: str, path: str | None, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=reason):
        read(tmp_path, content.encode(), path=path)
