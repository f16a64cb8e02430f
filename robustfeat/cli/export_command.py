"""`robustfeat export`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robustfeat.cli.extraction import pin_options
from robustfeat.cli.rendering import Command, say
from robustfeat.counts import format_count
from robustfeat.serving.engines.options import RunOptions

if TYPE_CHECKING:
    from robustfeat.hub.config import Evaluation
    from robustfeat.training.export.assembly import ExportReport


_OF_HEADS = ("model", "revision", "config_hash", "precision")
_OF_BOTH = ("run", "head", "out", "as_json", "quiet")


@click.command("export", cls=Command, short_help="Export a training run, or a head as one ONNX file.")
@click.argument("run", metavar="[RUN]", required=False)
@click.option("--out", required=True, metavar="OUT", help="Model folder to create, or the .onnx file with --head.")
@click.option("--head", metavar="HEAD", help="Export a head and its model as one ONNX file, from pixels to answers.")
@click.option(
    "--model",
    default="builtin",
    show_default=True,
    metavar="MODEL",
    help="The model of --head: a folder, ORG/NAME on the Hub, or builtin.",
)
@pin_options
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "int8"]),
    default="fp32",
    show_default=True,
    help="Precision of the network with --head. The head itself is always fp32.",
)
@click.option("--name", help="Name of the model, with its version.  [default: RUN's name]")
@click.option("--image-size", type=int, help="Side of the network's input in pixels.  [default: the recipe's]")
@click.option("--crop-pct", type=float, help="Share of the resized image that the crop keeps.  [default: the recipe's]")
@click.option(
    "--components",
    type=int,
    metavar="D",
    help="Export D principal components of the network's features.  [default: the features]",
)
@click.option(
    "--calibration",
    metavar="FOLDER",
    help="Images to calibrate the int8 model.  [default: 256 of the run's training images]",
)
@click.option("--best", is_flag=True, help="Export the run's best.pt instead of its last epoch.")
@click.option("--no-int8", is_flag=True, help="Do not write an int8 model.")
@click.option("--compact", is_flag=True, help="Store the weights once, in fp16, which halves the size.")
@click.option("--results", metavar="FILE.json", help="Measured results for the card. docs/hub.md describes the file.")
@click.option("--terms", help="Terms of use for the card.")
@click.option("--license", "license_id", metavar="ID", help="License for the card, by its Hub name: apache-2.0, mit.")
@click.option(
    "--dataset",
    "datasets",
    multiple=True,
    metavar="ORG/NAME",
    help="Training set for the card, on the Hub. Repeatable.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as a JSON object.")
@click.option("--quiet", is_flag=True, help="Hide progress.")
def command(
    run: str | None,
    out: str,
    head: str | None,
    model: str,
    revision: str | None,
    config_hash: str | None,
    precision: str,
    name: str | None,
    image_size: int | None,
    crop_pct: float | None,
    components: int | None,
    calibration: str | None,
    best: bool,
    no_int8: bool,
    compact: bool,
    results: str | None,
    terms: str | None,
    license_id: str | None,
    datasets: tuple[str, ...],
    as_json: bool,
    quiet: bool,
) -> None:
    """Exports the network of RUN to safetensors and ONNX (fp32 and int8).

    Each file is checked against PyTorch. In the int8 file, layers that would change the features most stay fp32. If
    less than three quarters of a network can be int8, no int8 file is written, and a line says so.

    --head HEAD writes one ONNX file instead. It takes pixels and returns HEAD's probabilities, scores and typicality,
    and is checked against HEAD. docs/heads.md shows how to use the file without robustfeat.
    """
    _require_one(run, head)
    if run is None:
        options = RunOptions(precision, revision=revision, config_hash=config_hash)
        _export_head(str(head), out, model, options, as_json=as_json, quiet=quiet)
        return
    from robustfeat.files import require_new
    from robustfeat.training.loop.run_folder import BEST_NAME, CHECKPOINT_NAME, checkpoint_file

    checkpoint_file(Path(run), BEST_NAME if best else CHECKPOINT_NAME)
    require_new(out)
    measured, evaluations = _read_results(results)
    from robustfeat.training.export.runs import export_run  # loads PyTorch, which takes seconds

    report = export_run(
        run,
        out,
        name=name,
        image_size=image_size,
        crop_pct=crop_pct,
        components=components,
        calibration=calibration,
        int8=not no_int8,
        compact=compact,
        best=best,
        results=measured,
        evaluations=evaluations,
        terms=terms,
        license_id=license_id,
        datasets=datasets,
        quiet=quiet,
    )
    print_report(out, report, as_json)


def _require_one(run: str | None, head: str | None) -> None:
    """Refuses RUN and --head together, neither of them, and options that belong to the other."""
    if (run is None) == (head is None):
        raise click.UsageError("pass RUN or --head HEAD" + (", not both" if run else ""))
    context = click.get_current_context()
    for parameter in context.command.params:
        name = str(parameter.name)
        typed = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if typed and name not in _OF_BOTH and (name in _OF_HEADS) == (head is None):
            what = "a head" if head is None else "a run"
            raise click.UsageError(f"{max(parameter.opts, key=len)} is for the export of {what}")


def _export_head(place: str, out: str, model: str, options: RunOptions, *, as_json: bool, quiet: bool) -> None:
    """Writes the ONNX file of a head and its model."""
    from robustfeat.cli.heads import load_head
    from robustfeat.errors import InputError
    from robustfeat.files import require_new
    from robustfeat.serving.extractor import FeatureExtractor

    if not out.endswith(".onnx"):
        raise click.UsageError(f"--out {out}: expected a name ending in .onnx")
    if not Path(out).absolute().parent.is_dir():
        raise InputError(f"--out {out}: the folder {Path(out).parent} does not exist; make it first")
    require_new(out)
    head = load_head(place)
    pooling = head.model.pooling if head.model else None
    options = replace(options, engine="onnxruntime", device="cpu", pooling=pooling or options.pooling)
    extractor = FeatureExtractor.load(model, options)
    head.require_model(extractor.identity, place, f"--model {model}")
    from robustfeat.training.export.classifier import export_classifier

    report = export_classifier(head, extractor, out, quiet=quiet)
    name, count = extractor.config.name, len(head.classes)
    if as_json:
        about = {"out": out, "model": name, "precision": options.precision, "classes": count}
        click.echo(json.dumps(about | {"bytes": report.size_bytes, "differences": dict(report.differences)}))
        return
    apart = ", ".join(f"{output} within {difference:.1g}" for output, difference in report.differences.items())
    what = f"{format_count(count, 'class')} on {name} in {options.precision}, {report.size_bytes / 1e6:.1f} MB"
    say(f"{out}: {what}; against the head: {apart}", err=True)


def _read_results(place: str | None) -> tuple[dict[str, Any], list[Evaluation]]:
    """The tables and evaluations in the file of --results."""
    from robustfeat.errors import InputError
    from robustfeat.hub.config import Evaluation

    if place is None:
        return {}, []
    try:
        measured = json.loads(Path(place).read_text("utf-8"))
    except (OSError, ValueError) as exc:
        raise InputError(f"--results {place}: expected a readable JSON file ({exc})") from exc
    if not isinstance(measured, dict):
        raise InputError(f"--results {place}: expected an object from titles to text or lists of rows")
    try:
        return measured, [Evaluation(**entry) for entry in measured.pop("evaluations", ())]
    except (TypeError, ValueError) as exc:
        names = ", ".join(entry.name for entry in dataclasses.fields(Evaluation))
        raise InputError(f"--results {place}: evaluations must be objects with {names} ({exc})") from exc


def print_report(out: str, report: ExportReport, as_json: bool) -> None:
    """Prints the new folder and each ONNX file's cosine to the golden features."""
    config = report.folder.config
    name = config.name
    if as_json:
        about = {"out": out, "name": name, "golden_cosine": report.cosines, "int8": dict(config.int8) or None}
        click.echo(json.dumps(about))
    else:
        checks = ", ".join(f"{precision} cosine {value:.6f}" for precision, value in report.cosines.items())
        share = f" ({config.int8_share} in int8)" if config.int8_share else ""
        say(f"{out}: {name}; against {report.reference}: {checks}{share}", err=True)
