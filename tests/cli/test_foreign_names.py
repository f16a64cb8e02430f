"""Names come from strangers: whatever is in them, what is printed stays one line."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from robustfeat.cli.rendering import say
from robustfeat.hub.config import Evaluation
from robustfeat.hub.folder import ModelFolder, seal_folder
from robustfeat.progress import Progress, remark
from tests.conftest import Run

FORGED = "a\x1b[2J\rhashes verified\nconfig hash: 0\x9b1m\u202eb"


def test_info_of_a_model_with_forged_names(model: Path, tmp_path: Path, robustfeat: Run) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "copy"))
    config = ModelFolder(folder).config.replace(
        name=FORGED,
        architecture=FORGED,
        provenance={"source": FORGED, "terms": FORGED},
        results={FORGED: [{FORGED: FORGED}], "b": FORGED},
        evaluations=(Evaluation(FORGED, FORGED, FORGED, 1.0, FORGED, FORGED),),
    )
    seal_folder(folder, config, "")
    printed = robustfeat("info", folder).stdout
    assert all(line.isprintable() for line in printed.splitlines())
    assert sum(line.startswith("config hash:") for line in printed.split("\n")) == 1
    assert r"a\x1b[2J\rhashes verified\nconfig hash: 0\x9b1m\u202eb" in printed
    printed = robustfeat("info", folder, "--json").stdout
    assert printed.removesuffix("\n").isprintable()
    assert json.loads(printed)["architecture"] == FORGED


def test_all_that_prints_lines_keeps_them(capsys: pytest.CaptureFixture[str]) -> None:
    say(FORGED)
    remark(FORGED)
    Progress("x", 1, stream=sys.stdout).say(FORGED)
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert len(err.splitlines()) == 1
    assert all(line.isprintable() for line in (out + err).splitlines())
