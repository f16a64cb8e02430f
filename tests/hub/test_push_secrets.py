"""A push publishes for good: what looks like a secret is refused before anything is sent."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from robustfeat.errors import ModelFolderError
from robustfeat.hub.folder import ModelFolder
from robustfeat.hub.parcel import model_parcel


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("id_rsa", "x"),
        ("server.PEM", "x"),
        ("credentials.json", "{}"),
        ("sub/prod.env", "A=1"),
        ("notes.txt", "token: hf_" + "a" * 34),
        ("notes.md", "-----BEGIN OPENSSH PRIVATE KEY-----"),
        ("README.md", "use AKIA" + "A" * 16),
    ],
)
def test_what_looks_like_a_secret_is_refused_by_name(model: Path, tmp_path: Path, name: str, content: str) -> None:
    folder = ModelFolder(shutil.copytree(model, tmp_path / "copy"))
    (folder.path / name).parent.mkdir(exist_ok=True)
    (folder.path / name).write_text(content)
    with pytest.raises(ModelFolderError, match=rf"{name}: looks like a key or a password"):
        model_parcel(folder, "org/name")


def test_a_licence_and_a_picture_are_none(model: Path, tmp_path: Path) -> None:
    folder = ModelFolder(shutil.copytree(model, tmp_path / "copy"))
    (folder.path / "LICENSE").write_text("Keys and tokens: all rights reserved.")
    assert "LICENSE" in model_parcel(folder, "org/name").contents
