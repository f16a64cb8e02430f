"""Prints errors as one line, with option names in place of Python's parameter names."""

from __future__ import annotations

from collections.abc import Callable
from typing import IO, Any

import click

from robustfeat.errors import RobustFeatError, respell
from robustfeat.progress import visible

__all__ = ["Command", "Failure", "say"]


class Failure(click.ClickException):
    """An error that click prints as one line on stderr, with its exit code."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # click declares it on the class but reads the instance's

    def show(self, file: IO[Any] | None = None) -> None:
        """Prints the message as one line, even if a file name in it contains a newline."""
        click.echo(f"robustfeat: {visible(self.message)}", file=file, err=True)


def say(text: str = "", *, err: bool = False) -> None:
    """Prints one line, even if names in it contain control characters."""
    click.echo(visible(text), err=err)


class Command(click.Command):
    """A command whose errors name its options.

    Args:
        fallback: spells a parameter that the command lacks, with its value. None keeps Python's spelling.
    """

    def __init__(
        self, *args: Any, fallback: Callable[[str, str | None], str | None] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._fallback = fallback

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command.

        Raises:
            Failure: the command raised a `RobustFeatError`.
        """
        try:
            return super().invoke(ctx)
        except RobustFeatError as exc:
            raise Failure(self.explain(exc), exc.exit_code) from exc

    def explain(self, exc: RobustFeatError) -> str:
        """An error as it is printed."""
        return exc.render(self._spell)

    def respell(self, text: str) -> str:
        """Replaces parameter names in backticks by option names."""
        return respell(text, self._spell)

    def _spell(self, name: str, value: str | None) -> str | None:
        parameters = {one.name: one for one in self.params}
        if value == "False" and f"no_{name}" in parameters:
            return parameters[f"no_{name}"].opts[0]
        parameter = parameters.get(name)
        if parameter is None:
            return self._fallback(name, value) if self._fallback else None
        if isinstance(parameter, click.Argument):
            return parameter.human_readable_name if value is None else value
        if isinstance(parameter, click.Option) and parameter.secondary_opts and value == "False":
            return parameter.secondary_opts[0]
        option = max(parameter.opts, key=len)
        return option if value in {None, "True"} else f"{option} {value}"
