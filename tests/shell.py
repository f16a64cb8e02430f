"""A shell for the commands of the documentation: `robustfeat` on its path, a Hub, and a free port instead of 8000."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, hub_environment, shared_folder
from tests.hub_server import FakeHub

__all__ = ["run_script"]

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


@contextlib.contextmanager
def run_script(
    script: str, folder: Path, tmp_path_factory: pytest.TempPathFactory, hub: FakeHub, **variables: str
) -> Iterator[Path]:
    """Runs `script` in `folder`, beside `examples`, to its end; a command that fails ends it.

    Args:
        script: lines for bash. 8000 becomes a free port, also in the variable PORT.
        variables: further environment variables.

    Yields:
        The file with stdout and stderr. Servers that the script has started run until the block ends.
    """
    program = folder / "bin" / "robustfeat"
    program.parent.mkdir()
    commands = str(shared_folder(tmp_path_factory) / "commands")
    program.write_text(PROGRAM.format(python=sys.executable, root=str(ROOT), folder=commands))
    program.chmod(0o755)
    (folder / "examples").symlink_to(ROOT / "examples")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    places = os.pathsep.join([str(program.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = hub_environment(hub, folder / "home", PATH=places, PORT=port, **variables)
    log = folder / "log"
    with log.open("wb") as output:
        shell = subprocess.Popen(
            ["bash", "-e", "-c", script.replace("8000", port) + "\necho; echo done\n"], cwd=folder, env=environment,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            assert shell.wait(600) == 0, log.read_text("utf-8")
            yield log
        finally:
            with contextlib.suppress(ProcessLookupError):  # no server is left
                os.killpg(shell.pid, signal.SIGTERM)
    assert "done" in log.read_text("utf-8").splitlines()
