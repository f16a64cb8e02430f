"""`robustfeat pull`."""

from __future__ import annotations

import json

import click

from robustfeat.cli.extraction import pin_options
from robustfeat.cli.rendering import Command, say


@click.command("pull", cls=Command, short_help="Download a model from the Hugging Face Hub.")
@click.argument("model", metavar="ORG/NAME")
@pin_options
@click.option(
    "--precision",
    "precisions",
    type=click.Choice(["fp32", "fp16", "int8"]),
    multiple=True,
    help="Which ONNX.  [default: all]",
)
@click.option(
    "--all", "everything", is_flag=True, help="Also the weights for PyTorch, the card and the training's record."
)
@click.option("--out", metavar="FOLDER", help="Also make a folder of its own, with everything.")
@click.option("--force", is_flag=True, help="Download anew what the cache holds.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as a JSON object.")
@click.option("--quiet", is_flag=True, help="No progress.")
def command(
    model: str,
    revision: str | None,
    config_hash: str | None,
    precisions: tuple[str, ...],
    everything: bool,
    out: str | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Downloads what embedding needs of a model, verifies it, and prints the folder where it lies.

    Files go to the cache of the Hub's libraries, from where they load without a network (HF_HUB_OFFLINE=1). The token
    is that of `hf auth login` or HF_TOKEN; HF_ENDPOINT names a mirror or a private Hub.
    """
    from robustfeat.cli.extraction import quiet_downloads
    from robustfeat.errors import HubError
    from robustfeat.files import require_new
    from robustfeat.hub.folder import ModelFolder
    from robustfeat.hub.pull import HubFolder, copy_folder
    from robustfeat.hub.remote import is_hub_name

    if not is_hub_name(model):
        raise HubError(f"{model}: not a name on the Hub; expected ORG/NAME")
    if out is not None:
        require_new(out)
    quiet_downloads(quiet)
    folder: ModelFolder
    folder = hub = HubFolder(model, revision=revision, config_hash=config_hash, force=force)
    if out is None:
        hub.fetch_for_use(precisions or hub.precisions, everything=everything)
    else:
        folder = copy_folder(hub, out)
    if not hub.asked:
        say(f"{model}: the Hub was not asked; this is what the cache holds", err=True)
    if as_json:
        about = {"path": str(folder.path), "name": folder.config.name, "revision": hub.revision}
        click.echo(json.dumps(about | {"config_hash": folder.config_hash, "bytes": folder.size_bytes()}))
        return
    say(str(folder.path))
    if not quiet:
        say(
            f"{folder.config.name} at {hub.revision}, config hash {folder.config_hash}: {len(folder.present)} files, "
            f"{folder.size_bytes() / 1e6:.1f} MB, hashes verified",
            err=True,
        )
