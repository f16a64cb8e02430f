"""Options shared by the commands that fit or use heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

__all__ = ["labels_options", "names_option", "selection_option"]

names_option = click.option(
    "--names",
    metavar="FILE",
    help="File with the path of each row, one per line, for a .npy file that embed did not write.  "
    "[default: row numbers]",
)


def labels_options(*, required: bool = False) -> Callable[..., Any]:
    """Adds --labels and --path-column to a command."""
    labels = click.option(
        "--labels",
        multiple=True,
        required=required,
        metavar="LABELS",
        help="Where to find labels: folder (the first folder of each path), FILE.csv, FILE.csv:COLUMN or "
        "FILE.parquet:COLUMN. A .npy file without --names also takes FILE.txt or FILE.npy, in row order. Repeatable.",
    )
    path_column = click.option(
        "--path-column",
        metavar="COLUMN",
        help="Column of paths in LABELS.  [default: path, file, image_path, ...]",
    )

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        return labels(path_column(command))

    return add


def selection_option(default: str) -> Callable[..., Any]:
    """Adds --selection to a command."""
    return click.option(
        "--selection",
        type=click.Choice(["auto", "folds", "holdout"]),  # importing them would import NumPy; a test compares
        default=default,
        show_default=True,
        help="How to choose C and scaling: by repeated 5-fold cross-validation, or on a held-out 10 % of rows as in "
        "the published results. auto is folds below 5,000 rows.",
    )
