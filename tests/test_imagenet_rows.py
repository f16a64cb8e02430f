"""benchmarks/imagenet_rows.py: the classifier keeps the rows of the classes that DATA has."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import imagenet_rows
from robustfeat.training.export.backbones import import_backbone

ROWS = {"n01440764": 0, "n02084071": None, "n02123045": 281, "n15075141": 999}
"""Places of the tench, the tabby and toilet tissue among ImageNet's classes; a dog in general is none of them."""


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["imagenet_rows.py", *map(str, arguments)])
    imagenet_rows.main()


def write_classes(root: Path, names: list[str]) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(root / name / f"{number}.png")
    return root


def test_rows_of_the_data_s_classes_are_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    weights, model, out = tmp_path / "weights.safetensors", tmp_path / "model", tmp_path / "start.safetensors"
    torch.manual_seed(0)
    given = timm.create_model("test_convnext", num_classes=1000).state_dict()
    save_file(given, weights)
    import_backbone("timm:test_convnext", model, weights=weights, image_size=32, int8=False)
    data = write_classes(tmp_path / "data", [name for name, row in ROWS.items() if row is not None])
    run(monkeypatch, model, data, "--out", out)
    made, rows = load_file(out), [row for row in ROWS.values() if row is not None]
    for name, value in given.items():
        assert torch.equal(made[name], value[rows] if name.startswith("head.fc.") else value)
    assert "3 of 1000 classes" in capsys.readouterr().out
    for place, words in (
        ((model, write_classes(tmp_path / "dogs", list(ROWS))), "1 classes are not ImageNet's, such as n02084071"),
        (("builtin", data), "MODEL=builtin: has no classifier of ImageNet's 1,000 classes"),
    ):
        with pytest.raises(SystemExit):
            run(monkeypatch, *place, "--out", tmp_path / "no.safetensors")
        assert words in capsys.readouterr().err
    assert not (tmp_path / "no.safetensors").exists()
