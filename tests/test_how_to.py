"""The tutorial and the how-to pages: their commands run in a shell, in order, and print what the pages show."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.command_server import CommandServer
from tests.conftest import ROOT, hub_environment, shared_folder
from tests.hub_server import FakeHub
from tests.serving.http.conftest import wait_until

DOCS = ROOT / "docs"
SLOW = {"train", "distil", "publish", "search"}  # the first two train a network
FENCE = re.compile(r"^( *)(?:<!-- (.+?) -->\n *)?```(bash|text)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
# The command, forked from a process that has imported its libraries: see `CommandServer`.
PROGRAM = """\
#!{python}
import os, signal, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.command_server import CommandServer
command = CommandServer(Path({root!r}), Path({folder!r})).start(sys.argv[1:], stderr=2, cwd=Path.cwd())
signal.signal(signal.SIGTERM, lambda *_: command.send_signal(signal.SIGTERM))
code = command.wait()
print(*command.texts(), end="", flush=True)
os._exit(code)
"""


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
    program = tmp_path / "bin" / "robustfeat"
    program.parent.mkdir()
    folder = str(shared_folder(tmp_path_factory) / "commands")
    program.write_text(PROGRAM.format(python=sys.executable, root=str(ROOT), folder=folder))
    program.chmod(0o755)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    page = read_page(path)
    assert "robustfeat " in page.script
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    places = os.pathsep.join([str(program.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = hub_environment(hub, tmp_path / "home", PATH=places)
    log = tmp_path / "log"
    script = page.script.replace("8000", port) + "\necho; echo done\n"
    with log.open("wb") as output:
        shell = subprocess.Popen(
            ["bash", "-e", "-c", script], cwd=tmp_path, env=environment, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            assert shell.wait(600) == 0, log.read_text("utf-8")
            with contextlib.suppress(AssertionError):  # a server may say where it is after its first answer
                wait_until(lambda: not missing_lines(page, log))
        finally:
            with contextlib.suppress(ProcessLookupError):  # no server is left
                os.killpg(shell.pid, signal.SIGTERM)
    said = log.read_text("utf-8")
    assert "done" in said.splitlines()
    assert not missing_lines(page, log), said


def test_the_tutorial_installs_as_readme_does() -> None:
    (line,) = re.findall(r"<!-- embed -->\n```bash\n(.*)\n```", (ROOT / "README.md").read_text("utf-8"))
    (block,) = re.findall(r"<!-- install -->\n```bash\n(.*?)\n```", PAGES[0].read_text("utf-8"), re.DOTALL)
    assert line.startswith(block.splitlines()[0])
