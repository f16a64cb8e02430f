"""The project's English stays as plain as benchmarks/prose.py has measured it, and the measure counts what it says."""

from __future__ import annotations

import ast

import click
import pytest

import prose
from robustfeat.cli import _COMMANDS, cli

PAGE = """\
# A heading: not counted

One sentence with `two words` of code. Another one,
e.g. with a [link; to a page](https://example.org/a/very/long/address) in it:

    robustfeat embed photos/   # code; not counted

- an item: with a colon
  and a second line
- the next item

```bash
code; in a fence
```
| a table | with: cells |
|---|---|
| short | a cell of five words; at least |

<!-- a comment;
not counted -->
The last (short) one.
"""


def test_the_prose_is_as_plain_as_it_was() -> None:
    above = [line for total in prose.totals(list(prose.measure())) for line in total.above()]
    assert not above, "run `python benchmarks/prose.py NAME --show`"


def test_a_document_is_read_by_sentences() -> None:
    found = prose.Prose("documents", "page", prose.document_passages(PAGE))
    assert found.sentences == [
        "One sentence with CODE of code.",
        "Another one, e.g with a link; to a page in it:",
        "an item: with a colon and a second line",
        "the next item",
        "The last (short) one.",
    ]
    assert found.lengths == [6, 11, 9, 3, 4]
    assert found.marks == 2
    assert prose.cells(PAGE) == [" a cell of five words; at least "]


def test_long_sentences_lines_and_phrases_are_counted() -> None:
    text = "word " * 31 + "alone.\n\nThose of others go on: " + "word " * 20 + "\n"
    figures = prose.Prose("documents", "page", prose.document_passages(text), prose.long_lines(text)).figures
    assert figures == prose.Limits(mean_words=28.5, long_percent=50, marks=0.5, long_lines=2, phrases=3)


def test_a_figure_above_a_limit_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(prose.LIMITS, "help", prose.Limits(3, 0, 0, 0, 0))
    assert prose.Prose("help", "embed", ["Four words are here."]).above() == [
        "help: mean_words must be at most 3; got 4.00"
    ]


def test_code_is_read_by_docstrings_comments_and_messages() -> None:
    source = '''\
"""A module.

Args:
    name: what it is called,
        in two lines.
    other: the rest.

    >>> code
"""
# A comment
# of two lines.
x = 1  # Another.  # noqa
raise InputError(f"{x}: expected 1 or more; got {y}", argument="the name", fix="pass 1")
'''
    tree = ast.parse(source)
    docstring = [" ".join(passage.split()) for passage in prose.docstring_passages(ast.get_docstring(tree) or "")]
    assert docstring == ["A module.", "what it is called, in two lines.", "the rest."]
    assert list(prose.comments(source)) == ["A comment\nof two lines.", "Another.  # noqa"]
    assert prose.messages(tree) == ["expected 1 or more; got VALUE", "pass 1"]


def test_help_is_read_from_the_commands() -> None:
    @click.command(epilog="The end.")
    @click.option("--size", help="In pixels.")
    def command() -> None:
        """First.

        \b
        as: it is
        """

    assert prose.help_passages(command) == ["First.", "The end.", "In pixels."]
    names = {name for name, _ in prose.commands(cli, "robustfeat")}
    assert {"robustfeat", *(f"robustfeat {name}" for name in _COMMANDS), "robustfeat svm fit"} <= names
