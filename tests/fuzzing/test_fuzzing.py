"""Whatever bytes come, a parser accepts or refuses them, soon and in little memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.fuzzing.engine import attempt, fuzz
from tests.fuzzing.parsers import PARSERS, found

INPUTS = 120
MINUTES = float(os.environ.get("ROBUSTFEAT_FUZZ_MINUTES", "6"))


@pytest.mark.parametrize("name", PARSERS)
def test_damaged_inputs_are_refused(name: str) -> None:
    findings = list(fuzz(PARSERS[name](), seed=0, inputs=INPUTS, note=lambda _: None))
    assert not findings, findings[0]


@pytest.mark.parametrize(("name", "data"), [(name, data) for name in PARSERS for data in found(name)])
def test_earlier_findings_stay_mended(name: str, data: bytes) -> None:
    assert attempt(PARSERS[name](), data) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", PARSERS)
def test_damaged_inputs_are_refused_for_long(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzzing", name, str(60 * MINUTES), "1", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert " 0 kinds of findings" in result.stdout, result.stdout
