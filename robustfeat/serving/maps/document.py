"""Writes a map as one self-contained HTML file without network requests."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.files import new_file
from robustfeat.palette import CATEGORIES, SCALE
from robustfeat.serving.inputs.sources import path_fields
from robustfeat.serving.maps.colourings import Colouring, category_colours, name_places
from robustfeat.serving.maps.layers import Layer
from robustfeat.serving.maps.sprites import Sprites

__all__ = ["CollectionMap", "write_page"]

_FOLDER = Path(__file__).parent / "page"
_PLACE = re.compile(r"\{(policy|title|style|script)\}")
_SCRIPTS = ("data", "geometry", "colours", "draw", "panel", "main")


@dataclass(frozen=True, eq=False)
class CollectionMap:
    """The contents of a page.

    Attributes:
        title: title of the page.
        about: a sentence about the map.
        paths: n names, as in the index.
        places: (n, 2) float32 from `to_unit_square`; y grows downwards.
        colourings: at least one. The first is shown first.
        layers: marked points.
        sprites: thumbnails; None without any.
    """

    title: str
    about: str
    paths: tuple[str, ...]
    places: NDArray[np.float32]
    colourings: tuple[Colouring, ...]
    layers: tuple[Layer, ...] = ()
    sprites: Sprites | None = None


def write_page(shown: CollectionMap, target: str | Path) -> int:
    """Writes the page, and returns its size in bytes.

    Raises:
        InputError: the file cannot be written.
    """
    style = (_FOLDER / "map.css").read_text("utf-8")
    script = _script()
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    title = html.escape(_plain(shown.title))
    parts = {"{policy}": policy, "{title}": title, "{style}": style, "{script}": script}
    page = (_FOLDER / "map.html").read_text("utf-8")
    # Replace in one pass, since a title may contain `{script}`.
    before, after = (_PLACE.sub(lambda match: parts[match[0]], half) for half in page.split("{blocks}"))
    with new_file(target) as partial, open(partial, "w", encoding="utf-8") as handle:
        handle.write(before)
        handle.write(f'<script type="application/json" id="data">{_data(shown)}</script>\n')
        for sheet in shown.sprites.sheets if shown.sprites else ():
            handle.write(f'<script type="text/plain" class="sheet">{base64.b64encode(sheet).decode()}</script>\n')
        handle.write(after)
        return handle.tell()


def _script() -> str:
    text = "\n".join((_FOLDER / f"{name}.js").read_text("utf-8") for name in _SCRIPTS)
    return f'"use strict";\n(() => {{\n{text}\n}})();'


def _hash(text: str) -> str:
    """The hash of an inline script or style for a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _data(shown: CollectionMap) -> str:
    fields = [path_fields(path) for path in shown.paths]
    sides = shown.places.max(0) - shown.places.min(0) if len(shown.places) else np.ones(2)
    content = {
        "title": _plain(shown.title),
        "about": _plain(shown.about),
        "paths": [field["path"] for field in fields],
        "raw": {str(row): field["path_bytes"] for row, field in enumerate(fields) if "path_bytes" in field},
        "x": _array(shown.places[:, 0], "<f4"),
        "y": _array(shown.places[:, 1], "<f4"),
        "width": max(float(sides[0]), 0.2),
        "height": max(float(sides[1]), 0.2),
        # In the order of the index, the last class would cover all others.
        "order": _array(np.random.default_rng(0).permutation(len(shown.paths)), "<u4"),
        "palettes": {"light": CATEGORIES.light, "dark": CATEGORIES.dark},
        "scales": {"light": SCALE.light, "dark": SCALE.dark},
        "colourings": [_colouring(one, shown.places) for one in shown.colourings],
        "layers": [_layer(one) for one in shown.layers],
        "thumbnails": _sprites(shown.sprites),
    }
    # Escape `<`, which could end the element, and U+2028.
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")


def _colouring(one: Colouring, places: NDArray[np.float32]) -> dict[str, Any]:
    about = {"name": _plain(one.name), "note": _plain(one.note)}
    if one.is_numeric:
        known = one.values[np.isfinite(one.values)]
        low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
        return about | {"kind": "numbers", "values": _array(one.values, "<f4"), "low": low, "high": high}
    count = len(one.names)
    return about | {
        "kind": "categories",
        "names": [_plain(name) for name in one.names],
        "values": _array(one.values, "<i4"),
        "colours": category_colours(one.values, count, places),
        "places": name_places(one.values, count, places),
    }


def _layer(one: Layer) -> dict[str, Any]:
    return {
        "name": _plain(one.name),
        "note": _plain(one.note),
        "rows": _array(one.rows, "<i4"),
        "groups": None if one.groups is None else _array(one.groups, "<i4"),
        "texts": [_plain(text) for text in one.texts] or None,
    }


def _sprites(sprites: Sprites | None) -> dict[str, Any] | None:
    if sprites is None or not len(sprites.rows):
        return None
    return {
        "side": sprites.side,
        "columns": sprites.columns,
        "count": len(sprites.rows),
        "rows": _array(sprites.rows, "<i4"),
    }


def _array(values: NDArray[Any], kind: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values, kind).tobytes()).decode()


def _plain(text: str) -> str:
    """Replaces bytes that are not UTF-8 by U+FFFD."""
    return path_fields(text)["path"]
