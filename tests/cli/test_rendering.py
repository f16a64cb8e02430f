"""Errors name parameters in Python and options on the command line."""

from __future__ import annotations

import sys

import click
import pytest
from click.testing import CliRunner

from robustfeat.cli import cli, main
from robustfeat.cli.rendering import Command
from robustfeat.errors import DivergedError, InputError, StoppedError, TrainingError

LEAVE_OUT = InputError(
    "is not written", fix="pass `int8=False`, `compact=True` or `weights=FILE`, or leave `weights` out"
)


@pytest.mark.parametrize(
    ("error", "python", "command_line"),
    [
        (InputError("too small", argument="weights", value=3), "weights=3: too small", "--weights 3: too small"),
        (InputError("unknown", argument="source", value="x"), "source=x: unknown", "x: unknown"),
        (InputError("unknown", argument="elsewhere", value="x"), "elsewhere=x: unknown", "elsewhere=x: unknown"),
        (
            LEAVE_OUT,
            "is not written; pass `int8=False`, `compact=True` or `weights=FILE`, or leave `weights` out",
            "is not written; pass --no-int8, --compact or --weights FILE, or leave --weights out",
        ),
    ],
)
def test_the_command_line_renders_parameters_as_its_options(error: InputError, python: str, command_line: str) -> None:
    @click.command(cls=Command)
    @click.argument("source")
    @click.option("--weights")
    @click.option("--no-int8", is_flag=True)
    @click.option("--compact", is_flag=True)
    def command(**given: object) -> None:
        raise error

    assert str(error) == python
    result = CliRunner().invoke(command, ["x"])
    assert (result.exit_code, result.stderr) == (1, f"robustfeat: {command_line}\n")


@pytest.mark.parametrize("kind", [Command, click.Command])
@pytest.mark.parametrize("error", [StoppedError("stopped"), DivergedError("diverged")])
def test_a_stop_has_an_exit_code_of_its_own(
    monkeypatch: pytest.MonkeyPatch, kind: type[click.Command], error: TrainingError
) -> None:
    @click.command(cls=kind)
    def command() -> None:
        raise error

    monkeypatch.setattr(cli, "get_command", lambda ctx, name: command)
    monkeypatch.setattr(sys, "argv", ["robustfeat", "command"])
    with pytest.raises(SystemExit) as info:
        main()
    assert info.value.code == (75 if isinstance(error, StoppedError) else 1)


def test_a_command_that_does_not_render_prints_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.command()
    def plain() -> None:
        raise LEAVE_OUT

    monkeypatch.setattr(cli, "get_command", lambda ctx, name: plain)
    monkeypatch.setattr(sys, "argv", ["robustfeat", "plain"])
    with pytest.raises(SystemExit) as info:
        main()
    assert info.value.code == 1
    assert capsys.readouterr().err == f"robustfeat: {LEAVE_OUT}\n"
