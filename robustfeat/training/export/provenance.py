"""Describes the source and the terms of a model folder's network for config.json. Loads no PyTorch."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Mapping
from typing import Any

__all__ = ["imported", "versions"]


def imported(
    source: str,
    facts: Mapping[str, Any] = {},
    *,
    terms: str | None,
    license_id: str | None,
    libraries: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The provenance of an imported network.

    Args:
        source: in words.
        facts: further entries, such as `revision`; those that are None are left out.
        terms: under which the weights may be used.
        license_id: the Hub's name of a license.
        libraries: modules that made the network.
    """
    return {
        "source": source,
        **{name: value for name, value in facts.items() if value is not None},
        "terms": terms or license_id or "those of the imported weights",
        **({"license": license_id} if license_id else {}),
        "versions": versions(*libraries),
    }


def versions(*libraries: str) -> dict[str, str]:
    """Versions of these modules, and of what takes part in each folder."""
    names = ("robustfeat", *libraries, "onnx", "onnxruntime", "numpy")
    found = {name: str(importlib.import_module(name).__version__) for name in names}
    return {**found, "python": platform.python_version()}
