"""`robustfeat import`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from robustfeat.cli.export_command import print_report
from robustfeat.cli.rendering import Command
from robustfeat.serving.engines.options import POOLINGS

if TYPE_CHECKING:
    from robustfeat.training.export.arguments import Source
    from robustfeat.training.export.assembly import ExportReport


@click.command("import", cls=Command, short_help="Convert a public or own network to a model folder.")
@click.argument("source", metavar="SOURCE")
@click.option("--out", required=True, metavar="MODEL", help="Model folder to create.")
@click.option(
    "--weights",
    metavar="FILE",
    help="File of weights; parameters may have other names.  [default: the library's, downloaded]",
)
@click.option("--revision", metavar="REV", help="Branch, tag or commit of hf:ORG/NAME.  [default: main]")
@click.option("--name", help="Name of the model, with its version.  [default: from SOURCE]")
@click.option("--image-size", type=int, help="Side of the network's input in pixels.  [default: the library's]")
@click.option(
    "--crop-pct",
    type=float,
    help="Share of the resized image that the crop keeps.  [default: the library's; 1 for ONNX files]",
)
@click.option("--mean", metavar="M[,M,M]", help="ONNX files: mean of RGB in [0, 1].")
@click.option("--std", metavar="S[,S,S]", help="ONNX files: standard deviation of RGB in [0, 1].")
@click.option("--interpolation", metavar="FILTER", help="ONNX files: bilinear, bicubic, ...  [default: bilinear]")
@click.option("--crop-mode", metavar="MODE", help="ONNX files: center, squash or border.  [default: center]")
@click.option("--output", metavar="TENSOR", help="ONNX files: the tensor that becomes the features.")
@click.option(
    "--pooling",
    type=click.Choice(POOLINGS),
    help="How the network's output becomes one vector: image_embeds, pooler_output, the first token or the mean.",
)
@click.option(
    "--calibration", metavar="FOLDER", help="Images to calibrate the int8 model, added to the 8 golden images."
)
@click.option("--no-int8", is_flag=True, help="Do not write an int8 model.")
@click.option("--terms", help="Terms of use for the card.")
@click.option("--license", "license_id", metavar="ID", help="License for the card, by its Hub name: apache-2.0, mit.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as a JSON object.")
@click.option("--quiet", is_flag=True, help="Hide progress.")
def command(source: str, out: str, no_int8: bool, as_json: bool, quiet: bool, **options: Any) -> None:
    """Converts a network from another library to a model folder.

    SOURCE is timm:NAME, torchvision:NAME, hf:ORG/NAME or a folder (a model of transformers or transformers.js), or
    FILE.onnx, the ONNX file of any vision network. ONNX files need no PyTorch.
    """
    from robustfeat.cli.extraction import quiet_downloads
    from robustfeat.files import require_new
    from robustfeat.training.export.arguments import check_import, parse_channels, read_source

    found = read_source(source, options)
    for name in ("mean", "std"):
        if options[name] is not None:
            options[name] = parse_channels(name, options[name])
    if found.kind in {"timm", "torchvision"}:
        check_import(source, options["weights"])
    require_new(out)
    quiet_downloads(quiet)
    import onnxruntime  # noqa: F401  # fails before PyTorch loads if it is missing

    given = {name: value for name, value in options.items() if value is not None}
    report = _import(found, source, out, given | {"int8": not no_int8, "quiet": quiet})
    print_report(out, report, as_json)


def _import(found: Source, source: str, out: str, options: dict[str, Any]) -> ExportReport:
    if found.kind == "onnx":
        from robustfeat.training.export.onnx_import import import_onnx

        return import_onnx(source, out, **options)
    if found.kind in {"hub", "folder"}:
        from robustfeat.training.export.repository import open_repository, uses_pytorch

        repository = open_repository(source, options.pop("revision", None))
        if not uses_pytorch(repository):
            from robustfeat.training.export.onnx_import import import_onnx_layout

            return import_onnx_layout(repository, out, **options)
        from robustfeat.training.export.transformers_import import import_transformers  # also loads PyTorch

        return import_transformers(repository, out, **options)
    from robustfeat.training.export.backbones import import_backbone  # loads PyTorch, which takes seconds

    return import_backbone(source, out, **options)
