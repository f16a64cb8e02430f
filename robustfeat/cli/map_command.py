"""`robustfeat map`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robustfeat.cli.extraction import Extraction, Number, extraction_options
from robustfeat.cli.feature_inputs import open_inputs, remark, report_failed
from robustfeat.cli.head_options import names_option
from robustfeat.cli.lines import require_output
from robustfeat.cli.rendering import Command, say
from robustfeat.counts import format_count

if TYPE_CHECKING:
    from robustfeat.serving.heads.features import Features
    from robustfeat.serving.maps.layers import Layer

_MOST_ROWS = 200_000


class _Clusters(click.ParamType[int | None]):
    name = "clusters"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """A number of clusters, or None for `auto`."""
        if value in {None, "auto"}:
            return None
        if isinstance(value, int) or (str(value).isdecimal() and int(value) <= 1000):
            return int(value)
        return self.fail(f"{value!r} is neither auto nor a number from 0 to 1000.", param, ctx)


@click.command("map", cls=Command, short_help="Draw a collection as an interactive map.")
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option(
    "--out",
    "outs",
    required=True,
    multiple=True,
    metavar="FILE",
    help="Write an interactive page (.html) or the images' coordinates (.csv). Repeatable.",
)
@click.option(
    "--images",
    multiple=True,
    metavar="INPUT",
    help="Images behind a file of features, as passed to embed, for thumbnails. Repeatable.",
)
@click.option(
    "--labels",
    multiple=True,
    metavar="LABELS",
    help="Colour by labels: folder (the first folder of each path), FILE.csv, FILE.csv:COLUMN or FILE.parquet:COLUMN.  "
    "[default: folder, where the paths have folders]",
)
@click.option(
    "--head", "head_place", metavar="HEAD", help="Colour by a head's predictions, and mark its suspicious labels."
)
@click.option(
    "--clusters",
    type=_Clusters(),
    default="auto",
    show_default=True,
    metavar="auto|N",
    help="Number of k-means clusters; 0 disables clustering.",
)
@click.option(
    "--layer",
    "layers",
    multiple=True,
    metavar="NAME=FILE.csv",
    help="Mark the images listed in the column `path` of a file. A column `group` links images. Repeatable.",
)
@click.option(
    "--duplicates",
    type=Number(0, 1),
    metavar="COSINE",
    help="Mark pairs of images with at least this cosine; 0 disables marking.  [default: as for `duplicates`]",
)
@click.option("--layout", metavar="FILE.csv", help="Reuse the coordinates of an earlier --out FILE.csv.")
@click.option(
    "--rows",
    type=click.IntRange(min=1),
    default=_MOST_ROWS,
    show_default=True,
    help="Largest number of images on the map. A larger collection is sampled at random.",
)
@click.option(
    "--thumbnail-mb",
    type=Number(0, 2000),
    default=24.0,
    show_default=True,
    metavar="MB",
    help="Largest total size of the thumbnails, in MB; 0 leaves them out.",
)
@click.option("--title", help="Title of the page.  [default: the name of INPUT]")
@click.option(
    "--seed",
    type=click.IntRange(min=0, max=2**32 - 1),
    default=0,
    show_default=True,
    help="Random seed for sampling, layout and clusters.",
)
@names_option
@extraction_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as a JSON object.")
@click.option("--quiet", is_flag=True, help="Hide progress.")
def command(
    inputs: tuple[str, ...],
    outs: tuple[str, ...],
    images: tuple[str, ...],
    labels: tuple[str, ...],
    head_place: str | None,
    clusters: int | None,
    layers: tuple[str, ...],
    duplicates: float | None,
    layout: str | None,
    rows: int,
    thumbnail_mb: float,
    title: str | None,
    seed: int,
    names: str | None,
    extraction: Extraction,
    as_json: bool,
    quiet: bool,
) -> int:
    """Draws a collection as a map on which similar images lie close together.

    INPUT is a file of features, with the index and meta files that `embed` writes beside it, or an INPUT of `embed`.
    Images are embedded first. The page needs no other file and no network. It colours points by label, cluster,
    prediction and typicality, shows thumbnails, and saves the paths inside a lasso.

    The same input and seed give the same map. The exit code is 3 if images failed, or could not be read for their
    thumbnails.
    """
    from robustfeat.cli.heads import load_head
    from robustfeat.serving.heads.labels.reading import label_file, read_labels
    from robustfeat.serving.maps.building import (
        MapOptions,
        add_thumbnails,
        build_map,
        choose_rows,
        label_colouring,
        prediction_colourings,
    )
    from robustfeat.serving.maps.document import write_page
    from robustfeat.serving.maps.layers import duplicates_layer
    from robustfeat.serving.maps.places_file import write_places

    read = [*inputs, *images, *map(label_file, labels), *(layer.partition("=")[2] for layer in layers)]
    read += [name for name in (names, layout) if name]
    for out in outs:
        require_output(out, read, (".html", ".csv"))
    known = read_labels(labels, multi_label=list(labels) != ["folder"]) if labels else None
    head = None if head_place is None else load_head(head_place)
    features = open_inputs(inputs, extraction, quiet, names=names, head=head, head_place=head_place or "")
    chosen = choose_rows(features, rows, seed)
    if len(chosen) == rows < int(features.good.sum()):
        remark(f"the map shows {rows:,} of the {int(features.good.sum()):,} images, drawn at random", quiet)
    labelled = label_colouring(features, known)
    colourings = [] if labelled is None else [labelled]
    if head is not None:
        colourings += prediction_colourings(features, chosen, head)
    threads = extraction.options.thread_count
    marked = _read_layers(layers, head_place, features, quiet)
    if duplicates != 0:
        marked.append(duplicates_layer(features, chosen, duplicates, threads=threads, quiet=quiet))
    options = MapOptions(seed, clusters, layout, threads, quiet)
    shown = build_map(features, chosen, title or Path(inputs[0]).name, colourings, marked, options)
    missing, pages = 0, [out for out in outs if out.endswith(".html")]
    places = images or _image_inputs(inputs)
    if pages and thumbnail_mb and places:
        shown, missing = add_thumbnails(shown, places, int(thumbnail_mb * 1e6), quiet=quiet)
    elif pages and thumbnail_mb:
        remark("the page has no thumbnails: pass the images as --images to add them", quiet)
    sizes = {out: write_page(shown, out) if out in pages else write_places(shown, out) for out in outs}
    drawn = len(shown.sprites.rows) if shown.sprites else 0
    for out, size in sizes.items():
        with_thumbnails = f", {format_count(drawn, 'thumbnail')}" if out in pages and shown.sprites else ""
        remark(f"{out}: {format_count(len(shown.paths), 'image')}{with_thumbnails}, {size / 1e6:.1f} MB", quiet)
    if shown.sprites and (left := len(shown.paths) - drawn - missing):
        images_have = format_count(left, "image has", "images have")
        remark(f"{images_have} no thumbnail, for a page below {thumbnail_mb:g} MB: see --thumbnail-mb", quiet)
    if as_json:
        summary = {"out": sizes, "images": len(shown.paths), "failed": len(features.errors), "thumbnails": drawn}
        click.echo(json.dumps(summary | {"missing": missing}))
    return _report(features, missing)


def _image_inputs(inputs: tuple[str, ...]) -> tuple[str, ...]:
    """INPUT if it names images that can be read a second time, else nothing."""
    from robustfeat.serving.heads.features import is_feature_file

    return () if "-" in inputs or any(map(is_feature_file, inputs)) else inputs


def _read_layers(layers: tuple[str, ...], head_place: str | None, features: Features, quiet: bool) -> list[Layer]:
    from robustfeat.serving.maps.layers import read_layer, suspects_of

    named = [layer.partition("=") for layer in layers]
    for name, equals, file in named:
        if not name or not equals or not file:
            raise click.UsageError(f"--layer {name}{equals}{file}: expected NAME=FILE.csv")
    files = [(name, file) for name, _, file in named]
    suspects = suspects_of(head_place) if head_place else None
    if suspects is not None:
        files.insert(0, ("suspicious labels", suspects))
    found = []
    for name, file in files:
        layer, missing = read_layer(name, file, features.paths)
        if missing:
            remark(f"{file}: {format_count(missing, 'line names', 'lines name')} no image of {features.place}", quiet)
        found.append(layer)
    return found


def _report(features: Features, missing: int) -> int:
    code = report_failed(features, "not on the map")
    if missing:
        images_have = format_count(missing, "image has", "images have")
        say(f"robustfeat: {images_have} no thumbnail: missing or unreadable", err=True)
    return 3 if missing else code
