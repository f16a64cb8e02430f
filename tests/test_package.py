"""What is built, and the files beside the code that speak of it."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
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


DATA = (
    "robustfeat/py.typed",
    "robustfeat/hub/builtin/",
    "robustfeat/hub/public_models.json",
    "robustfeat/serving/http/page/",
    "robustfeat/serving/http/swagger/",
    "robustfeat/serving/maps/page/",
    "robustfeat/training/concept_maps/",
    "robustfeat/training/export/golden/",
    "robustfeat/training/recipes/",
)
"""Where files lie that are no code."""

needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="compares with the files of the repository")


def build(target: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.iterdir()
    return built


def tracked(place: str) -> set[str]:
    listed = subprocess.run(["git", "ls-files", "-z", place], cwd=ROOT, check=True, capture_output=True, text=True)
    return set(listed.stdout.split("\0")) - {""}


@needs_git
def test_the_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    with zipfile.ZipFile(build("wheel", tmp_path)) as archive:
        held = set(archive.namelist())
    own = {name for name in held if ".dist-info/" not in name}
    assert own == tracked("robustfeat")
    assert {name.partition(".dist-info/")[2] for name in held - own} == {
        "METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE",
    }  # fmt: skip
    data = {name for name in own if not name.endswith(".py")}
    assert {place for place in DATA for name in data if name.startswith(place)} == set(DATA)
    assert [name for name in data if not name.startswith(DATA)] == []


@needs_git
def test_the_source_distribution_holds_only_files_of_the_repository(tmp_path: Path) -> None:
    with tarfile.open(build("sdist", tmp_path)) as archive:
        held = {member.name.partition("/")[2] for member in archive.getmembers()}
    left_out = {".pre-commit-config.yaml"}
    assert held - {"PKG-INFO"} == tracked(".") - left_out


def test_notes_of_a_release_are_those_of_its_version(tmp_path: Path) -> None:
    """The release workflow stops where the tag, the version and CHANGELOG.md disagree."""
    for file in ("release_notes.py", "CHANGELOG.md", "__init__.py"):
        folder = {"release_notes.py": ".ci", "__init__.py": "robustfeat"}.get(file, "")
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / file).write_bytes((ROOT / folder / file).read_bytes())
    command = [sys.executable, str(tmp_path / ".ci" / "release_notes.py")]

    def notes(version: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, version], capture_output=True, text=True, check=False)

    assert "__version__ must be 9.9" in notes("9.9").stderr
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## Unreleased\n\n### Added\n\n- This.\n")
    assert f"`## {__version__} - YYYY-MM-DD`" in notes(__version__).stderr
    sections = ["## Unreleased", f"## {__version__} - 2026-12-01", "- This.", "## 0.0.1 - 2026-01-01", "- Old."]
    text = "\n\n".join([*sections, ""])
    (tmp_path / "CHANGELOG.md").write_text(text)
    assert notes(__version__).stdout == "- This.\n"


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
