"""README's commands and code do what it says."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import speed_chart
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


@pytest.mark.parametrize("name", ["README.md", "docs/embedding.md", "docs/heads.md", "docs/python.md"])
def test_the_python_blocks_print_what_they_say(
    name: str, clothes: Path, tmp_path: Path, python: Run, robustfeat: Run
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    if name == "docs/heads.md":
        result = robustfeat("export", "--head", clothes, "--out", tmp_path / "classifier.onnx")
        assert result.returncode == 0, result.stderr
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text("utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        result = python(block, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        said = re.findall(r"print\(.*\)  # (.*)", block)
        assert said
        assert [line.rstrip() for line in result.stdout.splitlines()] == said


def test_four_commands_lead_from_class_folders_to_an_endpoint(tmp_path: Path) -> None:
    (block,) = re.findall(r"<!-- answers -->\n```bash\n(.*?)\n```", README, re.DOTALL)
    assert len(block.splitlines()) == 4
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = block.replace(".venv/bin/robustfeat", f"{sys.executable} -m robustfeat").replace("8000", port)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = ["bash", "-e", "-c", f"{script}\necho"]
    log = tmp_path / "stderr"
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True,
            start_new_session=True,
        ) as process,
    ):  # fmt: skip
        try:
            assert process.stdout is not None
            answer = json.loads(process.stdout.readline())
        finally:
            os.killpg(process.pid, signal.SIGTERM)
    assert answer["head"] == "clothes"
    assert answer["data"][0]["prediction"] == "hat"
    assert (tmp_path / "clothes" / "report.md").exists()
    (printed,) = re.findall(r"<!-- printed -->\n```text\n(.*?)\n```", README, re.DOTALL)
    *lines, last = printed.splitlines()
    assert set(map(without_numbers, lines)) <= set(map(without_numbers, log.read_text().splitlines()))
    assert set(re.findall(r'"(\w+)":', last)) <= {*answer, *answer["data"][0]}


def without_numbers(line: str) -> str:
    """Accuracies and ports differ between machines."""
    return re.sub(r"[\d.]+", "0", line)


def test_the_chart_shows_the_measured_rates() -> None:
    drawn = speed_chart.CHART.read_text("utf-8")
    text = (ROOT / "docs" / "embedding.md").read_text("utf-8")
    assert drawn == speed_chart.chart(speed_chart.programs(text)), "run `python benchmarks/speed_chart.py`"
    bars = [
        (float(length), int(rate))
        for length, rate in re.findall(r'x="\d+" y="\d+" width="([\d.]+)".*\n<text[^>]*>(\d+)</text>', drawn)
    ]
    assert len(bars) == 14
    for panel in (bars[0::2], bars[1::2]):
        longest = max(rate for _, rate in panel)
        assert [length for length, _ in panel] == pytest.approx([200 * rate / longest for _, rate in panel], abs=0.06)


def test_it_stays_short() -> None:
    assert len(README.splitlines()) <= 150


def test_every_command_is_in_the_table() -> None:
    from robustfeat.cli import _COMMANDS

    for command in _COMMANDS:
        assert re.search(rf"^\| `robustfeat {command}[ `]", README, re.MULTILINE), command


def test_links_lead_somewhere() -> None:
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", file.read_text("utf-8")):
            assert target.startswith("https://") or (file.parent / target).exists(), f"{file.name}: {target}"
