"""The commands and programs in docs/serving.md do what it says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from robustfeat import FeatureExtractor
from robustfeat.serving.bulk.embedding import embed_files
from robustfeat.serving.inputs.listing import list_inputs
from tests.conftest import EXAMPLES, ROOT
from tests.serving.http.conftest import Server, serving

TEXT = (ROOT / "docs" / "serving.md").read_text("utf-8")
BLOCKS = re.findall(r"<!-- tested -->\n```(\w+)\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(scope="module")
def documented(clothes: Path) -> Iterator[Server]:
    with serving("--head", f"clothes={clothes}") as server:
        yield server


def run(command: list[str], text: str | None = None) -> str:
    result = subprocess.run(command, input=text, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_there_are_programs_in_three_languages() -> None:
    assert sorted(language for language, _ in BLOCKS) == ["bash", "javascript", "python", "python", "python"]


def test_the_commands_give_what_they_show(documented: Server) -> None:
    (block,) = [code for language, code in BLOCKS if language == "bash"]
    embedded, mixed, predicted = (
        json.loads(run(["bash", "-c", line.replace("localhost:8000", f"localhost:{documented.port}")]))
        for line in block.splitlines()
    )
    shown = re.findall(r'"embedding":\[(-?[\d.]+),(-?[\d.]+),', TEXT)[0]
    assert embedded["data"][0]["embedding"][:2] == pytest.approx([float(number) for number in shown], abs=1e-4)
    assert [sorted(item)[0] for item in mixed["data"]] == ["embedding", "error"]
    assert predicted["data"][0]["prediction"] == "hat"


@pytest.mark.parametrize("number", [n for n, (language, _) in enumerate(BLOCKS) if language != "bash"])
def test_the_programs_print_what_they_say(documented: Server, number: int) -> None:
    language, code = BLOCKS[number]
    code = code.replace("localhost:8000", f"127.0.0.1:{documented.port}")
    command = [sys.executable, "-"] if language == "python" else ["node", "--input-type=module", "-"]
    (expected,) = re.findall(r"(?:print|console\.log)\(.*\);?  (?:#|//) (.*)", code)
    assert run(command, code).strip() == expected


def test_the_program_of_the_page_prints_what_it_says(documented: Server, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "page.md").read_text("utf-8")
    (code,) = re.findall(r"<!-- tested -->\n```python\n(.*?)```", text, re.DOTALL)
    with list_inputs([EXAMPLES]) as inputs:
        embed_files(
            FeatureExtractor.from_pretrained(threads=1, streams=1), inputs, str(tmp_path / "feats.npy"), quiet=True
        )
    (expected,) = re.findall(r"print\(.*\)  # (.*)", code)
    code = code.replace("localhost:8000", f"127.0.0.1:{documented.port}")
    result = subprocess.run(
        [sys.executable, "-"], input=code, capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert result.stdout.strip() == expected, result.stderr


def test_every_code_of_an_error_is_in_the_table() -> None:
    codes = set()
    for file in (ROOT / "robustfeat" / "serving" / "http").rglob("*.py"):
        codes |= set(re.findall(r"ApiError\(\s*\d+,\s*\"(\w+)\"", file.read_text("utf-8")))
    assert len(codes) > 20
    assert {code for code in codes if f"`{code}`" not in TEXT} == {"disconnected"}
