"""Searches a collection for queries, and writes the matches as CSV or JSON lines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.counts import format_count
from robustfeat.errors import InputError
from robustfeat.progress import Progress, json_line
from robustfeat.serving.collections.neighbours import Neighbours, queries_per_pass
from robustfeat.serving.heads.cells import csv_line
from robustfeat.serving.heads.features import Features, Rows
from robustfeat.serving.inputs.sources import path_fields

__all__ = ["Match", "Queries", "Search", "find_similar", "join_queries", "rows_named", "to_csv", "to_jsonl"]

Search = Callable[[NDArray[np.float32], int, NDArray[np.int64]], Neighbours]


@dataclass(frozen=True, eq=False)
class Queries:
    """The queries of a search.

    Attributes:
        names: m names for the output.
        values: (m, D) features, possibly memory-mapped.
        rows: (m,) each query's own row in the collection; -1 for none.
        errors: errors of failed queries, by their number.
    """

    names: Sequence[str]
    values: Rows
    rows: NDArray[np.int64]
    errors: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of_features(cls, features: Features, *, own: bool = False) -> Queries:
        """Makes queries of all rows of some features; `own` if they are the collection itself."""
        rows = np.arange(len(features)) if own else np.full(len(features), -1, np.int64)
        return cls(features.paths, features.values, rows, features.errors)

    @classmethod
    def of_rows(cls, features: Features, rows: Sequence[int], names: Sequence[str]) -> Queries:
        """Makes queries of some rows of the collection, with the names that the user typed."""
        errors = {at: features.errors[row] for at, row in enumerate(rows) if row in features.errors}
        return cls(names, features.values[np.array(rows, np.int64)], np.array(rows, np.int64), errors)

    @classmethod
    def of_vectors(cls, names: Sequence[str], values: NDArray[np.float32]) -> Queries:
        """Makes queries of vectors that are not rows of the collection, such as embedded texts."""
        return cls(names, values, np.full(len(names), -1, np.int64))


@dataclass(frozen=True)
class Match:
    """One line of the output.

    Attributes:
        query: the query's name.
        rank: 1 for the nearest row; 0 for a failed query.
        row, path, cosine: the row that was found; None for a failed query.
        error: the query's error.
    """

    query: str
    rank: int
    row: int = -1
    path: str = ""
    cosine: float = float("nan")
    error: str | None = None


def rows_named(features: Features, queries: Iterable[str]) -> dict[str, int]:
    """The rows that queries name, by query: a row number, or a path in the index (its first row).

    Raises:
        InputError: the collection has no row of that number.
    """
    found: dict[str, int] = {}
    wanted = set(queries)
    for query in wanted:
        if query.isdecimal() and query.isascii():
            if int(query) >= len(features):
                raise InputError(
                    f"row {query}: {features.place} has {format_count(len(features), 'row')}, from 0",
                    fix=f"for a file of this name, pass ./{query}",
                )
            found[query] = int(query)
    wanted -= set(found)
    if wanted:
        for row, path in enumerate(features.paths):
            if path in wanted:
                found.setdefault(path, row)
    return found


def join_queries(parts: Sequence[Queries]) -> Queries:
    """Concatenates queries. A single part is not copied, since it may exceed the memory."""
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *(len(part.names) for part in parts)]).tolist()
    return Queries(
        [name for part in parts for name in part.names],
        np.concatenate([np.asarray(part.values) for part in parts]),
        np.concatenate([part.rows for part in parts]),
        {start + at: why for start, part in zip(starts, parts, strict=False) for at, why in part.errors.items()},
    )


def find_similar(
    features: Features, search: Search, queries: Queries, k: int, progress: Progress | None = None
) -> Iterator[Match]:
    """Yields the k nearest rows of each query without its own row. A failed query gives one match with its error.

    Args:
        features: the collection.
        search: finds the k nearest rows of (m, D) queries whose own rows are `own`; see `find_neighbours`.
        queries: the queries.
        k: number of rows per query.
        progress: counts queries.
    """
    k = max(1, min(k, len(features)))
    step = queries_per_pass(k)
    for start in range(0, len(queries.names), step):
        part = slice(start, min(start + step, len(queries.names)))
        found = search(queries.values[part], k, queries.rows[part])
        for number in range(part.start, part.stop):
            name = queries.names[number]
            if number in queries.errors:
                yield Match(name, 0, error=queries.errors[number])
                continue
            rows, cosines = found.rows[number - start].tolist(), found.cosines[number - start].tolist()
            for rank, (row, cosine) in enumerate(zip(rows, cosines, strict=True), 1):
                if row >= 0:
                    yield Match(name, rank, row, features.paths[row], cosine)
        if progress:
            progress.advance(part.stop - part.start)


def to_csv(matches: Iterable[Match]) -> Iterator[str]:
    """Yields a CSV header and one line per match: query, rank, row, path, cosine. It skips failed queries."""
    yield csv_line(["query", "rank", "row", "path", "cosine"])
    for one in matches:
        if one.error is None:
            yield csv_line([one.query, one.rank, one.row, one.path, one.cosine])


def to_jsonl(matches: Iterable[Match]) -> Iterator[str]:
    """Yields one JSON object per match with the same names, or the name and the error of a failed query."""
    for one in matches:
        query = {key.replace("path", "query"): value for key, value in path_fields(one.query).items()}
        found: dict[str, Any] = {"rank": one.rank, "row": one.row, **path_fields(one.path), "cosine": one.cosine}
        yield json_line({**query, **(found if one.error is None else {"error": one.error})}) + "\n"
