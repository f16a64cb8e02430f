"""The commands and programs in docs/torchserve.md do what it says."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import click
import pytest

from tests.conftest import ROOT
from tests.serving.torchserve.conftest import TorchServer, why_not

TEXT = (ROOT / "docs" / "torchserve.md").read_text("utf-8")
BLOCKS = re.findall(r"<!-- tested -->\n```(\w+)\n(.*?)```", TEXT, re.DOTALL)


def run(server: TorchServer, code: str, *command: str) -> str:
    for port in (8080, 8081):
        code = code.replace(f"localhost:{port}", f"127.0.0.1:{server.port + port - 8080}")
    code = code.replace("store/key_file.json", str(server.store / "key_file.json"))
    done = subprocess.run([*command, code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_the_blocks_give_what_they_show(torchserver: TorchServer) -> None:
    ask, program, renew = BLOCKS
    one, two = (
        json.loads(line)
        for line in run(torchserver, ask[1].replace("\ncurl", "\necho\ncurl"), "bash", "-c").split("\n")
        if line
    )
    shown = re.findall(r'"embedding":\[(-?[\d.]+),(-?[\d.]+),', TEXT)[0]
    assert one["data"][0]["embedding"][:2] == pytest.approx([float(number) for number in shown], abs=1e-4)
    assert [sorted(item)[0] for item in two["data"]] == ["embedding", "error"]
    assert run(torchserver, program[1], sys.executable, "-c").strip() == "(1, 512)"
    before = torchserver.key("inference")
    run(torchserver, renew[1], "bash", "-c")
    assert torchserver.key("inference") != before


def test_the_options_are_named_as_they_are() -> None:
    from robustfeat.cli.torchserve_command import command

    known = {name for parameter in command.params if isinstance(parameter, click.Option) for name in parameter.opts}
    torchserve = {"--ncs", "--start", "--stop", "--foreground", "--ts-config", "--model-store"}
    others = {"--data-binary", "--head", "--only", "--rounds", "--seconds"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", TEXT)) <= known | torchserve | others
