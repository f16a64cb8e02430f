"""`robustfeat push`."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from robustfeat.cli.rendering import Command, say
from robustfeat.counts import format_count

if TYPE_CHECKING:
    from robustfeat.hub.push import PushReport, Target


@click.command("push", cls=Command, short_help="Publish a model or a head on the Hugging Face Hub.")
@click.argument("folder", metavar="FOLDER")
@click.argument("repo", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="Create the repository as private.")
@click.option("--revision", metavar="BRANCH", help="Branch to push to, created if missing.  [default: main]")
@click.option("--tag", help="Tag this version. A tag never moves.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of pushing.")
@click.option("--dry-run", is_flag=True, help="List the files to send, and send nothing.")
@click.option(
    "--license",
    "license_id",
    metavar="ID",
    help="License for a head's card, by its Hub name: apache-2.0, mit. A model gets it at export.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as a JSON object.")
@click.option("--quiet", is_flag=True, help="Hide progress.")
def command(
    folder: str,
    repo: str,
    private: bool,
    revision: str | None,
    tag: str | None,
    create_pr: bool,
    dry_run: bool,
    license_id: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Publishes FOLDER, a model or a head (or `builtin`), as ORG/NAME on the Hub.

    Prints its address and the Python line that loads it. The folder is verified first; a model's golden images run on
    every installed engine. A head's reports are not sent, since they show training images. All changed files go in one
    commit; if none changed, nothing is sent.

    The token comes from `hf auth login` or HF_TOKEN. HF_ENDPOINT names a private Hub.
    """
    from robustfeat.cli.extraction import quiet_downloads
    from robustfeat.cli.heads import is_head
    from robustfeat.hub.push import Target

    if tag and create_pr:
        raise click.UsageError("--tag and --create-pr exclude each other: a pull request cannot be tagged")
    quiet_downloads(quiet)
    target = Target(repo, private=private, revision=revision, tag=tag, create_pr=create_pr, dry_run=dry_run)
    if is_head(folder):
        report, loader = _push_head(folder, target, license_id), "Head"
    elif license_id is None:
        report, loader = _push_model(folder, target), "FeatureExtractor"
    else:
        raise click.UsageError("--license is for heads; robustfeat export and import state the license of a model")
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report) | {"dry_run": dry_run}))
    else:
        _print(report, target, loader, quiet)


def _push_head(place: str, target: Target, license_id: str | None) -> PushReport:
    from robustfeat.hub.head_folder import HeadFolder
    from robustfeat.hub.push import push_head
    from robustfeat.serving.heads.head import Head

    folder = HeadFolder(place)
    Head.of_folder(folder)  # refuses a head.json with inconsistent contents
    return push_head(folder, target, license_id=license_id)


def _push_model(place: str, target: Target) -> PushReport:
    from robustfeat.errors import EngineError, ModelFolderError
    from robustfeat.hub.catalog import resolve_model
    from robustfeat.hub.push import push_model
    from robustfeat.serving.extractor import FeatureExtractor
    from robustfeat.serving.verify import check_ways, ways_to_run

    folder = resolve_model(place)
    with tempfile.TemporaryDirectory() as scratch:
        if folder.compact:
            from robustfeat.training.export.compact import expand_folder

            folder = expand_folder(folder, Path(scratch, "model"))
        checks = list(check_ways(partial(FeatureExtractor.open, folder), ways_to_run(folder)))
        for check in checks:
            if check.short:
                raise ModelFolderError(f"{place}: {check}; nothing was sent: export the model again")
        if all(check.cosine is None for check in checks):
            raise EngineError(f"{place}: no engine can check it here: pip install 'robustfeat[cpu]'; nothing was sent")
        return push_model(folder, target)


def _print(report: PushReport, target: Target, loader: str, quiet: bool) -> None:
    """Prints the changes that were sent or would be; `loader` is the class that loads the folder."""
    if target.dry_run or not quiet:
        for change in report.changes:
            say(f"{change.action:8}{change.path} ({change.size_bytes:,} bytes)", err=not target.dry_run)
    made = "the repository does not exist and " if report.created else ""
    if not quiet:
        if report.left_out:
            say(f"not sent, since they show training images or name them: {', '.join(report.left_out)}", err=True)
        pinned = "config hash" if loader == "FeatureExtractor" else "sha256"
        say(f"{pinned} {report.config_hash}" + (f", tag {target.tag}" if target.tag else ""), err=True)
    if target.dry_run:
        files = format_count(len(report.changes), "file")
        total = sum(change.size_bytes for change in report.changes) / 1e6
        say(f"{report.repo}: {made}{files} ({total:.1f} MB) would be sent; --dry-run sent nothing", err=True)
        return
    if not report.changes:
        say(f"{report.repo}: is up to date; nothing was sent", err=True)
    say(report.address)
    pin = f', revision="{report.revision}"' if report.revision else ""
    say(f'{loader}.from_pretrained("{report.repo}"{pin})')
