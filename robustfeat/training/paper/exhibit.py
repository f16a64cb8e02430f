"""A table or a figure of a report, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from robustfeat.hub.markdown import columns
from robustfeat.training.evaluation.figures import Forest, Panel, draw

__all__ = ["TITLES", "Exhibit"]

TITLES = {"erm": "ERM", "el": "EL", "cl": "CL", "hrrl": "HRRL", "erm-long": "ERM for HRRL's time",
           "random": "random directions", "balanced": "class-balanced ERM", "groupdro": "GroupDRO"}  # fmt: skip
"""What tables call the methods."""


@dataclass(frozen=True)
class Exhibit:
    """A table or a figure.

    Attributes:
        name: such as table2.
        title: with the scale.
        rows: of the table, or the figure's numbers; cells by column, those that are missing are empty.
        panels: of a figure.
        notes: lines to be read with it.
    """

    name: str
    title: str
    rows: Sequence[Mapping[str, Any]]
    panels: Sequence[Panel | Forest] = ()
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def columns(self) -> list[str]:
        """Of the rows together."""
        return columns(self.rows)

    @cached_property
    def svg(self) -> bytes:
        """The panels as one picture, drawn once for its own file and for the page."""
        return draw(self.panels, "svg", self.name)
