"""The options of commands that fit heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

__all__ = ["selection_option"]


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
