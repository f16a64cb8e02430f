"""`robustfeat svm`: fits, applies and measures heads."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from robustfeat.cli.extraction import Extraction, Number, extraction_options
from robustfeat.cli.feature_inputs import open_inputs, open_labelled, open_labels, remark, report_failed
from robustfeat.cli.head_options import labels_options, names_option, selection_option
from robustfeat.cli.lines import require_output, write_lines
from robustfeat.cli.rendering import Command, say
from robustfeat.counts import format_count

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from robustfeat.serving.heads.reports.page import Thumbnails
    from robustfeat.serving.heads.reports.report import Report

_SHOWN_CLASSES = 60

_inputs = click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
_quiet = click.option("--quiet", is_flag=True, help="Hide progress and the report on stderr.")


_images = click.option(
    "--images",
    multiple=True,
    metavar="INPUT",
    help="Images behind a file of features, as passed to embed. report.html shows some of them. Repeatable.",
)


@click.group("svm", short_help="Fit a classifier on features, predict and score.")
def command() -> None:
    """Fits classifiers (heads) on features, and predicts with them.

    A HEAD is a folder from `svm fit`, or ORG/NAME[@REVISION] on the Hub. INPUT is a file of features, with the index
    and meta files that `embed` writes beside it, or an INPUT of `embed`. Images are embedded first. For very many
    images run `embed` first, since it can resume.
    """


@command.command("fit", cls=Command, short_help="Fit a head on labelled features or images.")
@_inputs
@names_option
@labels_options(required=True)
@click.option("--out", required=True, metavar="HEAD", help="Folder to create for the head.")
@click.option(
    "--kind",
    type=click.Choice(["svm", "logistic", "naive-bayes", "nearest-mean"]),
    default="svm",
    show_default=True,
    help="Kind of classifier.",
)
@click.option(
    "--C", "c", type=Number(1e-6, 1e6), help="Fix C, the weight of the loss.  [default: chosen from 0.001 to 10]"
)
@click.option(
    "--scaling",
    type=click.Choice(["none", "l2", "standard"]),
    help="Fix how features are scaled.  [default: chosen from all three]",
)
@selection_option("auto")
@click.option("--multi-label", is_flag=True, help="Accept several labels per image: cat|dog, or a list.")
@_images
@extraction_options
@_json
@_quiet
def fit_command(
    inputs: tuple[str, ...],
    names: str | None,
    labels: tuple[str, ...],
    path_column: str | None,
    out: str,
    kind: str,
    c: float | None,
    scaling: str | None,
    selection: str,
    multi_label: bool,
    images: tuple[str, ...],
    extraction: Extraction,
    as_json: bool,
    quiet: bool,
) -> int:
    """Fits a head on labelled features or images and writes it to a new folder.

    Rows and labels are matched by path. Images without a label are not embedded, and failed rows are left out. C and
    scaling are chosen on held-out rows, then the head is fitted on all rows. report.md and report.html show the
    held-out accuracy, and confusion.png the confusion matrix. suspects.csv lists rows whose label is probably wrong.

    To resume an interrupted fit, rerun the command: finished trials are kept beside HEAD until it is written. The exit
    code is 3 if labelled images failed.
    """
    from robustfeat.files import new_folder, require_new
    from robustfeat.serving.heads.fitting.fit import fit_head, require_two
    from robustfeat.serving.heads.fitting.selection import C_GRID
    from robustfeat.serving.heads.kinds import SCALINGS
    from robustfeat.serving.heads.labels.matching import match_labels, match_paths
    from robustfeat.serving.heads.reports.files import write_report

    if c is not None and kind in {"naive-bayes", "nearest-mean"}:
        raise click.UsageError(f"--kind {kind} has no --C")
    require_new(out)
    known = open_labels(labels, inputs, names=names, path_column=path_column, multi_label=multi_label)

    def check(paths: list[str]) -> None:
        require_two("the images", match_paths("the images", paths, known, multi_label=multi_label))

    features, unlabelled = open_labelled(inputs, known, extraction, quiet, names=names, check=check)
    labelled = match_labels(features, known, multi_label=multi_label)
    remark(labelled.summary(), quiet)
    place = Path(out).absolute()  # so that `.` has a name
    trials = place.with_name(f".{place.name}.trials.json")
    with new_folder(place) as folder:  # before the fit: two fits do not share their trials
        head, report = fit_head(
            features,
            labelled,
            kind=kind,
            cs=C_GRID if c is None else (c,),
            scalings=tuple(SCALINGS) if scaling is None else (scaling,),
            method=selection,
            threads=extraction.options.threads,
            resume=trials,
            quiet=quiet,
        )
        head.write(folder)
        if report:
            write_report(report, folder, "held out", _thumbnails(inputs, images, out, quiet))
    trials.unlink(missing_ok=True)
    chosen = "" if head.selection["C"] is None else f"C {head.selection['C']:g}, "
    remark(f"chosen: {chosen}{'no' if head.scaling == 'none' else head.scaling} scaling", quiet)
    if not head.selection["converged"]:
        remark("the solver did not converge: a smaller --C, or --scaling standard, may help", quiet)
    if report is None:
        remark("every class has one row, so none could be held out and the accuracy is unknown", quiet)
    else:
        _show(report, "held out", quiet)
        if report.suspects:
            doubtful = format_count(report.suspects, "label is", "labels are")
            remark(f"{doubtful} probably wrong: see {Path(out) / 'suspects.csv'}", quiet)
    remark(f"{out}: {head.kind} head, {format_count(len(head.classes), 'class')}", quiet)
    if as_json:
        counts = {"failed": labelled.failed, "unlabelled": labelled.unlabelled.count + unlabelled}
        counts["suspects"] = report.suspects if report else 0
        summary = {"out": out, **counts, **head.selection, **head.scores}
        click.echo(json.dumps(summary))
    return report_failed(features, "left out", labelled.failed)


@command.command("predict", cls=Command, short_help="Predict the class of features or images.")
@click.argument("head", metavar="HEAD")
@_inputs
@names_option
@click.option("--out", metavar="FILE", help="Write to this .csv or .jsonl file instead of CSV to stdout.")
@click.option("--probabilities", is_flag=True, help="Add calibrated probabilities to the margins.")
@click.option(
    "--reject",
    "least",
    type=Number(0, 1),
    metavar="P",
    help="Predict no class for images with a typicality below P, for example 0.05. The head needs more than 1/P "
    "training rows.",
)
@click.option(
    "--suggest", type=click.IntRange(min=1), metavar="N", help="Also list the N least certain images, to label next."
)
@labels_options()
@extraction_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line instead of CSV.")
@_quiet
def predict_command(
    head: str,
    inputs: tuple[str, ...],
    names: str | None,
    out: str | None,
    probabilities: bool,
    least: float | None,
    suggest: int | None,
    labels: tuple[str, ...],
    path_column: str | None,
    extraction: Extraction,
    as_json: bool,
    quiet: bool,
) -> int:
    """Predicts the class of every row.

    Prints CSV with the columns path, prediction, error and typicality, and the margin of each class.

    Typicality is the share of unseen images of the classes that are at least as unlike the training images. It is near
    0 for an image of no known class.

    A failed image has no prediction, and the exit code is then 3. --suggest lists paths and predictions on stdout if
    --out is set, else on stderr. It leaves out the paths in --labels.
    """
    from robustfeat.cli.heads import load_head
    from robustfeat.serving.heads.labels.reading import label_file
    from robustfeat.serving.heads.predictions import Rejection, Suggestions, predict_rows, to_csv, to_jsonl

    require_output(out, [*inputs, *map(label_file, labels), *([names] if names else [])])
    if labels and suggest is None:
        raise click.UsageError("--labels excludes images from --suggest; pass --suggest N, too")
    opened = load_head(head)
    if probabilities:
        opened.require_calibration()
    if least is not None and (lowest := opened.least_typicality) >= least:
        unseen = format_count(round(1 / lowest) - 1, "row")
        remark(f"--reject {least:g} rejects nothing: measured on {unseen}, typicality is at least {lowest:.3g}", quiet)
    known = None
    if labels:
        known = open_labels(labels, inputs, names=names, path_column=path_column, multi_label=opened.multi_label)
    features = open_inputs(inputs, extraction, quiet, names=names, head=opened, head_place=head)
    known = known and known.matched(features.paths)
    suggestions = Suggestions(suggest or 0, (lambda path: known.of(path) is not None) if known else lambda path: False)
    if out is None:
        features.check()  # printed lines cannot be withdrawn
    predictions = predict_rows(opened, features, probabilities=probabilities)
    rejection = Rejection(least or 0.0)
    predictions = rejection.watch(predictions)
    if suggest:
        predictions = suggestions.watch(predictions)
    if as_json or (out or "").endswith(".jsonl"):
        lines = to_jsonl(opened, predictions)
    else:
        lines = to_csv(opened, predictions, probabilities=probabilities)
    write_lines(lines, out)
    if suggest:
        write_lines([suggestions.to_csv()], stream=sys.stderr if out is None else sys.stdout)
    if out:
        without = {"rejected": rejection.count, "failed": len(features.errors)}
        predicted = len(features) - sum(without.values())
        counts = [
            format_count(predicted, "prediction"),
            *(f"{count:,} {what}" for what, count in without.items() if count),
        ]
        remark(f"{out}: {', '.join(counts)}", quiet)
    return report_failed(features, "without a prediction")


@command.command("score", cls=Command, short_help="Measure a head on labelled features or images.")
@click.argument("head", metavar="HEAD")
@_inputs
@names_option
@labels_options(required=True)
@click.option(
    "--report", "report_folder", metavar="FOLDER", help="Write report.md, report.html and confusion.png to this folder."
)
@_images
@extraction_options
@_json
@_quiet
def score_command(
    head: str,
    inputs: tuple[str, ...],
    names: str | None,
    labels: tuple[str, ...],
    path_column: str | None,
    report_folder: str | None,
    images: tuple[str, ...],
    extraction: Extraction,
    as_json: bool,
    quiet: bool,
) -> int:
    """Prints the accuracy on the labelled rows, from 0 to 1.

    Failed rows are left out, and the exit code is then 3. With several labels per row, all must be right.
    """
    from robustfeat.cli.heads import load_head
    from robustfeat.files import require_new
    from robustfeat.serving.heads.labels.matching import match_labels, match_paths
    from robustfeat.serving.heads.reports.answers import Answers
    from robustfeat.serving.heads.reports.files import save_report
    from robustfeat.serving.heads.reports.report import Report

    if report_folder:
        require_new(report_folder)
    opened = load_head(head)
    known = open_labels(labels, inputs, names=names, path_column=path_column, multi_label=opened.multi_label)
    classes = [str(name) for name in opened.classes]

    def check(paths: list[str]) -> None:
        match_paths("the images", paths, known, multi_label=opened.multi_label, classes=classes)

    features, unlabelled = open_labelled(
        inputs, known, extraction, quiet, names=names, head=opened, head_place=head, check=check
    )
    labelled = match_labels(features, known, multi_label=opened.multi_label, classes=classes)
    remark(labelled.summary(), quiet)
    margins = opened.margins(features.values, labelled.rows)
    paths = [features.paths[row] for row in labelled.rows]
    report = Report.of_answers(Answers.of(opened, margins, labelled.targets, paths, classes))
    _show(report, "score", quiet)
    if report_folder:
        save_report(report, report_folder, "score", _thumbnails(inputs, images, report_folder, quiet))
    if as_json:
        extra = {
            "failed": labelled.failed,
            "unlabelled": labelled.unlabelled.count + unlabelled,
            "missing": len(labelled.missing),
        }
        click.echo(json.dumps(report.to_dict() | extra))
    else:
        say(str(report.accuracy))
    return report_failed(features, "left out", labelled.failed)


def _thumbnails(inputs: tuple[str, ...], images: tuple[str, ...], folder: str, quiet: bool) -> Thumbnails:
    """Reads thumbnails from `images`, or from `inputs` if those are images, for the report in `folder`."""
    from robustfeat.serving.heads.features import is_feature_file
    from robustfeat.serving.heads.reports.thumbnails import read_thumbnails

    places = images or tuple(place for place in inputs if not is_feature_file(place))

    def read(paths: Collection[str]) -> Mapping[str, bytes]:
        found = read_thumbnails(places, paths)
        if paths and not found:
            remark(f"{Path(folder) / 'report.html'} has no pictures; pass the embedded folder by --images", quiet)
        return found

    return read


def _show(report: Report, title: str, quiet: bool) -> None:
    lines = report.to_text(title).split("\n")
    if not quiet:
        for line in lines if len(report.classes) <= _SHOWN_CLASSES else lines[:1]:
            say(line, err=True)  # line by line: a class name may contain a newline
