"""Finds approximate nearest rows in very large collections, with an index beside the features.

faiss builds the index: lists of rows around cluster centres, with one byte per number (IVF, SQ8). A query searches the
nearest lists. The cosines of the rows found are then computed exactly, from the features.

    NAME.faiss         the index of faiss
    NAME.faiss.json    the features that it belongs to, and the sha256 of NAME.faiss
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.errors import InputError, first_line
from robustfeat.files import new_file, take_turn
from robustfeat.progress import Progress
from robustfeat.serving.collections.directions import to_units
from robustfeat.serving.collections.neighbours import Neighbours
from robustfeat.serving.heads.features import CHUNK_ROWS, Features
from robustfeat.serving.inputs.remote import is_remote

__all__ = ["ApproximateIndex", "index_place", "make_index", "open_index"]

_MOST_LISTS = 4096
_FITTED_ROWS = 40
"""Training rows per list: the fewest without a warning of faiss. More change little."""

_PROBED = 64
"""Lists that a query searches."""

_CANDIDATES = 10
"""Rows with an exact cosine, per requested row."""

_QUERIES = 1024


def index_place(features: Features) -> str:
    """The path of the index of some features.

    Raises:
        InputError: the features have no meta file or are not on this machine.
    """
    if features.meta_sha256 is None or is_remote(features.place):
        raise InputError(f"{features.place}: an index needs features that embed wrote to this machine")
    if features.place.endswith("/"):
        return f"{features.place}_rows.faiss"
    return features.place.rpartition(".")[0] + ".faiss"


def make_index(features: Features, *, threads: int, progress: Progress | None = None) -> None:
    """Builds the index of some features beside them, unless it is there. It needs D + 20 bytes of memory per row.

    A process that builds the same index is waited for.

    Args:
        features: the collection.
        threads: number of processors to use.
        progress: counts rows.

    Raises:
        InputError: see `index_place`, or all rows failed, or the files cannot be written.
        ModuleNotFoundError: faiss is missing.
    """
    place = index_place(features)
    with take_turn(Path(place).with_suffix("")):
        if not Path(f"{place}.json").exists():
            _build_index(features, place, threads, progress)


def _build_index(features: Features, place: str, threads: int, progress: Progress | None) -> None:
    import faiss

    size = features.values.shape[1]
    faiss.omp_set_num_threads(threads)
    rows = np.flatnonzero(features.good)
    if not len(rows):
        raise InputError(f"{features.place}: all images failed, so there is nothing to index")
    lists = min(_MOST_LISTS, max(1, int(4 * np.sqrt(len(rows)))), max(1, len(rows) // _FITTED_ROWS))
    index = faiss.index_factory(size, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
    fitted = rows[np.linspace(0, len(rows) - 1, min(len(rows), _FITTED_ROWS * lists)).astype(np.int64)]
    index.train(_units(features, fitted))
    for start in range(0, len(features), CHUNK_ROWS):
        part = np.arange(start, min(start + CHUNK_ROWS, len(features)))
        good = part[features.good[part]]
        index.add_with_ids(_units(features, good), good)
        if progress:
            progress.advance(len(part))
    with new_file(place) as partial:
        faiss.write_index(index, str(partial))
        with open(partial, "rb") as handle:
            sha256 = hashlib.file_digest(handle, "sha256").hexdigest()
    about = {"features_meta_sha256": features.meta_sha256, "sha256": sha256, "faiss": faiss.__version__}
    with new_file(f"{place}.json") as partial:
        partial.write_text(json.dumps(about, indent=2) + "\n")


def open_index(features: Features, *, threads: int) -> ApproximateIndex:
    """Opens the index beside some features.

    Raises:
        InputError: the index is missing, damaged, or belongs to other features.
        ModuleNotFoundError: faiss is missing.
    """
    import faiss

    place = index_place(features)
    fix = f"remove {place}.json to build the index again"
    faiss.omp_set_num_threads(threads)
    try:
        about = json.loads(Path(f"{place}.json").read_bytes())
        of, expected = about["features_meta_sha256"], about["sha256"]
        with open(place, "rb") as handle:
            found = hashlib.file_digest(handle, "sha256").hexdigest()
        if of != features.meta_sha256:
            raise InputError(f"{place}: is the index of an earlier {features.place}", fix=fix)
        if found != expected:
            raise InputError(f"{place}: its sha256 differs from {place}.json", fix=fix)
        # Map the file, so only the searched lists are read.
        index: Any = faiss.read_index(place, faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as exc:
        raise InputError(f"{place}: cannot be read ({first_line(exc)})", fix=fix) from exc
    index.nprobe = min(_PROBED, index.nlist)
    return ApproximateIndex(features, index)


@dataclass(frozen=True, eq=False)
class ApproximateIndex:
    """An open index.

    Attributes:
        features: the collection.
        index: the index of faiss.
    """

    features: Features
    index: Any

    def search(self, queries: NDArray[np.floating], k: int, own: NDArray[np.int64]) -> Neighbours:
        """Works like `find_neighbours`, but may miss rows."""
        rows = np.full((len(queries), k), -1, np.int64)
        cosines = np.full((len(queries), k), np.nan)
        for start in range(0, len(queries), _QUERIES):
            finite = np.flatnonzero(np.isfinite(queries[start : start + _QUERIES]).all(1)) + start
            if not len(finite):
                continue
            units = to_units(np.asarray(queries[finite]))
            _, found = self.index.search(units.astype(np.float32), min(_CANDIDATES * k + 1, len(self.features)))
            for number, unit, candidates in zip(finite, units, found, strict=True):
                wanted = candidates[(candidates >= 0) & (candidates != own[number])]
                exact = np.clip((to_units(self.features.values[wanted]) * unit).sum(1), -1, 1)
                best = np.lexsort((wanted, -exact))[:k]
                rows[number, : len(best)], cosines[number, : len(best)] = wanted[best], exact[best]
        return Neighbours(rows, cosines)


def _units(features: Features, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    return to_units(np.asarray(features.values[rows])).astype(np.float32)
