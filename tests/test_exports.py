"""The lines in docs/collections.md that hand features to other programs."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT, Run


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("qdrant", "qdrant_client"),
        pytest.param(
            "fiftyone",
            "fiftyone",
            marks=pytest.mark.skipif(
                importlib.util.find_spec("fiftyone") is None, reason="FiftyOne is not among the packages of dev"
            ),
        ),
    ],
)
def test_the_lines_print_what_they_say(name: str, module: str, robustfeat: Run, python: Run, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "collections.md").read_text("utf-8")
    (block,) = re.findall(rf"<!-- {name} -->\n```python\n(.*?)```", text, re.DOTALL)
    assert f"import {module}" in block or f"from {module}" in block
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    assert robustfeat("embed", ROOT / "examples" / "images", "--out", tmp_path / "feats.npy").returncode == 0
    result = python(block, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == re.findall(r"print\(.*\)  # (.*)", block)
