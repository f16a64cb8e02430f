"""`robustfeat evaluate`."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("evaluate", short_help="Measure how well a model's features transfer.")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--task", "tasks", metavar="NAME=DATA", multiple=True, required=True, help="Labelled images; repeatable.")
@click.option("--train-rows", type=click.IntRange(min=2), help="At most so many training images of a task.")
@click.option("--test-rows", type=click.IntRange(min=1), help="At most so many test images.")
@click.option(
    "--val-fraction", type=float, default=0.2, show_default=True, help="Test share where DATA has no such split."
)
@click.option("--image-size", type=int, help="Input side of a run or a network of your own.")
@click.option("--crop-pct", type=float, help="Its centre crop.")
@click.option("--few-shot/--no-few-shot", default=True, show_default=True, help="1, 5, 10 and 50 images a class.")
@click.option("--libsvm", is_flag=True, help="Also LIBSVM's one-against-one SVM, on at most 5,000 images.")
@click.option("--cache", metavar="FILE", help="Keep features there, by image and model; what it has is not computed.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
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
    few_shot: bool,
    libsvm: bool,
    cache: str | None,
    device: str,
    threads: int | None,
    out: str | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Scores each MODEL's frozen features on each task.

    By a linear SVM, with C and scaling chosen on a held-out tenth of the training images, by naive Bayes and nearest
    neighbours, and by SVMs of few images a class.

    MODEL is a model folder, ORG/NAME, `builtin`, a run of `robustfeat train`, or package.module:build, a function that
    returns a torch module from images to features. DATA is what `robustfeat train` takes; its validation or test split
    is the test set, and is looked at once, at the end.
    """
    from robustfeat.errors import InputError
    from robustfeat.files import new_file
    from robustfeat.training.evaluation.report import evaluate_task, evaluation_table
    from robustfeat.training.evaluation.subject import open_subject
    from robustfeat.training.evaluation.tasks import open_task, parse_task

    named = [parse_task(text) for text in tasks]
    if len({name for name, _ in named}) < len(named):
        raise InputError("--task: two tasks have the same name; tell them apart as NAME=DATA")
    # All that can be wrong comes before anything that takes long.
    opened = [
        open_task(name, place, train_rows=train_rows, test_rows=test_rows, val_fraction=val_fraction)
        for name, place in named
    ]
    subjects = [open_subject(model, image_size=image_size, crop_pct=crop_pct, device=device) for model in models]
    results = []
    for subject in subjects:
        for task in opened:
            result = evaluate_task(
                subject,
                task,
                cache=Path(cache) if cache else None,
                with_few_shot=few_shot,
                with_libsvm=libsvm,
                threads=threads,
                quiet=quiet,
            )
            results.append(result)
            if as_json:
                click.echo(json.dumps(result))
    if not as_json:
        click.echo(evaluation_table(results))
    if out:
        with new_file(out) as partial:
            partial.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    return 0
