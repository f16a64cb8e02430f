"""`robustfeat paper`."""

from __future__ import annotations

from pathlib import Path

import click

from robustfeat.cli.rendering import Command
from robustfeat.serving.engines.options import AUTO, DEVICES

_NAMES = (
    "verdicts", "exploratory", "table1", "table2", "table3", "table4", "fig2", "fig3", "fig4", "fig5",
    "selection", "opinions", "corruptions",
)  # fmt: skip
_WITHOUT_DATA = {"table1", "fig2"}


@click.command("paper", cls=Command, short_help="Reproduce the paper's tables and figures.")
@click.argument("exhibits", metavar="EXHIBIT...", nargs=-1, required=True, type=click.Choice([*_NAMES, "all"]))
@click.option("--out", required=True, metavar="REPORT", help="Folder for runs, results and the report.")
@click.option(
    "--scale",
    type=click.Choice(["tiny", "paper"]),
    default="tiny",
    show_default=True,
    help="Size of the study: tiny takes a day on two cores, paper has the sizes of the paper.",
)
@click.option("--quick", is_flag=True, help="Check the program in minutes. The numbers mean nothing.")
@click.option("--benchmark", metavar="DATA", help="Images to pre-train on: Tiny ImageNet (tiny) or ImageNet (paper).")
@click.option(
    "--target",
    "targets",
    metavar="NAME=DATA",
    multiple=True,
    help="Images of a target task; NAME is cifar10, sop or svhn. Repeatable.",
)
@click.option("--biased", is_flag=True, help="Train on ImageNet's shares of concepts.")
@click.option("--controls", is_flag=True, help="Also train the control methods.")
@click.option(
    "--device",
    type=click.Choice([AUTO, *DEVICES]),
    default=AUTO,
    show_default=True,
    help="Device that runs the network. auto uses a GPU if one works.",
)
@click.option(
    "--threads", type=click.IntRange(1, 1024), help="Number of processors for the network.  [default: all available]"
)
@click.option("--workers", type=click.IntRange(min=0), help="Number of decoder processes.  [default: by processors]")
@click.option("--quiet", is_flag=True, help="Hide progress.")
def command(
    exhibits: tuple[str, ...],
    out: str,
    scale: str,
    quick: bool,
    benchmark: str | None,
    targets: tuple[str, ...],
    biased: bool,
    controls: bool,
    device: str,
    threads: int | None,
    workers: int | None,
    quiet: bool,
) -> int:
    """Reproduces tables and figures of the HRRL paper.

    EXHIBIT is table1 to table4, fig2 to fig5, verdicts (all comparisons with ERM), exploratory (the same with other
    statistics), selection (of tau and lambda), opinions (other classifiers), corruptions (of test images), or all.
    table1 and fig2 need no data. docs/protocol.md describes the comparisons.

    Missing models are trained in REPORT/runs, and each result is kept in REPORT/cells. The command writes CSV,
    Markdown, PNG and SVG files and REPORT/index.html. To resume an interrupted run, rerun the command. On SIGINT or
    SIGTERM, training saves a checkpoint, and the exit code is 75.
    """
    from robustfeat.errors import InputError
    from robustfeat.system import available_cpus
    from robustfeat.training.data.opening import require_place
    from robustfeat.training.evaluation.arguments import parse_task
    from robustfeat.training.paper.scale import SCALES

    if not out:
        raise InputError("--out: expected a folder; got an empty name")
    for place in (Path(out), *Path(out).parents):
        if place.exists() and not place.is_dir():
            raise InputError(f"--out {out}: {place} is a file; name a folder")
    named = [parse_task(text, "targets") for text in targets]
    places = dict(named)
    if len(places) < len(named):
        raise InputError("--target: expected one DATA per target; got a target twice")
    chosen = SCALES["quick" if quick else scale]()
    if unknown := sorted(set(places) - set(chosen.targets)):
        raise InputError(f"--target {unknown[0]}: expected {', '.join(chosen.targets)}, such as cifar10=data/cifar10")
    names = _NAMES if "all" in exhibits else tuple(name for name in _NAMES if name in exhibits)
    if not set(names) <= _WITHOUT_DATA:
        for data in (*places.values(), *([benchmark] if benchmark else [])):
            require_place(data)

    import torch  # PyTorch and its users take seconds to import

    from robustfeat.training.paper.exhibits import EXHIBITS
    from robustfeat.training.paper.measures import Measures
    from robustfeat.training.paper.render import markdown, write_exhibit, write_page
    from robustfeat.training.paper.study import Machine, Study

    torch.set_num_threads(threads or available_cpus())
    study = Study(Path(out), chosen, benchmark, places, Machine(device, threads, workers, quiet), biased=biased)
    measures = Measures(study, controls=controls)
    measures.require_data(names)
    measures.compute(names)
    page = Path(out) / f"index{study.suffix}.html"
    with study.locks.held("pages"):  # covers tables, too: some have the same name with and without --biased
        made = []
        for name in names:
            exhibit = EXHIBITS[name](measures)
            made.append(exhibit)
            write_exhibit(exhibit, Path(out))
            click.echo(markdown(exhibit))
        if measures.needs_runs(names):
            write_page(made, page, f"HRRL: {study.title}", study.differences())
        else:
            write_page(made, page, "HRRL: what needs no training")
    study.say(f"{page} shows the results")
    return 0
