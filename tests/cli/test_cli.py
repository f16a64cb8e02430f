"""The command line as users meet it: processes, exit codes, one line an error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Run, files_of, train_arguments


def only_line(text: str) -> str:
    lines = text.splitlines()
    assert len(lines) == 1, text
    return lines[0]


def test_help_lists_what_is_ready(robustfeat: Run) -> None:
    result = robustfeat("--help")
    assert result.returncode == 0
    for command in ("embed", "export", "import", "info", "train"):
        assert f"  {command} " in result.stdout
        assert "Usage:" in robustfeat(command, "--help").stdout


def test_version(robustfeat: Run) -> None:
    import robustfeat as package

    assert robustfeat("--version").stdout.split()[-1] == package.__version__


def test_embed_writes_one_row_an_image(robustfeat: Run, examples: Path, tmp_path: Path) -> None:
    out = tmp_path / "feats.npy"
    result = robustfeat("embed", examples, "--out", out, "--json")
    assert result.returncode == 0, result.stderr
    features = np.load(out)
    assert features.shape == (40, 512)
    assert features.dtype == np.float32
    assert np.isfinite(features).all()
    summary = json.loads(only_line(result.stdout))
    assert (summary["images"], summary["failed"]) == (40, 0)
    assert "embed 40/40 images" in result.stderr
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["feats.index.jsonl", "feats.meta.json", "feats.npy"]


def test_embed_exits_with_3_when_images_fail(
    robustfeat: Run, model: Path, example_files: list[Path], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(example_files[0].read_bytes()[:500])
    out = tmp_path / "feats.npy"
    result = robustfeat("embed", example_files[0], bad, "--out", out, "--model", model, "--quiet")
    assert result.returncode == 3
    assert "1 of 2 images failed" in only_line(result.stderr)
    assert np.isnan(np.load(out)).all(axis=1).tolist() == [False, True]


def test_info_shows_name_and_terms(robustfeat: Run) -> None:
    result = robustfeat("info")
    assert result.returncode == 0
    assert "terms:" in result.stdout
    assert "Tiny ImageNet" in result.stdout
    assert json.loads(robustfeat("info", "--json").stdout)["robustfeat"]["feature_size"] == 512


def test_train_export_embed_work_together(robustfeat: Run, finished_run: Path, examples: Path, tmp_path: Path) -> None:
    result = robustfeat("export", finished_run, "--out", tmp_path / "model", "--no-int8", "--name", "mine-v1", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["golden_cosine"]["fp32"] >= 0.9999
    result = robustfeat("embed", examples, "--model", tmp_path / "model", "--out", tmp_path / "feats.npy")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "feats.meta.json").read_text())["model"] == "mine-v1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["embed", "{tmp}/none", "--out", "{tmp}/f.npy"], "no such file or folder"),
        (["embed", "{tmp}/empty", "--out", "{tmp}/f.npy"], "no images found"),
        (["embed", "{examples}", "--out", "{tmp}/f.npy", "--model", "{tmp}/empty"], "not a model folder"),
        (["embed", "{examples}", "--out", "{tmp}/f.csv"], "expected a name ending in .npy"),
        (["info", "{tmp}/none"], "not a model folder"),
        (["train", "{tmp}/none", "--out", "{tmp}/run"], "no such folder; expected a folder of class folders"),
        (
            ["train", "{tmp}/empty", "--out", "{tmp}/run"],
            "holds no class folders with images; expected a folder of class folders",
        ),
        (["train", "{dataset}", "--out", "{tmp}/run", "--batch-size", "6"], "10 of 10 classes have no concept"),
        (
            ["train", "{dataset}", "--out", "{tmp}/run", "--concepts", "{tmp}/none.csv", "--batch-size", "6"],
            "cannot be read",
        ),
        (["train", "{dataset}", "--out", "{tmp}/run", "--concepts", "classes"], "fewer than one batch of 256"),
        (
            [
                "train",
                "{dataset}",
                "--out",
                "{tmp}/run",
                "--method",
                "magic",
                "--concepts",
                "classes",
                "--batch-size",
                "6",
            ],
            "expected erm, el, cl, hrrl",
        ),
        (["train", "{dataset}", "--out", "{tmp}/run", "--config", "magic"], "neither a TOML file nor one of"),
        (
            ["train", "{dataset}", "--out", "{tmp}/run", "--resume", "--concepts", "classes", "--batch-size", "6"],
            "holds no checkpoint.pt",
        ),
        (["train", "{dataset}", "--out", "{tmp}/run", "--lr", "-1"], "--lr -1.0: must be from"),
        (["train", "{dataset}", "--out", "{tmp}/run", "--image-size", "5"], "robustfeat: --image-size 5: must be from"),
        (["train", "{dataset}", "--out", "{tmp}/run", "--set", "tau_unit=x"], "--set tau_unit=x: must be one of"),
        (
            ["train", "{dataset}", "--out", "{tmp}/run", "--set", "image_sizes=[[0,5]]"],
            "--set image_sizes=[[0,5]]: must",
        ),
        (["serve", "--max-body", "1e-9"], "--max-body 0: expected more than 0"),
        (["export", "{tmp}/none", "--out", "{tmp}/model"], "holds no checkpoint.pt"),
        (["export", "{tmp}/junk.pt", "--out", "{tmp}/model"], "damaged or not a checkpoint"),
        (["import", "resnet18", "--out", "{tmp}/model"], "expected timm:NAME, torchvision:NAME"),
        (
            ["import", "timm:no_such_net", "--weights", "{dataset}/concepts.csv", "--out", "{tmp}/model"],
            "timm:no_such_net",
        ),
        (["import", "timm:resnet18", "--weights", "{tmp}/junk.pt", "--out", "{tmp}/model"], "cannot be read"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    robustfeat: Run, tmp_path: Path, dataset: Path, examples: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk.pt").write_bytes(b"junk")
    places = {"tmp": tmp_path, "dataset": dataset, "examples": examples}
    result = robustfeat(*(argument.format(**places) for argument in arguments))
    assert result.returncode == 1, result.stderr
    assert message in only_line(result.stderr)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["empty", "junk.pt"]


@pytest.mark.parametrize(
    "arguments", [["embed"], ["embed", "a.jpg"], ["nonsense"], ["train", ".", "--precision", "fp8", "--out", "x"]]
)
def test_wrong_usage_exits_with_2(robustfeat: Run, arguments: list[str]) -> None:
    result = robustfeat(*arguments)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def test_a_full_disk_gives_one_line_and_keeps_the_old_file(
    robustfeat: Run, model: Path, examples: Path, tmp_path: Path
) -> None:
    """40 rows of 512 float32 are 82 kB and fit; a hundred do not."""
    out = tmp_path / "out" / "feats.npy"
    out.parent.mkdir()
    assert robustfeat("embed", examples / "hat", "--out", out, "--model", model, "--quiet").returncode == 0
    old = files_of(out.parent)
    arguments = ["embed", examples, examples, examples, "--out", out, "--model", model, "--quiet"]
    result = robustfeat(*arguments, file_bytes=100_000)
    assert result.returncode == 1
    assert "cannot be written" in only_line(result.stderr)
    assert files_of(out.parent) == old


def test_a_full_disk_during_training_gives_one_line(robustfeat: Run, dataset: Path, tmp_path: Path) -> None:
    result = robustfeat(*train_arguments(dataset, tmp_path / "run"), "--quiet", file_bytes=100_000)
    assert result.returncode == 1
    assert "checkpoint.pt: cannot be written" in only_line(result.stderr)
    assert not list((tmp_path / "run").iterdir())


def test_a_full_disk_during_export_leaves_nothing(robustfeat: Run, finished_run: Path, tmp_path: Path) -> None:
    result = robustfeat("export", finished_run, "--out", tmp_path / "model", "--no-int8", "--quiet", file_bytes=100_000)
    assert result.returncode == 1
    assert "cannot be written" in only_line(result.stderr)
    assert not list(tmp_path.iterdir())


def test_export_refuses_a_folder_that_exists(robustfeat: Run, finished_run: Path, model: Path, tmp_path: Path) -> None:
    target = Path(shutil.copytree(model, tmp_path / "model"))
    result = robustfeat("export", finished_run, "--out", target, "--no-int8")
    assert result.returncode == 1
    assert "exists already" in only_line(result.stderr)
