"""`robustfeat import`."""

from __future__ import annotations

import click

from robustfeat.cli.export_command import print_report
from robustfeat.cli.rendering import Command


@click.command("import", cls=Command, short_help="Make a model folder of a timm or torchvision backbone.")
@click.argument("source", metavar="timm:NAME|torchvision:NAME")
@click.option("--out", required=True, metavar="MODEL", help="The folder to make.")
@click.option("--weights", metavar="FILE", help="A state dict.  [default: the library's weights, downloaded]")
@click.option("--name", help="The model's name, with its version.")
@click.option("--image-size", type=int, help="Side of the network's input in pixels.  [default: the library's]")
@click.option(
    "--crop-pct", type=float, help="Share of the resized image that the crop keeps.  [default: the library's]"
)
@click.option("--calibration", metavar="FOLDER", help="Images for int8, besides the 8 golden ones.")
@click.option("--no-int8", is_flag=True, help="Leave the int8 model out.")
@click.option("--terms", help="Terms of use, for the card.")
@click.option("--license", "license_id", metavar="ID", help="The Hub's name of a license, such as apache-2.0.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as a JSON object.")
def command(
    source: str,
    out: str,
    weights: str | None,
    name: str | None,
    image_size: int | None,
    crop_pct: float | None,
    calibration: str | None,
    no_int8: bool,
    terms: str | None,
    license_id: str | None,
    as_json: bool,
) -> None:
    """Makes the folder that `robustfeat export` makes, of any backbone that timm or torchvision knows."""
    from robustfeat.files import require_new
    from robustfeat.training.export.arguments import check_import

    check_import(source, weights)
    require_new(out)
    import onnxruntime  # noqa: F401  # If it is missing, that is said before PyTorch loads.

    from robustfeat.training.export.backbones import import_backbone  # loads PyTorch, which takes seconds

    report = import_backbone(
        source,
        out,
        weights=weights,
        name=name,
        image_size=image_size,
        crop_pct=crop_pct,
        calibration=calibration,
        int8=not no_int8,
        terms=terms,
        license_id=license_id,
    )
    print_report(out, report.folder.config.name, report.cosines, as_json)
