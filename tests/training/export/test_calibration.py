"""The images that int8 is calibrated with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from robustfeat.errors import DataError
from robustfeat.hub.preprocessing import Preprocessing
from robustfeat.training.export.calibration import folder_images


def test_what_is_left_out_is_said(examples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(examples / "hat", tmp_path / "images"))
    count = len(folder_images(folder, Preprocessing(32)))
    assert capsys.readouterr().err == ""
    (folder / "b.psd").write_bytes(b"")
    (folder / "bad.jpg").write_bytes(b"junk")
    assert len(folder_images(folder, Preprocessing(32))) == count
    said = f"{folder}: files left out: 1 (.psd 1); images that cannot be decoded: 1\n"
    assert capsys.readouterr().err == said
    for file in folder.glob("hat-*"):
        file.unlink()
    with pytest.raises(DataError, match="none of its images can be decoded"):
        folder_images(folder, Preprocessing(32))
