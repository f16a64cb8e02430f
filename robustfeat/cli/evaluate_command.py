"""`robustfeat evaluate`."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robustfeat.cli.extraction import ABOVE_ZERO
from robustfeat.cli.head_options import selection_option
from robustfeat.cli.rendering import Command
from robustfeat.serving.engines.options import AUTO, DEVICES

if TYPE_CHECKING:
    from robustfeat.training.evaluation.robustness_card import Extent
    from robustfeat.training.evaluation.subject import Subject
    from robustfeat.training.evaluation.tasks import Task


@click.command("evaluate", cls=Command, short_help="Measure how well a model's features transfer.")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option(
    "--task",
    "tasks",
    metavar="NAME=DATA",
    multiple=True,
    required=True,
    help="Labelled images to score on. Repeatable.",
)
@click.option(
    "--train-rows", type=click.IntRange(min=2), help="Largest number of training images per task.  [default: all]"
)
@click.option("--test-rows", type=click.IntRange(min=1), help="Largest number of test images per task.  [default: all]")
@click.option(
    "--val-fraction",
    type=float,
    default=0.2,
    show_default=True,
    help="Share of images held out for testing if DATA has no test split.",
)
@click.option("--image-size", type=int, help="Side of the input in pixels, for a run or your own network.")
@click.option(
    "--crop-pct",
    type=float,
    help="Share of the resized image that the crop keeps, for a run or your own network.",
)
@selection_option("holdout")
@click.option(
    "--few-shot/--no-few-shot",
    default=True,
    show_default=True,
    help="Also fit SVMs on 1, 5, 10 and 50 images per class.",
)
@click.option("--libsvm", is_flag=True, help="Also fit LIBSVM's one-against-one SVM, on at most 5,000 images.")
@click.option("--corruptions", is_flag=True, help="Also measure accuracy and feature drift on corrupted test images.")
@click.option(
    "--robustness",
    is_flag=True,
    help="Also measure corruptions, calibration, worst classes, unknown images and an attack.",
)
@click.option(
    "--robustness-rows",
    type=click.IntRange(min=2),
    default=500,
    show_default=True,
    help="Largest number of test images per corruption of --robustness.",
)
@click.option(
    "--attack-rows",
    type=click.IntRange(min=0),
    default=50,
    show_default=True,
    help="Largest number of test images that --robustness attacks. 0 leaves the attack out.",
)
@click.option(
    "--concepts",
    metavar="NAME=CONCEPTS",
    multiple=True,
    help="imagenet11 or a CSV file (class,concept) for a task's worst concept in --robustness. Repeatable.",
)
@click.option(
    "--card",
    "cards",
    metavar="FILE",
    multiple=True,
    help="Also write the tables of --robustness as .md, .csv, .json, .png or .svg. Repeatable.",
)
@click.option("--finetune", is_flag=True, help="Also train all layers on the task, with the test error per epoch.")
@click.option(
    "--epochs", type=click.IntRange(min=1), default=100, show_default=True, help="Number of epochs of --finetune."
)
@click.option(
    "--lr",
    type=ABOVE_ZERO,
    default=0.01,
    show_default=True,
    help="Learning rate of --finetune. Its second half uses a tenth.",
)
@click.option(
    "--batch-size", type=click.IntRange(min=2), default=128, show_default=True, help="Images per batch of --finetune."
)
@click.option("--plot", metavar="FILE", help="Draw the curves of --finetune to a .png or .svg file.")
@click.option("--cache", metavar="FILE", help="Cache features by image and model in this file, and reuse them.")
@click.option(
    "--device",
    type=click.Choice([AUTO, *DEVICES]),
    default=AUTO,
    show_default=True,
    help="Device that runs the network. auto uses a GPU if one works.",
)
@click.option(
    "--threads", type=click.IntRange(1, 1024), help="Number of processors for fitting.  [default: all available]"
)
@click.option("--out", metavar="FILE", help="Also write the results to this file as JSON.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line instead of the table.")
@click.option("--quiet", is_flag=True, help="Hide progress.")
def command(
    models: tuple[str, ...],
    tasks: tuple[str, ...],
    train_rows: int | None,
    test_rows: int | None,
    val_fraction: float,
    image_size: int | None,
    crop_pct: float | None,
    selection: str,
    few_shot: bool,
    libsvm: bool,
    corruptions: bool,
    robustness: bool,
    robustness_rows: int,
    attack_rows: int,
    concepts: tuple[str, ...],
    cards: tuple[str, ...],
    finetune: bool,
    epochs: int,
    lr: float,
    batch_size: int,
    plot: str | None,
    cache: str | None,
    device: str,
    threads: int | None,
    out: str | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Scores each MODEL's frozen features on each task.

    The scores come from a linear SVM, whose C and scaling are chosen on held-out training images, from naive Bayes and
    nearest neighbours, and from SVMs on few images per class. --finetune trains the network itself.

    MODEL is a model folder, ORG/NAME on the Hub, `builtin`, a run of `robustfeat train`, or package.module:build, a
    function that returns a torch module from images to features. DATA is any DATA of `robustfeat train`. Its validation
    or test split is the test set, which is used once, at the end.
    """
    from robustfeat.system import available_cpus

    _refuse_options(out, plot, cache, cards, finetune=finetune, robustness=robustness)
    named = _require_places(tasks, models, image_size, crop_pct)

    import torch  # PyTorch and its users take seconds to import

    from robustfeat.training.evaluation.finetuning import require_batch
    from robustfeat.training.evaluation.report import evaluate_task
    from robustfeat.training.evaluation.subject import open_network, open_subject

    torch.set_num_threads(threads or available_cpus())
    # Check every argument before the long work.
    drawn: dict[str, Any] = {"train_rows": train_rows, "test_rows": test_rows, "val_fraction": val_fraction}
    opened = _open_tasks(named, drawn, quiet)
    for task in opened if finetune else ():
        require_batch(task, batch_size)
    how: dict[str, Any] = {"image_size": image_size, "crop_pct": crop_pct, "device": device}
    subjects = [open_subject(model, **how) for model in models]
    _name_apart(subjects, models)
    extents = _extents(models, subjects, opened, device, robustness_rows, attack_rows, concepts) if robustness else {}
    networks = [open_network(model, **how) if finetune else None for model in models]
    probes: dict[str, Any] = {
        "cache": Path(cache) if cache else None,
        "selection": selection,
        "with_few_shot": few_shot,
        "with_libsvm": libsvm,
        "with_corruptions": corruptions,
        "finetuning": {"epochs": epochs, "milestone": (epochs + 1) // 2, "lr": lr, "batch_size": batch_size},
        "threads": threads,
        "quiet": quiet,
    }
    results: list[dict[str, Any]] = []
    for (subject, network), task in itertools.product(zip(subjects, networks, strict=True), opened):
        extent = extents.get((subject.name, task.name))
        results.append(evaluate_task(subject, task, finetuned=network, robustness=extent, **probes))
        _show(results, out, as_json)
    _show_all(results, plot, cards, as_json)
    return 0


def _open_tasks(named: Sequence[tuple[str, str]], drawn: dict[str, Any], quiet: bool) -> list[Task]:
    """Opens the tasks, and prints what affects their scores."""
    from robustfeat.progress import remark
    from robustfeat.training.evaluation.tasks import open_task

    opened = [open_task(name, place, **drawn) for name, place in named]
    for line in itertools.chain.from_iterable(task.remarks for task in opened):
        remark(line, quiet=quiet)
    return opened


def _extents(
    models: Sequence[str],
    subjects: Sequence[Subject],
    tasks: Sequence[Task],
    device: str,
    rows: int,
    attacked_rows: int,
    concepts: Sequence[str],
) -> dict[tuple[str, str], Extent]:
    """How much of a robustness card is measured, by the names of model and task."""
    import numpy as np

    from robustfeat.errors import InputError
    from robustfeat.training.concepts import assign_concepts
    from robustfeat.training.evaluation.arguments import parse_task
    from robustfeat.training.evaluation.attack import network_to_attack
    from robustfeat.training.evaluation.robustness_card import Extent

    sources = dict(parse_task(text, "concepts") for text in concepts)
    if unknown := sorted(set(sources) - {task.name for task in tasks}):
        raise InputError("there is no task of this name", argument="concepts", value=unknown[0])
    maps = {
        task.name: assign_concepts(
            sources[task.name], task.train.classes, np.bincount(task.train.labels, minlength=len(task.train.classes))
        )
        for task in tasks
        if task.name in sources
    }
    extents = {}
    for model, subject in zip(models, subjects, strict=True):
        network, reason = network_to_attack(model, subject, device) if attacked_rows else (None, "")
        for task in tasks:
            others = [other for other in tasks if other is not task]
            extents[subject.name, task.name] = Extent(rows, attacked_rows, maps.get(task.name), others, network, reason)
    return extents


def _require_places(
    tasks: Sequence[str], models: Sequence[str], image_size: int | None, crop_pct: float | None
) -> list[tuple[str, str]]:
    """Name and DATA of each task. Refuses wrong tasks and models before the slow imports."""
    from robustfeat.errors import InputError
    from robustfeat.training.evaluation.arguments import parse_task, require_model, require_task

    named = [parse_task(text) for text in tasks]
    if len({name for name, _ in named}) < len(named):
        raise InputError("two tasks have the same name", argument="tasks", fix="name them as NAME=DATA")
    for name, place in named:
        require_task(name, place)
    for model in models:
        require_model(model, image_size, crop_pct)
    return named


def _name_apart(subjects: Sequence[Subject], models: Sequence[str]) -> None:
    """Replaces names that two subjects share by the arguments that named them."""
    names = [subject.name for subject in subjects]
    for model, subject in zip(models, subjects, strict=True):
        if names.count(subject.name) > 1:
            subject.name = model + subject.note


def _show(results: list[dict[str, Any]], out: str | None, as_json: bool) -> None:
    """Writes all results so far, in case the next task fails, and prints the last one."""
    from robustfeat.files import new_file

    if out:
        with new_file(out) as partial:
            partial.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    if as_json:
        click.echo(json.dumps(results[-1]))


def _show_all(results: Sequence[dict[str, Any]], plot: str | None, cards: Sequence[str], as_json: bool) -> None:
    """Prints the tables, and writes the figures and robustness cards."""
    from robustfeat.training.evaluation.report import draw_finetuning, evaluation_table
    from robustfeat.training.evaluation.robustness_report import robustness_markdown, write_robustness

    if not as_json:
        click.echo(evaluation_table(results))
        if "robustness" in results[0]:
            click.echo("\n" + robustness_markdown(results), nl=False)
    if plot:
        draw_finetuning(results, Path(plot))
    for card in cards:
        write_robustness(results, Path(card))


_CARD_OPTIONS = {
    "robustness_rows": "--robustness-rows",
    "attack_rows": "--attack-rows",
    "concepts": "--concepts",
    "cards": "--card",
}
_FINETUNE_OPTIONS = {"epochs": "--epochs", "lr": "--lr", "batch_size": "--batch-size"}
_CARD_FORMATS = (".csv", ".json", ".md", ".png", ".svg")


def _refuse_options(
    out: str | None, plot: str | None, cache: str | None, cards: Sequence[str], *, finetune: bool, robustness: bool
) -> None:
    from robustfeat.errors import InputError

    context = click.get_current_context()
    for flag, given, options in (
        ("--finetune", finetune, _FINETUNE_OPTIONS),
        ("--robustness", robustness, _CARD_OPTIONS),
    ):
        for name, option in options.items():
            if not given and context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
                raise InputError(f"{option}: applies to {flag}; add {flag}, or leave it out")
    for card in cards:
        if Path(card).suffix not in _CARD_FORMATS:
            raise InputError(f"--card {card}: expected a name ending in {', '.join(_CARD_FORMATS)}")
    if plot and (not finetune or Path(plot).suffix not in {".png", ".svg"}):
        raise InputError(f"--plot {plot}: expected a .png or .svg file, together with --finetune")
    _refuse_files(cache, [("--out", out), ("--plot", plot), *(("--card", card) for card in cards)])


def _refuse_files(cache: str | None, files: Sequence[tuple[str, str | None]]) -> None:
    from robustfeat.errors import InputError

    named: dict[str, str] = {}
    for option, file in [("--cache", cache), *files]:
        if file == "":
            raise InputError(f"{option}: expected a file; got an empty name")
        if file and (other := named.setdefault(os.path.realpath(file), option)) != option:
            raise InputError(f"{option} {file}: is also the file of {other}; name another file")
    for option, file in files:
        if file and not os.access(Path(file).absolute().parent, os.W_OK | os.X_OK):
            raise InputError(f"{option} {file}: the folder does not exist or is not writable; make it first")
        if file and Path(file).is_dir():
            raise InputError(f"{option} {file}: is a folder; name a file in it")
        if file and Path(file).exists() and not Path(file).is_file():
            raise InputError(f"{option} {file}: is not a regular file; name one, or use --json for stdout")
