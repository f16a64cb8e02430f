"""The methods of `Recipe.method`, by name. Loads no PyTorch."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from robustfeat.errors import InputError

__all__ = ["METHODS", "Method", "import_failed", "local_modules", "require_method"]


@dataclass(frozen=True)
class Method:
    """The choices of a method at each level; None switches a level off.

    Attributes:
        direction: of the example level: `gradient`, `features` (stable) or `random` (a control).
        weighting: of the concept level: `adversary` (Eqs. 4 to 6), `groups` (GroupDRO) or `classes` (each class weighs
            the same).
    """

    direction: str | None = None
    weighting: str | None = None


METHODS = {
    "erm": Method(),
    "el": Method(direction="gradient"),
    "cl": Method(weighting="adversary"),
    "hrrl": Method("gradient", "adversary"),
    "stable": Method(direction="features"),
    # Controls and a relative, for comparisons.
    "random": Method(direction="random"),
    "balanced": Method(weighting="classes"),
    "groupdro": Method(weighting="groups"),
}


def require_method(name: str) -> None:
    """A method has this name, or a module of this name is there.

    Raises:
        InputError: it is neither.
    """
    if name in METHODS:
        return
    module, colon, _ = name.partition(":")
    if not colon:
        raise InputError(f"expected {', '.join(METHODS)} or module:Class", argument="method", value=name)
    try:
        with local_modules():
            found = importlib.util.find_spec(module) is not None
        reason = f"No module named {module!r}"
    except (ImportError, ValueError) as exc:
        found, reason = False, str(exc)
    if not found:
        raise import_failed(name, reason)


@contextmanager
def local_modules() -> Iterator[None]:
    """Modules in the current folder can be imported, behind all installed ones."""
    here = str(Path.cwd())
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.append(here)
    try:
        yield
    finally:
        if added and here in sys.path:
            sys.path.remove(here)


def import_failed(name: str, reason: object) -> InputError:
    """The error for a class that cannot be imported."""
    return InputError(
        f"cannot be imported ({reason})",
        argument="method",
        value=name,
        fix="run where it lies, or put its folder on PYTHONPATH",
    )
