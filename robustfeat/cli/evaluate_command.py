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
    from robustfeat.training.evaluation.subject import Subject


@click.command("evaluate", cls=Command, short_help="Measure how well a model's features transfer.")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--task", "tasks", metavar="NAME=DATA", multiple=True, required=True, help="Labelled images; repeatable.")
@click.option("--train-rows", type=click.IntRange(min=2), help="At most so many training images of a task.")
@click.option("--test-rows", type=click.IntRange(min=1), help="At most so many test images.")
@click.option(
    "--val-fraction", type=float, default=0.2, show_default=True, help="Test share where DATA has no such split."
)
@click.option("--image-size", type=int, help="Input side of a run or a network of your own.")
@click.option("--crop-pct", type=float, help="Its centre crop.")
@selection_option("holdout")
@click.option("--few-shot/--no-few-shot", default=True, show_default=True, help="1, 5, 10 and 50 images a class.")
@click.option("--libsvm", is_flag=True, help="Also LIBSVM's one-against-one SVM, on at most 5,000 images.")
@click.option("--corruptions", is_flag=True, help="Also accuracy on corrupted test images, and the features' drift.")
@click.option("--finetune", is_flag=True, help="Also train all layers on the task; the test error of each epoch.")
@click.option("--epochs", type=click.IntRange(min=1), default=100, show_default=True, help="Of --finetune.")
@click.option(
    "--lr", type=ABOVE_ZERO, default=0.01, show_default=True, help="Of --finetune; a tenth in its second half."
)
@click.option("--batch-size", type=click.IntRange(min=2), default=128, show_default=True, help="Of --finetune.")
@click.option("--plot", metavar="FILE", help="Draw the curves of --finetune, as .png or .svg.")
@click.option("--cache", metavar="FILE", help="Keep features there, by image and model; what it has is not computed.")
@click.option("--device", type=click.Choice([AUTO, *DEVICES]), default=AUTO, show_default=True)
@click.option("--threads", type=click.IntRange(1, 1024), help="Processors for fitting.")
@click.option("--out", metavar="FILE", help="Also write the results as JSON.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object a line instead of the table.")
@click.option("--quiet", is_flag=True, help="No progress.")
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

    By a linear SVM, with C and scaling chosen by training images that were not fitted, by naive Bayes and nearest
    neighbours, and by SVMs of few images a class. --finetune trains the network itself.

    MODEL is a model folder, ORG/NAME, `builtin`, a run of `robustfeat train`, or package.module:build, a function that
    returns a torch module from images to features. DATA is what `robustfeat train` takes; its validation or test split
    is the test set, and is looked at once, at the end.
    """
    from robustfeat.progress import remark
    from robustfeat.system import available_cpus

    _refuse_options(out, plot, cache, finetune)
    named = _require_places(tasks, models, image_size, crop_pct)

    import torch  # takes seconds, as what follows

    from robustfeat.training.evaluation.finetuning import require_batch
    from robustfeat.training.evaluation.report import draw_finetuning, evaluate_task, evaluation_table
    from robustfeat.training.evaluation.subject import open_network, open_subject
    from robustfeat.training.evaluation.tasks import open_task

    torch.set_num_threads(threads or available_cpus())
    # All that can be wrong comes before anything that takes long.
    opened = [
        open_task(name, place, train_rows=train_rows, test_rows=test_rows, val_fraction=val_fraction)
        for name, place in named
    ]
    for task in opened:
        for line in task.remarks:
            remark(line, quiet=quiet)
    for task in opened if finetune else ():
        require_batch(task, batch_size)
    how: dict[str, Any] = {"image_size": image_size, "crop_pct": crop_pct, "device": device}
    subjects = [open_subject(model, **how) for model in models]
    _name_apart(subjects, models)
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
        results.append(evaluate_task(subject, task, finetuned=network, **probes))
        _show(results, out, as_json)
    if not as_json:
        click.echo(evaluation_table(results))
    if plot:
        draw_finetuning(results, Path(plot))
    return 0


def _require_places(
    tasks: Sequence[str], models: Sequence[str], image_size: int | None, crop_pct: float | None
) -> list[tuple[str, str]]:
    """Name and DATA of each task; refuses what cannot be a task or a model before anything slow is imported."""
    from robustfeat.errors import InputError
    from robustfeat.training.evaluation.arguments import parse_task, require_model, require_task

    named = [parse_task(text) for text in tasks]
    if len({name for name, _ in named}) < len(named):
        raise InputError("two tasks have the same name", argument="tasks", fix="tell them apart as NAME=DATA")
    for name, place in named:
        require_task(name, place)
    for model in models:
        require_model(model, image_size, crop_pct)
    return named


def _name_apart(subjects: Sequence[Subject], models: Sequence[str]) -> None:
    """Names subjects of the same name by what was passed for them."""
    names = [subject.name for subject in subjects]
    for model, subject in zip(models, subjects, strict=True):
        if names.count(subject.name) > 1:
            subject.name = model + subject.note


def _show(results: list[dict[str, Any]], out: str | None, as_json: bool) -> None:
    """Writes all results, so that what is done stays whatever happens to the next one, and prints the last one."""
    from robustfeat.files import new_file

    if out:
        with new_file(out) as partial:
            partial.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    if as_json:
        click.echo(json.dumps(results[-1]))


def _refuse_options(out: str | None, plot: str | None, cache: str | None, finetune: bool) -> None:
    from robustfeat.errors import InputError

    context = click.get_current_context()
    for name in ("epochs", "lr", "batch_size"):
        if not finetune and context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise InputError(f"--{name.replace('_', '-')}: is an option of --finetune; add that, or leave it out")
    if plot and (not finetune or Path(plot).suffix not in {".png", ".svg"}):
        raise InputError(f"--plot {plot}: expected a .png or .svg file, together with --finetune")
    named: dict[str, str] = {}
    for option, file in (("--cache", cache), ("--out", out), ("--plot", plot)):
        if file == "":
            raise InputError(f"{option}: expected a file; got an empty name")
        if file and (other := named.setdefault(os.path.realpath(file), option)) != option:
            raise InputError(f"{option} {file}: is what {other} names; give each a file of its own")
    for option, file in (("--out", out), ("--plot", plot)):
        if file and not os.access(Path(file).absolute().parent, os.W_OK | os.X_OK):
            raise InputError(f"{option} {file}: its folder does not exist or cannot be written to; make it first")
        if file and Path(file).is_dir():
            raise InputError(f"{option} {file}: is a folder; name a file in it")
        if file and Path(file).exists() and not Path(file).is_file():
            raise InputError(f"{option} {file}: is no regular file; name one, or use --json for the standard output")
