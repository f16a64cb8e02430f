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
from robustfeat.serving.engines.options import RunOptions

if TYPE_CHECKING:
    from robustfeat.hub.config import Evaluation
    from robustfeat.training.export.assembly import ExportReport


_OF_HEADS = ("model", "revision", "config_hash", "precision")
_OF_BOTH = ("run", "head", "out", "as_json", "quiet")


@click.command("export", cls=Command, short_help="Make a model folder of a training run, or one ONNX file with a head.")
@click.argument("run", metavar="[RUN]", required=False)
@click.option("--out", required=True, metavar="OUT", help="The model folder to make, or the .onnx file with --head.")
@click.option("--head", metavar="HEAD", help="Make one ONNX file of a head and its model, from pixels to answers.")
@click.option("--model", default="builtin", show_default=True, help="The head's model.")
@pin_options
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "int8"]),
    default="fp32",
    show_default=True,
    help="Of the network before the head, which is computed in fp32.",
)
@click.option("--name", help="The model's name, with its version.  [default: RUN's name]")
@click.option("--image-size", type=int, help="Side of the network's input in pixels.  [default: the recipe's]")
@click.option("--crop-pct", type=float, help="Share of the resized image that the crop keeps.  [default: the recipe's]")
@click.option("--calibration", metavar="FOLDER", help="Images for int8.  [default: 256 of the run's training images]")
@click.option("--best", is_flag=True, help="Take the run's best.pt instead of its last epoch.")
@click.option("--no-int8", is_flag=True, help="Leave the int8 model out.")
@click.option("--compact", is_flag=True, help="Store the weights once, in fp16; half the size.")
@click.option("--results", metavar="FILE.json", help="Measured results for the card; docs/hub.md describes the file.")
@click.option("--terms", help="Terms of use, for the card.")
@click.option("--license", "license_id", metavar="ID", help="The Hub's name of a license, such as apache-2.0.")
@click.option("--dataset", "datasets", multiple=True, metavar="ORG/NAME", help="A training set's name on the Hub.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as a JSON object.")
@click.option("--quiet", is_flag=True, help="No progress.")
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
    """Exports the network of RUN to safetensors and ONNX (fp32 and int8), each checked against PyTorch.

    In int8 the layers that change the features most stay in fp32. A network of which less than three quarters would be
    int8 gets no int8 file; a line says so.

    With --head HEAD, it writes one ONNX file that takes pixels and gives HEAD's probabilities, scores and typicality.
    Its answers are checked against HEAD's own. docs/heads.md shows how to use the file without robustfeat.
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
    """Refuses RUN and --head together, neither, and options of the other one."""
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
    what = f"{count} classes on {name} in {options.precision}, {report.size_bytes / 1e6:.1f} MB"
    say(f"{out}: {what}; against the head: {apart}", err=True)


def _read_results(place: str | None) -> tuple[dict[str, Any], list[Evaluation]]:
    """The tables and the numbers of --results."""
    from robustfeat.errors import InputError
    from robustfeat.hub.config import Evaluation

    if place is None:
        return {}, []
    try:
        measured = json.loads(Path(place).read_text("utf-8"))
    except (OSError, ValueError) as exc:
        raise InputError(f"--results {place}: not a JSON file that can be read ({exc})") from exc
    if not isinstance(measured, dict):
        raise InputError(f"--results {place}: expected an object, a title to text or to a list of rows")
    try:
        return measured, [Evaluation(**entry) for entry in measured.pop("evaluations", ())]
    except (TypeError, ValueError) as exc:
        names = ", ".join(entry.name for entry in dataclasses.fields(Evaluation))
        raise InputError(f"--results {place}: evaluations must be objects with {names} ({exc})") from exc


def print_report(out: str, report: ExportReport, as_json: bool) -> None:
    """What was made, and how close each ONNX file is to what computed the golden features."""
    config = report.folder.config
    name = config.name
    if as_json:
        about = {"out": out, "name": name, "golden_cosine": report.cosines, "int8": dict(config.int8) or None}
        click.echo(json.dumps(about))
    else:
        checks = ", ".join(f"{precision} cosine {value:.6f}" for precision, value in report.cosines.items())
        share = f" ({config.int8_share} in int8)" if config.int8_share else ""
        say(f"{out}: {name}; against {report.reference}: {checks}{share}", err=True)
