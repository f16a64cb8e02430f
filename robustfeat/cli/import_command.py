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


@click.command("import", cls=Command, short_help="Make a model folder of a network that exists elsewhere.")
@click.argument("source", metavar="SOURCE")
@click.option("--out", required=True, metavar="MODEL", help="The folder to make.")
@click.option(
    "--weights", metavar="FILE", help="A file of weights, under whatever names.  [default: the library's, downloaded]"
)
@click.option("--revision", metavar="REV", help="A branch, tag or commit of hf:ORG/NAME.  [default: main]")
@click.option("--name", help="The model's name, with its version.")
@click.option("--image-size", type=int, help="Side of the network's input in pixels.  [default: the library's]")
@click.option(
    "--crop-pct",
    type=float,
    help="Share of the resized image that the crop keeps.  [default: the library's; 1 of ONNX]",
)
@click.option("--mean", metavar="M[,M,M]", help="Mean of RGB in [0, 1]; of ONNX files.")
@click.option("--std", metavar="S[,S,S]", help="Standard deviation of RGB in [0, 1]; of ONNX files.")
@click.option("--interpolation", metavar="FILTER", help="bilinear, bicubic, ...; of ONNX files.  [default: bilinear]")
@click.option("--crop-mode", metavar="MODE", help="center, squash or border; of ONNX files.  [default: center]")
@click.option("--output", metavar="TENSOR", help="The tensor that becomes the features; of ONNX files.")
@click.option(
    "--pooling",
    type=click.Choice(POOLINGS),
    help="How outputs become one vector: image_embeds, pooler_output, the first token or the mean.",
)
@click.option("--calibration", metavar="FOLDER", help="Images for int8, besides the 8 golden ones.")
@click.option("--no-int8", is_flag=True, help="Leave the int8 model out.")
@click.option("--terms", help="Terms of use, for the card.")
@click.option("--license", "license_id", metavar="ID", help="The Hub's name of a license, such as apache-2.0.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as a JSON object.")
@click.option("--quiet", is_flag=True, help="No progress.")
def command(source: str, out: str, no_int8: bool, as_json: bool, quiet: bool, **options: Any) -> None:
    """Makes the folder that `robustfeat export` makes, of a network that exists elsewhere.

    SOURCE is timm:NAME, torchvision:NAME, hf:ORG/NAME on the Hub or a folder, a model of transformers or of
    transformers.js, or FILE.onnx, the ONNX file of any vision network. ONNX files need no PyTorch.
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
    import onnxruntime  # noqa: F401  # If it is missing, that is said before PyTorch loads.

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
        from robustfeat.training.export.transformers_import import import_transformers  # loads PyTorch, too

        return import_transformers(repository, out, **options)
    from robustfeat.training.export.backbones import import_backbone  # loads PyTorch, which takes seconds

    return import_backbone(source, out, **options)
