"""Sphinx's configuration of the documentation site.

    sphinx-build -W docs build/site

Pages are the Markdown files that GitHub shows, too. What only the site has is made here: the navigation from the lists
in index.md, the reference of commands from their `--help`, and links to files outside of docs/.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path

import click
from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

from robustfeat import __version__  # noqa: E402
from robustfeat.cli import cli  # noqa: E402

project = "robustfeat"
version = release = __version__
copyright = "robustfeat's authors, Apache-2.0"  # noqa: A001  # Sphinx reads this name

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["results/*.md", "_static"]
myst_heading_anchors = 4
myst_enable_extensions = ["deflist"]
highlight_language = "text"  # of blocks that name no language
default_role = "code"  # single backticks in docstrings

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes as one list

html_theme = "furo"
html_title = f"robustfeat {__version__}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False


def toctrees(text: str) -> str:
    """The navigation: a tree for each section of index.md, with the pages that it links to, in their order."""
    trees = ""
    for section in text.split("\n## ")[1:]:
        caption = section.partition("\n")[0]
        pages = dict.fromkeys(re.findall(r"\]\(([\w/-]+)\.md\)", section))
        trees += "\n".join(["\n```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```\n"])
    return trees


def commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    """A command and those below it, each with its full name; groups without help of their own are left out."""
    if not isinstance(command, click.Group):
        yield name, command
        return
    context = click.Context(command)
    for child in command.list_commands(context):
        found = command.get_command(context, child)
        if found is not None and not found.hidden:
            yield from commands(found, f"{name} {child}")


def describe(name: str, command: click.Command) -> str:
    """A command's `--help` as Markdown: usage, description, and a definition for each option."""
    context = click.Context(command, info_name=name)
    usage = " ".join(command.collect_usage_pieces(context))
    lines = [f"## {name}", "", "```text", f"{name} {usage}", "```", ""]
    for paragraph in re.split(r"\n\s*\n", cleandoc(command.help or "")):
        literal = paragraph.startswith("\b\n")
        lines += ["```text", paragraph[2:], "```", ""] if literal else [as_markdown(paragraph), ""]
    for option in command.params:
        record = option.get_help_record(context) if isinstance(option, click.Option) else None
        if record:
            lines += [f"`{record[0]}`", f": {as_markdown(record[1])}", ""]
    return "\n".join([*lines, as_markdown(command.epilog or ""), ""])


def as_markdown(text: str) -> str:
    """A paragraph of help. Its options and the parts in backticks become code."""
    parts = re.split(r"(`[^`]+`)", " ".join(text.split()))
    plain = [re.sub(r"([\\`*_<\[])", r"\\\1", part) for part in parts[::2]]
    parts[::2] = [re.sub(r"(?<![\w-])--[a-z][\w-]*", r"`\g<0>`", part) for part in plain]
    return "".join(parts)


def local_link(page: Path, link: re.Match[str]) -> str:
    """A link as the site has it: files that are no pages are downloads, and folders have no page."""
    label, target = link[1], (page.parent / link[2]).resolve()
    if target.is_dir():
        return label
    outside = DOCS not in target.parents or target.parent.name == "results"
    return f"[{label}](path:{link[2]})" if target.is_file() and outside else link[0]


def prepare(app: Sphinx, docname: str, source: list[str]) -> None:
    """Completes a page's Markdown before it is parsed."""
    page = Path(app.srcdir) / f"{docname}.md"
    text = re.sub(r"(?<!!)\[([^\]]*)\]\(((?!\w+:)[^)#\s]+)\)", lambda link: local_link(page, link), source[0])
    if docname == app.config.root_doc:
        text += toctrees(text)
    if docname == "reference/commands":
        text += "\n".join(describe(name, command) for name, command in commands(cli, "robustfeat"))
    source[0] = text


def keep_description(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Stops Napoleon from reading a property's "exact, or scaled: how JPEGs are decoded" as a type and a text."""
    if what == "property":
        lines.insert(0, "")


def shorten_errors(
    app: Sphinx, what: str, name: str, obj: object, options: object, signature: str, result: str
) -> tuple[str, str] | None:
    """Leaves out the arguments of errors, which are the same for all, but for those of their base."""
    return ("", "") if what == "exception" and not name.endswith(".RobustFeatError") else None


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", prepare)
    app.connect("autodoc-process-docstring", keep_description, priority=100)  # before Napoleon
    app.connect("autodoc-process-signature", shorten_errors)
    app.add_lexer("haproxy", TextLexer)
