"""What is built, and the files beside the code that speak of it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from robustfeat import __version__
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return project


def test_the_wheel_holds_types_models_and_data(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    source = {
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "robustfeat").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert "robustfeat/py.typed" in source
    assert {name for name in held if ".dist-info/" not in name} == source


def test_ci_runs_every_python_that_the_project_names(project: dict[str, Any]) -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8"))
    named = [re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", line) for line in project["classifiers"]]
    assert workflow["jobs"]["tests"]["strategy"]["matrix"]["python"] == [match[1] for match in named if match]


def test_the_citation_names_this_version_and_licence(project: dict[str, Any]) -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == __version__
    assert citation["license"] == project["license"]


def test_hints_name_extras_that_pip_adds_to_what_is_installed(project: dict[str, Any]) -> None:
    """No index has robustfeat: pip takes the copy that is installed, unless it shall look for a newer one."""
    texts = [file.read_text("utf-8") for file in (ROOT / "robustfeat").rglob("*.py")]
    hints = re.findall(r"pip install ([^;'`\"]*)'robustfeat\[(\w+|\{extra\})\]'", "".join(texts))
    assert {extra for _, extra in hints} - {"{extra}"} <= set(project["optional-dependencies"])
    assert {options for options, _ in hints} == {""}
    extra = next(iter(project["optional-dependencies"]))
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--dry-run", f"robustfeat[{extra}]"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    assert f"Requirement already satisfied: robustfeat[{extra}]" in said.stdout
