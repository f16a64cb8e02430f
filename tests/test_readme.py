"""README's commands and code do what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.conftest import ROOT, Run

README = (ROOT / "README.md").read_text("utf-8")


def test_the_embed_line_gives_one_row_an_example(robustfeat: Run, tmp_path: Path) -> None:
    (line,) = re.findall(r"<!-- embed -->\n```bash\n(.*)\n```", README)
    command = line.split(" && ")[-1].split()
    assert command[0] == ".venv/bin/robustfeat"
    out = tmp_path / command[-1]
    result = robustfeat(*command[1:-1], out)
    assert result.returncode == 0, result.stderr
    assert "images" in result.stderr
    assert np.load(out).shape == (40, 512)


def test_the_python_blocks_run() -> None:
    for file in (ROOT / "README.md", ROOT / "docs" / "embedding.md"):
        blocks = re.findall(r"```python\n(.*?)```", file.read_text("utf-8"), re.DOTALL)
        assert blocks
        for block in blocks:
            command = [sys.executable, "-c", block]
            result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stderr
            assert "512)" in result.stdout


def test_every_command_is_in_the_table() -> None:
    from robustfeat.cli import _COMMANDS

    for command in _COMMANDS:
        assert f"`robustfeat {command} " in README


def test_links_lead_somewhere() -> None:
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", file.read_text("utf-8")):
            assert target.startswith("https://") or (file.parent / target).exists(), f"{file.name}: {target}"
