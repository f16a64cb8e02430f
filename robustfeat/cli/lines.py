"""Writes a command's CSV or JSON lines to stdout or to the file of --out."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

import click

__all__ = ["require_output", "write_lines"]


def require_output(
    out: str | None, inputs: Iterable[str], suffixes: tuple[str, ...] = (".csv", ".jsonl"), *, option: str = "--out"
) -> None:
    """Refuses an output with a wrong name or no folder, or one that is also an input.

    The index and meta files of features count as inputs, too.
    """
    from robustfeat.errors import InputError

    if out is None:
        return
    if not out.endswith(suffixes):
        raise click.UsageError(f"{option} {out}: expected a name ending in {' or '.join(suffixes)}")
    if not Path(out).absolute().parent.is_dir():
        raise InputError(f"{option} {out}: the folder {Path(out).parent} does not exist; make it first")
    place = os.path.realpath(out)
    if any(place == os.path.realpath(file) for name in inputs for file in _files(name)):
        raise InputError(f"{option} {out}: is also an input; choose another name")


def _files(name: str) -> tuple[str, ...]:
    """An input file, with its index and meta files if it holds features."""
    from robustfeat.serving.bulk.formats import FORMATS
    from robustfeat.serving.bulk.job import Places, holds_dataset

    if holds_dataset(name) and Path(name).is_dir():
        return (name, *map(str, Path(name).iterdir()))
    if Path(name).suffix not in FORMATS or not Path(name).is_file():
        return (name,)
    places = Places.of(name, argument=None)
    return name, places.index, places.meta


def write_lines(lines: Iterable[str], out: str | None = None, stream: TextIO | None = None) -> None:
    """Writes lines to the file `out`, which appears whole, or else to a stream (default: stdout).

    Names that are not UTF-8 keep their bytes, whatever the terminal's encoding is.
    """
    from robustfeat.files import new_file
    from robustfeat.serving.heads.cells import encode_line

    if out is not None:
        with new_file(out) as partial, open(partial, "wb") as handle:
            handle.writelines(map(encode_line, lines))
        return
    stream = stream or sys.stdout
    stream.flush()
    stream.buffer.writelines(map(encode_line, lines))
    stream.buffer.flush()
