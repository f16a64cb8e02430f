"""`robustfeat similar`."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from robustfeat.cli.extraction import Extraction, extraction_options
from robustfeat.cli.feature_inputs import open_extractor_of, remark, require_model
from robustfeat.cli.head_options import names_option
from robustfeat.cli.lines import require_output, write_lines
from robustfeat.cli.rendering import Command, say

if TYPE_CHECKING:
    from robustfeat.serving.collections.similar import Match, Queries, Search
    from robustfeat.serving.heads.features import Features
    from robustfeat.serving.inputs.input_list import InputList


@click.command("similar", cls=Command, short_help="Search a collection by image, row or words.")
@click.argument("feats", metavar="FEATS")
@click.argument("queries", nargs=-1, metavar="[QUERY]...")
@click.option(
    "--text", "texts", multiple=True, metavar="WORDS", help="Search by words, with a model such as CLIP. Repeatable."
)
@click.option("-k", "k", type=click.IntRange(min=1), default=10, show_default=True, help="Images to find per query.")
@click.option("--out", metavar="FILE", help="Write to this .csv or .jsonl file instead of CSV to stdout.")
@names_option
@click.option(
    "--approximate",
    is_flag=True,
    help="Search an approximate index, for more than 10^7 rows. It lies beside FEATS and is built if missing.",
)
@extraction_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line instead of CSV.")
@click.option("--quiet", is_flag=True, help="Hide progress.")
def command(
    feats: str,
    queries: tuple[str, ...],
    texts: tuple[str, ...],
    k: int,
    out: str | None,
    names: str | None,
    approximate: bool,
    extraction: Extraction,
    as_json: bool,
    quiet: bool,
) -> int:
    """Finds the rows of FEATS with the highest cosine to each QUERY.

    Prints CSV with the columns query, rank, row, path and cosine.

    A QUERY is a row number (from 0), a path in the index of FEATS, a file of features from the same model, or an INPUT
    of `embed`. Images and words are embedded with the model of FEATS. If it is not the built-in model, pass --model.
    Write ./NAME for a file whose name is also a row number or in the index.

    The search is exact unless --approximate is set. Among equal cosines the smaller row comes first. A query that is a
    row of FEATS does not find itself, but finds its copies. Failed rows are never found. The exit code is 3 if a query
    failed.
    """
    from threadpoolctl import threadpool_limits

    from robustfeat.progress import Progress
    from robustfeat.serving.collections.similar import find_similar, join_queries, to_csv, to_jsonl
    from robustfeat.serving.heads.features import open_array, open_features
    from robustfeat.system import available_cpus

    if not queries and not texts:
        raise click.UsageError("Missing argument 'QUERY...', or --text.")
    require_output(out, [feats, *queries, *([names] if names else [])])
    features = open_features(feats) if names is None else open_array(feats, names)
    found = join_queries(list(_open_queries(features, queries, texts, extraction, quiet)))
    progress = Progress("similar", len(found.names), "queries", quiet=quiet)
    threads = extraction.options.threads or available_cpus()
    with threadpool_limits(threads):
        search = _open_index(features, threads, quiet) if approximate else _exact(features)
        matches = find_similar(features, search, found, k, progress)
        failures: list[Match] = []
        matches = _aside(matches, failures)
        write_lines((to_jsonl if as_json or (out or "").endswith(".jsonl") else to_csv)(matches), out)
    progress.finish()
    for one in failures:
        say(f"robustfeat: {one.query}: {one.error}", err=True)
    return 3 if failures else 0


def _exact(features: Features) -> Search:
    from robustfeat.serving.collections.directions import Directions
    from robustfeat.serving.collections.neighbours import find_neighbours

    collection = Directions(features)
    return lambda queries, k, own: find_neighbours(collection, queries, k, own=own)


def _open_index(features: Features, threads: int, quiet: bool) -> Search:
    """Opens the index beside the features, and builds it if it is missing."""
    from robustfeat.progress import Progress
    from robustfeat.serving.collections.approximate import index_place, make_index, open_index

    if not Path(f"{index_place(features)}.json").exists():
        progress = Progress("index", len(features), "rows", quiet=quiet)
        make_index(features, threads=threads, progress=progress)
        progress.finish()
    return open_index(features, threads=threads).search


def _aside(matches: Iterator[Match], failures: list[Match]) -> Iterator[Match]:
    """Passes all matches on, and appends those of failed queries to `failures`."""
    for one in matches:
        if one.error is not None:
            failures.append(one)
        yield one


def _open_queries(
    features: Features, queries: tuple[str, ...], texts: tuple[str, ...], extraction: Extraction, quiet: bool
) -> Iterator[Queries]:
    """The queries in their order, then the texts. Consecutive images are embedded together."""
    from robustfeat.serving.collections.similar import Queries, rows_named
    from robustfeat.serving.heads.features import embed_features, is_feature_file, open_features
    from robustfeat.serving.inputs.choice import say_left_out

    rows = rows_named(features, queries)
    extractor = None

    def kind(query: str) -> str:
        return "row" if query in rows else "features" if is_feature_file(query) else "images"

    for what, group in itertools.groupby(queries, kind):
        places = list(group)
        if what == "row":
            yield Queries.of_rows(features, [rows[place] for place in places], places)
        elif what == "features":
            for place in places:
                others = open_features(place)
                require_model(features, others.model, place)
                yield Queries.of_features(others, own=os.path.realpath(place) == os.path.realpath(features.place))
        else:
            extractor = extractor or open_extractor_of(features, extraction, "pass row numbers or paths")
            with _listed(places, features) as found:
                remark(say_left_out(found.left_out), quiet)
                yield Queries.of_features(
                    embed_features(
                        extractor, found, quiet=quiet, batch_size=extraction.batch_size, workers=extraction.workers
                    )
                )
    if texts:
        extractor = extractor or open_extractor_of(features, extraction, "pass row numbers or paths")
        yield Queries.of_vectors(texts, extractor.embed_texts(texts))


def _listed(places: list[str], features: Features) -> InputList:
    """Lists the images of the queries `places`."""
    from robustfeat.errors import InputError
    from robustfeat.serving.inputs.listing import list_inputs

    try:
        return list_inputs(places)
    except InputError as exc:
        if exc.fix is not None or exc.argument is not None:
            raise
        raise InputError(
            exc.what, fix=f"to name a row of {features.place}, pass its number or its path in the index"
        ) from exc
