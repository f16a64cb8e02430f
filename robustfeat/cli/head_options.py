"""The options of commands that fit or use heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

__all__ = ["labels_options", "names_option", "selection_option"]

names_option = click.option(
    "--names",
    metavar="FILE",
    help="The path of each row, one per line, of a .npy file that embed did not write.  [default: row numbers]",
)


def labels_options(*, required: bool = False) -> Callable[..., Any]:
    """Gives a command --labels, which says what the images are, and --path-column."""
    labels = click.option(
        "--labels",
        multiple=True,
        required=required,
        metavar="LABELS",
        help="folder (the first folder of each path), FILE.csv, FILE.csv:COLUMN or FILE.parquet:COLUMN; for a .npy "
        "file without --names also FILE.txt or FILE.npy, in the order of its rows. May be repeated.",
    )
    path_column = click.option(
        "--path-column", metavar="COLUMN", help="The column of paths in LABELS.  [default: path, file, image_path, ...]"
    )

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        return labels(path_column(command))

    return add


def selection_option(default: str) -> Callable[..., Any]:
    """Gives a command --selection, which says how C and scaling are chosen."""
    return click.option(
        "--selection",
        type=click.Choice(["auto", "folds", "holdout"]),  # a test compares: to import them takes NumPy
        default=default,
        show_default=True,
        help="Choose C and scaling by repeated 5-fold cross-validation (auto: below 5,000 rows) or by a held-out "
        "10 %, as the published results do.",
    )
