"""The tutorial and the how-to pages: their commands run in a shell, in order, and print what the pages show."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.command_server import CommandServer
from tests.conftest import ROOT
from tests.hub_server import FakeHub
from tests.serving.http.conftest import wait_until
from tests.shell import run_script

DOCS = ROOT / "docs"
SLOW = {"train", "distil", "publish", "search"}  # the first two train a network
FENCE = re.compile(r"^( *)(?:<!-- (.+?) -->\n *)?```(bash|text)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Page:
    """The commands of a page, and the lines that it shows of their output."""

    script: str
    shown: list[str]


def read_page(path: Path) -> Page:
    """A block below a comment, such as `<!-- needs a network -->`, is left out."""
    script: list[str] = []
    shown: list[str] = []
    for indent, comment, language, block in FENCE.findall(path.read_text("utf-8")):
        if not comment:
            lines = [line.removeprefix(indent) for line in block.splitlines()]
            (script if language == "bash" else shown).extend(lines)
    return Page("\n".join(script), shown)


def without_numbers(line: str) -> str:
    """Accuracies and ports differ between machines."""
    return re.sub(r"[\d.]+", "0", line)


def missing_lines(page: Page, log: Path) -> list[str]:
    """The lines that a page shows and a log does not have."""
    said = without_numbers(log.read_text("utf-8")).splitlines()
    return [line for line in page.shown if without_numbers(line) not in said]


PAGES = [DOCS / "tutorial.md", *sorted((DOCS / "how-to").glob("*.md"))]


@pytest.mark.parametrize(
    "path",
    [pytest.param(page, marks=[pytest.mark.slow] if page.stem in SLOW else [], id=page.stem) for page in PAGES],
)
def test_the_commands_print_what_the_page_shows(
    path: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, commands: CommandServer, hub: FakeHub
) -> None:
    commands.run(["--version"])  # starts it
    page = read_page(path)
    assert "robustfeat " in page.script
    started = run_script(page.script, tmp_path, tmp_path_factory, hub)
    with started as log, contextlib.suppress(AssertionError):  # a server may say where it is after its first answer
        wait_until(lambda: not missing_lines(page, log))
    assert not missing_lines(page, log), log.read_text("utf-8")


def test_the_tutorial_installs_as_readme_does() -> None:
    (line,) = re.findall(r"<!-- embed -->\n```bash\n(.*)\n```", (ROOT / "README.md").read_text("utf-8"))
    (block,) = re.findall(r"<!-- install -->\n```bash\n(.*?)\n```", PAGES[0].read_text("utf-8"), re.DOTALL)
    assert line.startswith(block.splitlines()[0])
