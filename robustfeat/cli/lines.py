"""Lines of CSV or JSON that a command writes: to stdout, or to the file that --out names."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

import click

__all__ = ["require_output", "write_lines"]


def require_output(out: str | None, inputs: Iterable[str], suffixes: tuple[str, ...] = (".csv", ".jsonl")) -> None:
    """Asks of --out what would else be found after the work."""
    from robustfeat.errors import InputError

    if out is None:
        return
    if not out.endswith(suffixes):
        raise click.UsageError(f"--out {out}: expected a name ending in {' or '.join(suffixes)}")
    if not Path(out).absolute().parent.is_dir():
        raise InputError(f"--out {out}: the folder {Path(out).parent} does not exist; make it first")
    if any(Path(out).absolute() == Path(name).absolute() for name in inputs):
        raise InputError(f"--out {out}: is an input, too; choose another name")


def write_lines(lines: Iterable[str], out: str | None = None, stream: TextIO | None = None) -> None:
    """Writes to the file `out`, which appears whole, or to a stream, stdout by default.

    Names that are not UTF-8 keep their bytes, whatever the terminal's encoding.
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
