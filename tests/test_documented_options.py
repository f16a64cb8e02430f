"""The options that README and docs/ show are there."""

from __future__ import annotations

import re

import click

from robustfeat.cli import cli
from tests.documented import commands_of, find_commands, pages

# Options of other programs that the pages name. A new one belongs here, or is a misspelt option of ours.
OTHERS = {
    "benchmarks": "--only --scratch --skip --estimate --rounds --seconds --held-out --rate --image-kb --days --p99 "
    "--counts --photos",
    "curl": "--retry --retry-delay --retry-connrefused --data-binary",
    "docker and kubectl": "--rm --read-only --tmpfs --build-arg --gpus --secret --ipc --user --upgrade --build --wait "
    "--namespace --from-file --model-repository --rest_port --config_path",
    "grep, pip, venv": "--count --no-deps --index-url --upgrade-deps",
    "sbatch, torchrun": "--array --nproc-per-node",
    "tensorboard, wandb": "--logdir --sync-tensorboard --project",
    "torchserve": "--start --stop --foreground --ncs --ts-config --model-store",
}


def all_options(command: click.Command) -> set[str]:
    """The long names of all options of a command and of the commands below it, `--no-` forms included."""
    found = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            found |= all_options(below)
    return {name for name in found if name.startswith("--")}


def parse(arguments: list[str]) -> str:
    """What is wrong with the arguments: a command or an option that is not there."""
    command: click.Command = cli
    context = click.Context(cli, info_name="robustfeat")
    rest = arguments
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        below = command.get_command(context, rest[0])
        if below is None:
            return f"no command {rest[0]}"
        command, rest = below, rest[1:]
        context = click.Context(command, parent=context, info_name=command.name)
    try:
        command.make_parser(context).parse_args(list(rest))
    except click.UsageError as exc:
        return exc.format_message()
    return ""


def test_documented_commands_and_options_exist() -> None:
    commands = find_commands()
    assert len(commands) > 150
    wrong = {f"{page}: robustfeat {' '.join(arguments)}": parse(arguments) for page, arguments in commands}
    assert not {place: fault for place, fault in wrong.items() if fault}
    for script in ("robustfeat embed a --no-such b", "robustfeat nothing", "$ robustfeat svm fit \\\n  --kinds x"):
        (arguments,) = commands_of(script)
        assert parse(arguments)


def test_each_option_that_a_page_names_is_there() -> None:
    known = all_options(cli) | {"--help"} | {name for names in OTHERS.values() for name in names.split()}
    named = {
        (page, option)
        for page, path in pages().items()
        for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*(?!-*>)\b", path.read_text("utf-8"))
    }
    assert len(named) > 300
    assert not {(page, option) for page, option in named if option not in known}
