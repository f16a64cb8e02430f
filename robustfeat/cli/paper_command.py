"""`robustfeat paper`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from robustfeat.cli.rendering import Command
from robustfeat.serving.engines.options import AUTO, DEVICES

if TYPE_CHECKING:
    from robustfeat.training.paper.scale import Scale

_NAMES = (
    "gate", "verdicts", "exploratory", "table1", "table2", "table3", "table4", "fig2", "fig3", "fig4", "fig5",
    "selection", "opinions", "corruptions",
)  # fmt: skip
_METHODS = ("erm", "erm-long", "el", "cl", "hrrl", "random", "balanced", "groupdro")
_WITHOUT_DATA = {"table1", "fig2"}


@click.command("paper", cls=Command, short_help="Reproduce the paper's tables and figures.")
@click.argument("exhibits", metavar="EXHIBIT...", nargs=-1, required=True, type=click.Choice([*_NAMES, "all"]))
@click.option("--out", required=True, metavar="REPORT", help="Folder for runs, results and the report.")
@click.option(
    "--scale",
    type=click.Choice(["tiny", "saturated", "narrow", "paper"]),
    default="tiny",
    show_default=True,
    help="Size of the study: tiny takes a day on two cores, saturated trains until ERM no longer gains, narrow has a "
    "small network, paper has the sizes of the paper.",
)
@click.option("--quick", is_flag=True, help="Check the program in minutes. The numbers mean nothing.")
@click.option("--benchmark", metavar="DATA", help="Images to pre-train on: ImageNet (paper) or Tiny ImageNet (others).")
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
    "--method",
    "methods",
    metavar="METHOD",
    multiple=True,
    type=click.Choice(_METHODS),
    help="Compare only this method with ERM. Repeatable.  [default: all of the scale]",
)
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    help="Length of the runs if the gate of the scale saturated was not passed.  [default: by scale]",
)
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
    methods: tuple[str, ...],
    epochs: int | None,
    device: str,
    threads: int | None,
    workers: int | None,
    quiet: bool,
) -> int:
    """Reproduces tables and figures of the HRRL paper.

    EXHIBIT is table1 to table4, fig2 to fig5, verdicts (all comparisons with ERM), exploratory (the same with other
    statistics), selection (of tau and lambda), opinions (other classifiers), corruptions (of test images), or all.
    The scale saturated has gate, which must be passed first, and no exploratory. table1 and fig2 need no data.
    docs/protocol.md describes the comparisons.

    Missing models are trained in REPORT/runs, and each result is kept in REPORT/cells. The command writes CSV,
    Markdown, PNG and SVG files and REPORT/index.html. To resume an interrupted run, rerun the command. On SIGINT or
    SIGTERM, training saves a checkpoint, and the exit code is 75.
    """
    from robustfeat.errors import InputError
    from robustfeat.system import available_cpus
    from robustfeat.training.data.opening import require_place
    from robustfeat.training.paper.scale import open_scale

    if not out:
        raise InputError("--out: expected a folder; got an empty name")
    for place in (Path(out), *Path(out).parents):
        if place.exists() and not place.is_dir():
            raise InputError(f"--out {out}: {place} is a file; name a folder")
    chosen = open_scale(scale, quick=quick, epochs=epochs)
    places = _parse_targets(targets, chosen)
    names = _select(exhibits, chosen)
    if not set(names) <= _WITHOUT_DATA:
        for data in (*places.values(), *([benchmark] if benchmark else [])):
            require_place(data)

    import torch  # PyTorch and its users take seconds to import

    from robustfeat.training.paper.exhibits import EXHIBITS
    from robustfeat.training.paper.gate import pass_gate
    from robustfeat.training.paper.measures import Measures
    from robustfeat.training.paper.render import markdown, write_exhibit, write_page
    from robustfeat.training.paper.study import Machine, Study

    torch.set_num_threads(threads or available_cpus())
    study = Study(Path(out), chosen, benchmark, places, Machine(device, threads, workers, quiet), biased=biased)
    measures = Measures(study, controls=controls, methods=methods)
    measures.require_data(names)
    refusal = pass_gate(measures) if "gate" in names else None
    if refusal:
        names = tuple(name for name in names if name == "gate" or name in _WITHOUT_DATA)
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
    if refusal:
        raise refusal
    return 0


def _parse_targets(targets: tuple[str, ...], scale: Scale) -> dict[str, str]:
    """DATA by target.

    Raises:
        InputError: a target is unknown or named twice.
    """
    from robustfeat.errors import InputError
    from robustfeat.training.evaluation.arguments import parse_task

    named = [parse_task(text, "targets") for text in targets]
    places = dict(named)
    if len(places) < len(named):
        raise InputError("--target: expected one DATA per target; got a target twice")
    if unknown := sorted(set(places) - set(scale.targets)):
        raise InputError(f"--target {unknown[0]}: expected {', '.join(scale.targets)}, such as cifar10=data/cifar10")
    return places


def _select(asked: tuple[str, ...], scale: Scale) -> tuple[str, ...]:
    """The exhibits to make. The gate comes first wherever others are measured.

    Raises:
        InputError: the scale lacks one.
    """
    from robustfeat.errors import InputError

    lacks = {"gate": scale.gate is None, "exploratory": scale.margin is not None}
    available = tuple(name for name in _NAMES if not lacks.get(name))
    if "all" in asked:
        return available
    if missing := sorted(set(asked) - set(available)):
        raise InputError(f"{missing[0]}: expected {', '.join(available)} at this scale")
    with_gate = scale.gate is not None and not set(asked) <= _WITHOUT_DATA
    return tuple(name for name in available if name in asked or (with_gate and name == "gate"))
