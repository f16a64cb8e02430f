"""Places of images go to a table and come back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from robustfeat.errors import InputError
from robustfeat.serving.maps.places_file import read_places, write_places
from tests.serving.maps.conftest import Drawn, path_of


def test_places_come_back_for_paths_of_any_kind(drawn: Drawn, tmp_path: Path) -> None:
    file = tmp_path / "map.csv"
    assert write_places(drawn.shown, str(file)) == file.stat().st_size
    rows, places = read_places(str(file), drawn.features.paths)
    assert rows.tolist() == list(range(60))
    np.testing.assert_allclose(places, drawn.shown.places, atol=1e-6)
    assert b"byte-\xff.png" in file.read_bytes()
    some, _ = read_places(str(file), [path_of(7), "elsewhere.png", path_of(3)])
    assert some.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,x\na,1\n", "has the columns path, x; expected path, x and y"),
        ("path,x,y\na,1,2\na,1,3\n", "line 3: a already has coordinates"),
        ("path,x,y\na,1,inf\n", "line 2: .* is not finite"),
        ("path,x,y\na,one,2\n", "not a CSV file of coordinates"),
        ("path,x,y\na,1\n", "not a CSV file of coordinates"),
        ("", "has the columns none"),
    ],
)
def test_other_tables_are_refused_by_their_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "places.csv"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        read_places(str(file), ["a"])
    with pytest.raises(InputError, match="cannot be read"):
        read_places(str(tmp_path / "nowhere.csv"), ["a"])
