"""Writes and reads coordinates as CSV: path, x, y, and the values of the colourings."""

from __future__ import annotations

import csv
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from robustfeat.errors import InputError
from robustfeat.files import new_file
from robustfeat.serving.heads.cells import csv_line, encode_line, unquote_cell
from robustfeat.serving.maps.colourings import Colouring
from robustfeat.serving.maps.document import CollectionMap
from robustfeat.serving.maps.layout import to_unit_square

__all__ = ["read_places", "write_places"]


def write_places(shown: CollectionMap, target: str) -> int:
    """Writes the file, and returns its size in bytes.

    Raises:
        InputError: the file cannot be written.
    """
    columns = [_texts(one) for one in shown.colourings]
    places = [(f"{x:.7g}", f"{y:.7g}") for x, y in shown.places.tolist()]
    with new_file(target) as partial, open(partial, "wb") as handle:
        handle.write(encode_line(csv_line(["path", "x", "y", *(one.name for one in shown.colourings)])))
        for path, place, *values in zip(shown.paths, places, *columns, strict=True):
            handle.write(encode_line(csv_line([path, *place, *values])))
        return handle.tell()


def _texts(one: Colouring) -> list[str]:
    if one.is_numeric:
        return ["" if np.isnan(value) else f"{value:.6g}" for value in one.values.tolist()]
    return ["" if value < 0 else one.names[value] for value in one.values.tolist()]


def read_places(file: str, paths: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Reads the rows of a file, ascending, and their coordinates, (m, 2), normalised by `to_unit_square`.

    Args:
        file: a CSV file with the columns path, x and y.
        paths: paths of all rows.

    Raises:
        InputError: the file cannot be read, lacks a column, has none of the paths, or has a path twice.
    """
    index = {path: row for row, path in enumerate(paths)}
    found: dict[int, tuple[float, float]] = {}
    try:
        with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as handle:
            reader = csv.DictReader(handle)
            columns = list(reader.fieldnames or ())
            if not {"path", "x", "y"} <= set(columns):
                listed = ", ".join(columns) or "none"
                raise InputError(f"has the columns {listed}; expected path, x and y", argument="layout", value=file)
            for record in reader:
                row = index.get(unquote_cell(record["path"] or ""))
                if row is None:
                    continue
                place = (float(record["x"]), float(record["y"]))
                if not np.isfinite(place).all():
                    raise ValueError(f"line {reader.line_num}: {place} is not finite")
                if row in found:
                    raise ValueError(f"line {reader.line_num}: {paths[row]} already has coordinates")
                found[row] = place
    except OSError as exc:
        raise InputError(f"cannot be read ({exc.strerror})", argument="layout", value=file) from exc
    except (ValueError, TypeError, csv.Error) as exc:
        raise InputError(f"not a CSV file of coordinates ({exc})", argument="layout", value=file) from exc
    if not found:
        fix = "leave it out to make a new layout"
        raise InputError("has coordinates of none of these images", argument="layout", value=file, fix=fix)
    rows = sorted(found)
    return np.array(rows, np.int64), to_unit_square([found[row] for row in rows])
