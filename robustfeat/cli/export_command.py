"""`robustfeat export`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robustfeat.cli.rendering import Command, say

if TYPE_CHECKING:
    from robustfeat.training.export.assembly import ExportReport


@click.command("export", cls=Command, short_help="Make a model folder of a training run.")
@click.argument("run", metavar="RUN")
@click.option("--out", required=True, metavar="MODEL", help="The folder to make.")
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
    run: str,
    out: str,
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
    """
    from robustfeat.errors import InputError
    from robustfeat.files import require_new
    from robustfeat.hub.config import Evaluation
    from robustfeat.training.loop.run_folder import BEST_NAME, CHECKPOINT_NAME, checkpoint_file

    checkpoint_file(Path(run), BEST_NAME if best else CHECKPOINT_NAME)
    require_new(out)
    measured: dict[str, Any] = {}
    evaluations: list[Evaluation] = []
    if results:
        try:
            measured = json.loads(Path(results).read_text("utf-8"))
        except (OSError, ValueError) as exc:
            raise InputError(f"--results {results}: not a JSON file that can be read ({exc})") from exc
        if not isinstance(measured, dict):
            raise InputError(f"--results {results}: expected an object, a title to text or to a list of rows")
        try:
            evaluations = [Evaluation(**entry) for entry in measured.pop("evaluations", ())]
        except (TypeError, ValueError) as exc:
            names = ", ".join(entry.name for entry in dataclasses.fields(Evaluation))
            raise InputError(f"--results {results}: evaluations must be objects with {names} ({exc})") from exc
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
