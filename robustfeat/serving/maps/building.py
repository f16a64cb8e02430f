"""Builds a map from features: rows, coordinates, colours, layers and thumbnails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from robustfeat.errors import InputError
from robustfeat.hub.preprocessing import MAX_PIXELS
from robustfeat.serving.heads.cells import SEPARATOR
from robustfeat.serving.heads.features import CHUNK_ROWS, Features
from robustfeat.serving.heads.head import Head
from robustfeat.serving.heads.labels.labels import Labels
from robustfeat.serving.inputs.listing import list_inputs
from robustfeat.serving.inputs.sources import ImageSource
from robustfeat.serving.maps.clusters import find_clusters
from robustfeat.serving.maps.colourings import Colouring, categories_of
from robustfeat.serving.maps.document import CollectionMap
from robustfeat.serving.maps.layers import Layer
from robustfeat.serving.maps.layout import lay_out
from robustfeat.serving.maps.places_file import read_places
from robustfeat.serving.maps.reduction import reduce_features
from robustfeat.serving.maps.sprites import draw_sprites, plan_sprites

__all__ = ["MapOptions", "add_thumbnails", "build_map", "choose_rows", "label_colouring", "prediction_colourings"]

_MOST_FOLDERS = 1000


@dataclass(frozen=True)
class MapOptions:
    """How to build a map.

    Attributes:
        seed: random seed of the sample, the layout and the clusters.
        clusters: number of clusters; None chooses it, 0 makes none.
        layout: a CSV file of coordinates; None computes a layout.
        threads: number of threads for the layout.
        quiet: hide progress.
    """

    seed: int = 0
    clusters: int | None = None
    layout: str | None = None
    threads: int = 1
    quiet: bool = False


def choose_rows(features: Features, most: int, seed: int) -> NDArray[np.int64]:
    """Good rows, ascending, of which at most `most` are drawn at random.

    Raises:
        InputError: all rows failed.
    """
    rows = np.flatnonzero(features.good)
    if not len(rows):
        raise InputError(f"{features.place}: all images failed", fix="see their errors in the index")
    if len(rows) > most:
        rows = np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))
    return rows


def build_map(
    features: Features,
    rows: NDArray[np.int64],
    title: str,
    colourings: Sequence[Colouring] = (),
    layers: Sequence[Layer] = (),
    options: MapOptions | None = None,
) -> CollectionMap:
    """Builds a map without thumbnails.

    Args:
        features: the collection.
        rows: the rows to show, from `choose_rows`.
        title: title of the page.
        colourings: colourings with a value for each row of `features`.
        layers: layers of rows of `features`.
        options: how to build the map.

    Raises:
        InputError: the file of coordinates cannot be used.
    """
    options = options or MapOptions()
    places = None
    if options.layout is not None:
        known, placed = read_places(options.layout, features.paths)
        kept = np.isin(known, rows)
        rows, places = known[kept], placed[kept]
        if not len(rows):
            raise InputError("has coordinates of none of these images", argument="layout", value=options.layout)
    own = [one.take(rows) for one in colourings]
    if places is None or options.clusters != 0:
        reduced = reduce_features(features, rows)
        if options.clusters != 0 and len(rows) > 1:
            own.append(
                _cluster_colouring(find_clusters(reduced, options.clusters, seed=options.seed, quiet=options.quiet))
            )
        if places is None:
            places = lay_out(reduced, seed=options.seed, threads=options.threads, quiet=options.quiet)
    numbers = {int(row): point for point, row in enumerate(rows)}
    model = features.model.name if features.model else "an unknown model"
    left = "" if len(rows) == len(features) else f" of {len(features):,}"
    return CollectionMap(
        title=title,
        about=f"{len(rows):,}{left} images by features of {model}. Near means similar.",
        paths=tuple(features.paths[int(row)] for row in rows),
        places=places,
        colourings=tuple(own) or (categories_of("", [None] * len(rows)),),
        layers=tuple(layer.take(numbers) for layer in layers),
    )


def _cluster_colouring(clusters: NDArray[np.int32]) -> Colouring:
    names = tuple(f"cluster {number + 1}" for number in range(int(clusters.max()) + 1))
    return Colouring("cluster", clusters, names, "Groups of similar images by k-means.")


def label_colouring(features: Features, labels: Labels | None) -> Colouring | None:
    """Colours by labels, or else by the first folder of each path; None if there are no classes."""
    if labels is not None:
        known = labels.matched(features.paths)
        texts = [SEPARATOR.join(known.of(path) or ()) or None for path in features.paths]
        if not any(texts):
            first = next(iter(labels.by_path or ()), "")
            raise InputError(
                f"none of its paths is one of the {len(features):,} rows of {features.place} "
                f"(there {first!r}, here {features.paths[0]!r})",
                argument="labels",
                value=labels.source,
                fix="write the paths as in the index",
            )
        return categories_of("label", texts)
    try:
        folders = [Labels("folder", None).of(path) for path in features.paths]
    except InputError:
        return None
    names = {folder for (folder,) in filter(None, folders)}
    if not 1 < len(names) <= min(_MOST_FOLDERS, len(folders) // 2):
        return None
    return categories_of("folder", [folder[0] if folder else None for folder in folders])


def prediction_colourings(features: Features, rows: NDArray[np.int64], head: Head) -> list[Colouring]:
    """Colours `rows` by a head's prediction and, if the head has distances, by typicality.

    Raises:
        InputError: the features belong to another model.
    """
    texts: list[str | None] = [None] * len(features)
    typicality = np.full(len(features), np.nan, np.float32)
    for start in range(0, len(rows), CHUNK_ROWS):
        part = rows[start : start + CHUNK_ROWS]
        values = np.asarray(features.values[part])
        predicted = head.predict(values)
        for row, found in zip(part.tolist(), predicted, strict=True):
            if head.multi_label:
                some = [str(name) for name, on in zip(head.classes, found, strict=True) if on]
                texts[row] = SEPARATOR.join(some) or "none of them"
            else:
                texts[row] = str(found)
        if head.tells_typicality:
            typicality[part] = head.typicality(values)
    found = [categories_of("prediction", texts, "The head's predictions.")]
    if head.tells_typicality:
        note = "Values near 0 are unlike the head's training images."
        found.append(Colouring("typicality", typicality, note=note))
    return found


def add_thumbnails(
    shown: CollectionMap,
    images: Sequence[str],
    limit_bytes: int,
    *,
    workers: int | None = None,
    max_pixels: int = MAX_PIXELS,
    quiet: bool = False,
) -> tuple[CollectionMap, int]:
    """Adds thumbnails to a map, and counts the points whose image is missing or unreadable.

    Args:
        shown: a map without thumbnails.
        images: the images, see `list_inputs`. Their paths must match the index.
        limit_bytes: most bytes of all thumbnails. If not all fit, only some points get one.
        workers, max_pixels, quiet: see `draw_sprites`.

    Raises:
        InputError: the images cannot be listed, or none of them is on the map.
        EngineError: no decoder process can be started.
    """
    index = {path: point for point, path in enumerate(shown.paths)}
    with list_inputs(images) as found:
        first = next(iter(found)).path
        sources: Mapping[int, ImageSource] = {index[image.path]: image for image in found if image.path in index}
    if not sources:
        raise InputError(
            f"none of these images is on the map (there {first!r}, in the index {shown.paths[0]!r})",
            argument="images",
            value=", ".join(images),
            fix="pass the images that were passed to embed",
        )
    side, chosen = plan_sprites(shown.places, np.array(sorted(sources), np.int64), limit_bytes)
    sprites = draw_sprites(sources, chosen, side, limit_bytes, workers=workers, max_pixels=max_pixels, quiet=quiet)
    return replace(shown, sprites=sprites), len(shown.paths) - len(sources) + sprites.failed
