"""`robustfeat pull`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from robustfeat.cli.extraction import pin_options
from robustfeat.cli.rendering import Command, say
from robustfeat.counts import format_count

if TYPE_CHECKING:
    from robustfeat.hub.folder import ModelFolder
    from robustfeat.hub.head_folder import HeadFolder
    from robustfeat.hub.pull import HubFolder


@click.command("pull", cls=Command, short_help="Download a model or a head from the Hugging Face Hub.")
@click.argument("repo", metavar="ORG/NAME")
@pin_options
@click.option(
    "--precision",
    "precisions",
    type=click.Choice(["fp32", "fp16", "int8"]),
    multiple=True,
    help="ONNX file to download. Repeatable.  [default: all]",
)
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Also download the card and, for a model, the PyTorch weights and training.json.",
)
@click.option("--out", metavar="FOLDER", help="Also copy all files to this new folder.")
@click.option("--force", is_flag=True, help="Download files again that are in the cache.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as a JSON object.")
@click.option("--quiet", is_flag=True, help="Hide progress.")
def command(
    repo: str,
    revision: str | None,
    config_hash: str | None,
    precisions: tuple[str, ...],
    everything: bool,
    out: str | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Downloads and verifies a head, or the files of a model that embedding needs, and prints their folder.

    Files go to the cache of the Hub's libraries and then load without a network (HF_HUB_OFFLINE=1). The token comes
    from `hf auth login` or HF_TOKEN. HF_ENDPOINT names a mirror or a private Hub.
    """
    from robustfeat.cli.extraction import quiet_downloads
    from robustfeat.errors import HubError
    from robustfeat.files import require_new
    from robustfeat.hub.catalog import open_repository
    from robustfeat.hub.head_folder import HeadFolder
    from robustfeat.hub.remote import is_hub_name

    if not is_hub_name(repo):
        raise HubError(f"{repo}: not a Hub name; expected ORG/NAME")
    if out is not None:
        require_new(out)
    quiet_downloads(quiet)
    found = open_repository(repo, revision=revision, config_hash=config_hash, force=force)
    if isinstance(found, HeadFolder):
        if precisions:
            raise click.UsageError(f"--precision is for models; {repo} is a head")
        about, said = _pull_head(found, out, everything=everything)
    else:
        about, said = _pull_model(found, out, precisions, everything=everything)
    if not found.asked:
        say(f"{repo}: the Hub was not contacted; these files come from the cache", err=True)
    if as_json:
        click.echo(json.dumps(about))
        return
    say(about["path"])
    if not quiet:
        say(said, err=True)


def _pull_model(
    hub: HubFolder, out: str | None, precisions: tuple[str, ...], *, everything: bool
) -> tuple[dict[str, Any], str]:
    """Downloads a model; gives facts for JSON, and a line for people."""
    from robustfeat.hub.pull import copy_folder

    folder: ModelFolder = hub
    if out is None:
        hub.fetch_for_use(precisions or hub.precisions, everything=everything)
    else:
        folder = copy_folder(hub, out)
    about: dict[str, Any] = {"path": str(folder.path), "name": folder.config.name, "revision": hub.revision}
    about |= {"config_hash": folder.config_hash, "bytes": folder.size_bytes()}
    files = format_count(len(folder.present), "file")
    return about, (
        f"{folder.config.name} at {hub.revision}, config hash {folder.config_hash}: {files}, "
        f"{folder.size_bytes() / 1e6:.1f} MB, hashes verified"
    )


def _pull_head(folder: HeadFolder, out: str | None, *, everything: bool) -> tuple[dict[str, Any], str]:
    """Downloads a head; gives facts for JSON, and a line for people."""
    from robustfeat.hub.head_folder import copy_head, read_card
    from robustfeat.serving.heads.head import Head

    head = Head.of_folder(folder)
    if everything:
        read_card(folder)
    path = folder.path if out is None else copy_head(folder, out).path
    size = sum(map(len, folder.files.values()))
    model = head.model.name if head.model else None
    about: dict[str, Any] = {"path": str(path), "head": folder.place, "model": model, "revision": folder.revision}
    about |= {"sha256": folder.sha256, "classes": len(head.classes), "bytes": size}
    said = f"{folder.place} at {folder.revision}, sha256 {folder.sha256}: {format_count(len(head.classes), 'class')}"
    return about, f"{said} on {model or 'an unknown model'}, {size / 1e6:.1f} MB, hashes verified"
