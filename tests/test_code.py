"""What holds for all code of the package: short functions, and messages that Python callers understand."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import click
import pytest

from robustfeat.cli.rendering import Command
from robustfeat.errors import InputError
from tests.conftest import ROOT

MAX_LINES = 80
OPTION = re.compile(r"(?<![\w-])--[a-z]")
# A count before a plural noun, which is wrong for 1. A total, such as "1 of {} rows", may be before one.
UNCOUNTED = re.compile(
    r"(?<!of )(?<!the )(?<!'s )\{\} ((labelled|more|exact|training|test) )?"
    r"(rows|images|labels|classes|groups|files|settings|predictions|columns|lines|copies|thumbnails)\b"
)
COMMAND = re.compile(r"`(robustfeat|pip|ray) [^`]*`|^pip install .*")
# Command lines of other programs, and answers to an operator who started the server with options.
MAY_NAME_OPTIONS = {
    "doctor.py",
    "serving/http/gate.py",
    "serving/torchserve/archive.py",
    "serving/torchserve/server.py",
}


def modules() -> Iterator[tuple[str, ast.Module]]:
    package = ROOT / "robustfeat"
    for file in sorted(package.rglob("*.py")):
        yield file.relative_to(package).as_posix(), ast.parse(file.read_text("utf-8"))


def texts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every string but docstrings; `{}` stands for the values in it."""
    parts = {
        id(part) for node in ast.walk(tree) if isinstance(node, (ast.JoinedStr, ast.Expr)) for part in children(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield (
                node.lineno,
                "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values),
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.lineno, node.value


def children(node: ast.JoinedStr | ast.Expr) -> list[ast.expr]:
    return node.values if isinstance(node, ast.JoinedStr) else [node.value]


def names_an_option(text: str) -> bool:
    document = "\n" in text  # such as a model card, which is no message
    return not document and OPTION.search(COMMAND.sub("", text)) is not None


def test_no_function_is_longer_than_a_screen_and_a_half() -> None:
    long = [
        f"{name}:{node.lineno} {node.name}: {lines} lines"
        for name, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if (lines := (node.end_lineno or 0) - node.lineno + 1) > MAX_LINES
    ]
    assert not long


def test_no_message_below_the_command_line_names_an_option() -> None:
    found = [
        f"{name}:{line} {text!r}"
        for name, tree in modules()
        if not name.startswith("cli/") and name not in MAY_NAME_OPTIONS
        for line, text in texts(tree)
        if names_an_option(text)
    ]
    assert not found


def test_counts_in_messages_agree_with_their_nouns() -> None:
    found = [
        f"{name}:{line} {text!r}"
        for name, tree in modules()
        if name.startswith(("cli/", "serving/heads/", "serving/collections/"))
        for line, text in texts(tree)
        if UNCOUNTED.search(text)
    ]
    assert not found, "use `format_count`"


@pytest.mark.parametrize(
    ("error", "python", "command_line"),
    [
        (InputError("no such file"), "no such file", "no such file"),
        (
            InputError("expected 1 or more", argument="batch_size", value=0),
            "batch_size=0: expected 1 or more",
            "--batch-size 0: expected 1 or more",
        ),
        (
            InputError("needs `int8=False`", argument="lam", fix="pass `resume=True`, `lam=2` or another `out`"),
            "lam: needs `int8=False`; pass `resume=True`, `lam=2` or another `out`",
            "--lambda: needs --no-int8; pass --resume, --lambda 2 or another --out",
        ),
        (
            InputError("is a file", argument="data", value="a.txt", fix="pass a folder as `data`, or `unknown=1`"),
            "data=a.txt: is a file; pass a folder as `data`, or `unknown=1`",
            "a.txt: is a file; pass a folder as DATA, or `unknown=1`",
        ),
    ],
)
def test_an_error_names_parameters_in_python_and_options_on_the_command_line(
    error: InputError, python: str, command_line: str
) -> None:
    @click.command("try", cls=Command)
    @click.argument("data")
    @click.option("--batch-size")
    @click.option("--lambda", "lam")
    @click.option("--int8/--no-int8")
    @click.option("--resume", is_flag=True)
    @click.option("-o", "--out")
    def command(**_: object) -> None:
        raise error

    assert str(error) == python
    with pytest.raises(click.ClickException) as caught:
        command.main(["x"], standalone_mode=False)
    assert caught.value.message == command_line
    assert caught.value.exit_code == 1


def test_every_command_renders_errors() -> None:
    for name, tree in modules():
        if not re.fullmatch(r"cli/\w+_command\.py", name):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".command"):
                assert re.search(r"cls=(Serve)?Command\b", ast.unparse(node)), f"{name}:{node.lineno}"


def test_an_error_survives_pickling() -> None:
    import pickle

    error = InputError("expected 1 or more", argument="batch_size", value=0, fix="leave `batch_size` out")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_the_finder_of_options_finds_one() -> None:
    tree = ast.parse('"""Says --this."""\nx = f"{1}: pass --that"\ny = f"`robustfeat pull {1} --force`"\n')
    assert [text for _, text in texts(tree) if names_an_option(text)] == ["{}: pass --that"]
