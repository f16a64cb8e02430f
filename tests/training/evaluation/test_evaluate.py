"""`robustfeat evaluate`: models of every kind on real images, and what is refused."""

import json
import re
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import NoReturn

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from robustfeat.cli.evaluate_command import command as evaluate_command
from robustfeat.cli.rendering import Failure
from robustfeat.errors import DataError, DecodeError, InputError
from robustfeat.serving.extractor import FeatureExtractor
from robustfeat.training.evaluation.arguments import parse_task
from robustfeat.training.evaluation.corruptions import CORRUPTIONS, SEVERITIES, _drift, classify_corrupted, corrupt
from robustfeat.training.evaluation.probes import libsvm, svm
from robustfeat.training.evaluation.report import evaluate_task
from robustfeat.training.evaluation.subject import NetworkSubject, open_network, open_subject
from robustfeat.training.evaluation.tasks import TaskFeatures, embed_images, embed_task, open_task
from tests import built_in
from tests.conftest import Run

NETWORK = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten())

def text():
    return "no network"

def images():
    return nn.Identity()

def broken():
    raise OSError("weights are gone")

def leaves():
    raise SystemExit(0)

class Moody(nn.Module):
    def forward(self, images):
        if len(images) == 1:
            return torch.zeros(48)
        if len(images) > 2:
            raise KeyError("batch")
        return torch.zeros(len(images), 48)

class Larger(nn.Module):
    def forward(self, images):
        return torch.zeros(len(images), 4 if len(images) <= 2 else 7)

class Constant(nn.Module):
    def forward(self, images):
        return torch.ones(len(images), 4)

class Headless(nn.Module):
    def train(self, mode=True):
        pass

    def forward(self, images):
        return images.mean((2, 3))

class Quitter(nn.Module):
    def forward(self, images):
        raise SystemExit(0)

class Odd(nn.Module):
    def get_extra_state(self):
        return {"a": 1}

class Complex(nn.Module):
    def forward(self, images):
        return torch.ones(len(images), 4, dtype=torch.complex64)
"""


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_network.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    return "own_network"


def test_a_run_has_the_features_of_its_exported_folder(finished_run: Path, model: Path, dataset: Path) -> None:
    task = open_task("clothes", str(dataset))
    of_run, of_folder = (embed_task(open_subject(str(name)), task) for name in (finished_run, model))
    assert of_run.x.shape == of_folder.x.shape == (30, 512)
    np.testing.assert_allclose(of_run.x, of_folder.x, rtol=0, atol=1e-5 * of_run.x.max())
    files = [task.train.source.read(row) for row in range(30)]
    np.testing.assert_array_equal(of_folder.x[:8], FeatureExtractor.from_pretrained(model).embed(files)[:8])


def test_a_network_of_ones_own_is_evaluated(network: str, dataset: Path) -> None:
    subject = open_subject(f"{network}:build", image_size=32, crop_pct=1.0)
    features = embed_task(subject, open_task("clothes", str(dataset)))
    with Image.open(next((dataset / "val").rglob("*.png"))) as image:
        square = np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.BILINEAR), np.float64)
    mean, std = (np.array(values) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    blocks = ((square / 255 - mean) / std).reshape(4, 8, 4, 8, 3).mean((1, 3))
    rows = np.abs(features.x_test - blocks.transpose(2, 0, 1).reshape(-1)).max(1)
    assert rows.min() < 0.02  # one level of 255 is 0.017


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text", "must return a torch.nn.Module; got str"),
        ("images", "must give one vector an image"),
        ("broken", "failed when it was called without arguments .*weights are gone"),
        ("nothing", "cannot be imported"),
        ("leaves", "failed when it was called without arguments"),
        ("Moody", r"must give one vector an image, \(1, 48\); got \(48,\) for 1 images"),
        ("Quitter", r"fails on 2 images of 32 px \(SystemExit"),
        ("Odd", r"cannot be used as a network \(AttributeError"),
        ("Complex", "must give real numbers in a tensor.*complex64"),
    ],
)
def test_what_is_no_network_is_refused(network: str, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_subject(f"{network}:{name}", image_size=32)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("Larger", InputError, r"must give one vector an image, \(30, 4\); got \(30, 7\)"),
        ("Constant", DataError, "gives all training images of clothes the same features"),
    ],
)
def test_a_network_that_fails_later_is_named(
    network: str, dataset: Path, name: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        embed_task(open_subject(f"{network}:{name}", image_size=32), open_task("clothes", str(dataset)))
    assert f"{network}:{name}" in str(caught.value)


def test_a_network_whose_train_returns_nothing_is_used(network: str) -> None:
    assert open_subject(f"{network}:Headless", image_size=32).feature_size == 3


def test_a_run_that_was_stopped_says_how_far_it_is(narrow_run: Path, tmp_path: Path) -> None:
    shutil.copytree(narrow_run, tmp_path / "half")
    file = tmp_path / "half" / "checkpoint.pt"
    saved = torch.load(file, weights_only=True)
    epoch = saved["epoch"]
    saved["recipe"]["epochs"] = epoch + 7
    torch.save(saved, file)
    assert open_subject(str(tmp_path / "half")).name == f"half at epoch {epoch} of {epoch + 7}"
    assert open_subject(str(narrow_run)).name == narrow_run.name


def test_models_of_one_name_are_told_apart(
    narrow_run: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [Path(shutil.copytree(narrow_run, tmp_path / place / "run")) for place in ("a", "b", "c")]
    for run in runs[:2]:
        saved = torch.load(run / "checkpoint.pt", weights_only=True)
        saved["recipe"]["epochs"] = saved["epoch"] + 7
        torch.save(saved, run / "checkpoint.pt")
    arguments = [*map(str, runs), "--task", f"clothes={dataset}", "--json", "--no-few-shot", "--quiet"]
    assert evaluate_command(arguments, standalone_mode=False) == 0
    names = [json.loads(line)["model"] for line in capsys.readouterr().out.splitlines()]
    note = f" at epoch {saved['epoch']} of {saved['epoch'] + 7}"
    assert names == [f"{runs[0]}{note}", f"{runs[1]}{note}", "run"]


def test_what_bears_on_a_score_is_said(
    network: str, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "clothes"
    shutil.copytree(dataset, folder)
    for file in (folder / "train" / "hat").iterdir():
        file.rename(file.with_suffix(".psd"))
    arguments = [f"{network}:build", "--image-size", "32", "--task", f"clothes={folder}", "--no-few-shot"]
    assert evaluate_command([*arguments, "--quiet"], standalone_mode=False) == 0
    assert capsys.readouterr().err == ""
    assert evaluate_command(arguments, standalone_mode=False) == 0
    left_out, lost, *_ = capsys.readouterr().err.splitlines()
    assert left_out.startswith(f"{folder / 'train'}: files left out: 3 (")
    assert lost == "clothes: 1 of 10 test images are of classes without training images, and count as wrong"


def test_finished_results_stay_when_a_later_model_fails(
    network: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [f"{network}:build", f"{network}:Constant", "--task", f"clothes={dataset}", "--image-size", "32"]
    arguments += ["--out", str(tmp_path / "r.json"), "--quiet", "--no-few-shot"]
    with pytest.raises(Failure, match="Constant"):
        evaluate_command(arguments, standalone_mode=False)
    (result,) = json.loads((tmp_path / "r.json").read_text())
    assert result["model"] == f"{network}:build"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "."], "--out .: is a folder"),
        (["--out", ""], "--out: expected a file; got an empty name"),
        (["--out", "/dev/null"], "--out /dev/null: is not a regular file"),
        (["--out", "a/../one", "--cache", "one"], "--out a/../one: is also the file of --cache"),
        (["--out", "loop/one"], "--out loop/one: the folder does not exist"),
        (["--finetune", "--plot", "nowhere/x.png"], "--plot nowhere/x.png: the folder does not exist"),
        (["--finetune", "--plot", ".png"], "expected a .png or .svg file"),
        (["--finetune"], "clothes: 30 training images, fewer than one batch of 128"),
        (["--batch-size", "8"], "--batch-size: applies to --finetune"),
    ],
)
def test_what_cannot_be_written_or_done_is_said_first(
    network: str, dataset: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    with pytest.raises(Failure, match=re.escape(message)):
        evaluate_command([f"{network}:broken", "--task", f"clothes={dataset}", *options], standalone_mode=False)


def test_features_are_computed_once(
    model: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject, task, cache = open_subject(str(model)), open_task("clothes", str(dataset)), tmp_path / "features.db"
    first = embed_task(subject, task, cache=cache)

    def computed_again(squares: np.ndarray) -> NoReturn:
        raise AssertionError("features were computed again")

    monkeypatch.setattr(subject, "embed_prepared", computed_again)
    again = embed_task(subject, task, cache=cache)
    np.testing.assert_array_equal(first.x, again.x)
    # Another model's features are not taken for these.
    other = open_subject("builtin")
    assert not np.allclose(embed_task(other, task, cache=cache).x, first.x)


def test_two_networks_of_the_same_shape_have_other_identities(dataset: Path, narrow_run: Path) -> None:
    subject = open_subject(str(narrow_run))
    assert isinstance(subject, NetworkSubject)
    with torch.no_grad():
        subject.network.get_parameter("conv1.weight")[0, 0, 0, 0] += 1e-3
    changed = NetworkSubject(subject.network, subject.contract, subject.name, torch.device("cpu"))
    assert changed.fingerprint != subject.fingerprint


def test_the_command_prints_a_table_or_json(dataset: Path, tmp_path: Path, robustfeat: Run) -> None:
    out = tmp_path / "results.json"
    done = robustfeat("evaluate", "builtin", "--task", f"clothes={dataset}", "--out", out, "--quiet")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert f"| {built_in.NAME} | clothes |" in done.stdout
    (result,) = json.loads(out.read_text())
    expected = evaluate_task(open_subject("builtin"), open_task("clothes", str(dataset)))
    assert result == expected
    assert result["identity"] == FeatureExtractor.from_pretrained().fingerprint
    assert (result["train"], result["test"], result["classes"]) == (30, 10, 10)
    assert list(result["few_shot"]) == ["1"]  # there are three images a class


def test_a_folder_becomes_the_network_that_it_was_exported_from(finished_run: Path, model: Path, dataset: Path) -> None:
    task = open_task("clothes", str(dataset))
    of_run, of_folder = (embed_task(open_network(str(name)), task) for name in (finished_run, model))
    np.testing.assert_array_equal(of_run.x, of_folder.x)


def test_corruptions_cost_accuracy_and_move_features(dataset: Path) -> None:
    """The head knows its images by heart: what it loses, corruptions took."""
    subject = open_subject("builtin")
    task = open_task("clothes", str(dataset))
    task = type(task)(task.name, task.train, task.train)
    head = svm(embed_task(subject, task)).head
    assert head is not None
    found = classify_corrupted(subject, head, task.test, names=("noise", "jpeg"), severities=(1, 5))
    scores = found.to_dict()
    assert scores["clean"] > 0.9
    by = scores["by_corruption"]
    assert by["noise"]["5"]["accuracy"] < scores["clean"]
    for name in ("noise", "jpeg"):
        assert 0 < by[name]["1"]["drift"] < by[name]["5"]["drift"] < 1
    accuracies = [entry["accuracy"] for kind in by.values() for entry in kind.values()]
    assert scores["corrupted"] == pytest.approx(np.mean(accuracies))
    assert scores["kept"] == pytest.approx(scores["corrupted"] / scores["clean"])


@pytest.mark.parametrize("name", list(CORRUPTIONS))
def test_worse_severities_are_further_from_the_image(name: str, example_files: list[Path]) -> None:
    with Image.open(example_files[0]) as image:
        square = np.asarray(image.convert("RGB").resize((64, 64)))
    moved = [np.abs(corrupt(square, name, severity).astype(int) - square).mean() for severity in SEVERITIES]
    assert 0 < moved[0] < moved[2] < moved[4]
    np.testing.assert_array_equal(corrupt(square, name, 3, seed=5), corrupt(square, name, 3, seed=5))


def test_fine_tuning_is_drawn(dataset: Path, tmp_path: Path, robustfeat: Run) -> None:
    done = robustfeat(
        "evaluate", "builtin", "--task", f"clothes={dataset}", "--finetune", "--epochs", 2, "--batch-size", 10,
        "--plot", tmp_path / "curves.png", "--out", tmp_path / "r.json", "--quiet", "--no-few-shot",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "r.json").read_text())
    errors = result["finetuned"]["test_error"]
    assert len(errors) == 2
    assert f"| {100 * (1 - errors[-1]):.2f} |" in done.stdout
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width > 500


def test_rows_are_drawn_the_same_way_each_time(dataset: Path) -> None:
    tasks = [open_task("clothes", str(dataset), train_rows=12, test_rows=4) for _ in range(2)]
    assert [len(tasks[0].train), len(tasks[0].test)] == [12, 4]
    np.testing.assert_array_equal(tasks[0].train.labels, tasks[1].train.labels)
    assert len(np.unique(tasks[0].train.labels)) > 5  # of ten; the first twelve rows are of four


def test_damaged_values_of_a_cache_are_computed_again(network: str, dataset: Path, tmp_path: Path) -> None:
    task, cache = open_task("clothes", str(dataset)), tmp_path / "features.db"
    expected = embed_task(open_subject(f"{network}:build", image_size=32), task, cache=cache)
    nan = np.full(48, np.nan, "<f4").tobytes()
    with closing(sqlite3.connect(cache)) as connection, connection:
        keys = [row[0] for row in connection.execute("SELECT key FROM features")]
        connection.execute("UPDATE features SET value = 'text' WHERE key = ?", (keys[0],))
        connection.execute("UPDATE features SET value = ? WHERE key = ?", (nan, keys[1]))
    again = embed_task(open_subject(f"{network}:build", image_size=32), task, cache=cache)
    np.testing.assert_array_equal(again.x, expected.x)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, float("nan"), float("inf")])
def test_a_share_of_test_images_lies_between_0_and_1(dataset: Path, fraction: float) -> None:
    with pytest.raises(DataError, match=r"`val_fraction=.*` of .* leaves none"):
        open_task("clothes", str(dataset / "train"), val_fraction=fraction)


def test_corruptions_and_libsvm_have_columns(
    network: str, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = f"{network}:build", tmp_path / "r.json"
    arguments = [model, "--image-size", "32", "--task", f"clothes={dataset}", "--corruptions", "--libsvm"]
    arguments += ["--no-few-shot", "--quiet", "--out", str(out)]
    assert evaluate_command(arguments, standalone_mode=False) == 0
    heading, _, row = capsys.readouterr().out.splitlines()
    cells = dict(zip(*([cell.strip() for cell in line.split("|")] for line in (heading, row)), strict=True))
    (result,) = json.loads(out.read_text())
    assert cells["LIBSVM / LinearSVC"] == " / ".join(
        f"{100 * result['libsvm'][name]['accuracy']:.2f}" for name in ("LIBSVM", "LinearSVC")
    )
    subject, task = open_subject(model, image_size=32), open_task("clothes", str(dataset))
    head = svm(embed_task(subject, task)).head
    assert head is not None
    found = classify_corrupted(subject, head, task.test)
    assert found.to_dict() == result["corruptions"]
    assert found.right.shape == (30, 10)
    assert cells["corrupted"] == f"{100 * found.right.mean():.2f}"
    assert cells["drift"] == f"{found.drift.mean():.4f}"


def test_rare_classes_are_among_libsvms_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustfeat.training.evaluation.probes._LIBSVM_ROWS", 5)
    x = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    y = np.array([0] * 198 + [1, 2])
    scores = libsvm(TaskFeatures("t", "m", ("a", "b", "c"), x, y, x, y), cs=[1.0], scalings=["none"])
    assert scores["LIBSVM"].details["rows"] == 7


def test_brightness_darkens_nothing(example_files: list[Path]) -> None:
    with Image.open(example_files[0]) as image:
        square = np.asarray(image.convert("RGB").resize((64, 64)))
    for severity, more in zip(SEVERITIES, (0.05, 0.1, 0.15, 0.2, 0.3), strict=True):
        expected = np.minimum(square.astype(int) + round(255 * more), 255)
        np.testing.assert_array_equal(corrupt(square, "brightness", severity), expected)


def test_drift_of_zero_vectors_is_a_number() -> None:
    zero, some = np.zeros((1, 3), np.float32), np.array([[1, 0, 0]], np.float32)
    before, after = np.concatenate([zero, zero, some]), np.concatenate([zero, some, some])
    assert _drift(after, before).tolist() == [0.0, 1.0, 0.0]


def test_a_task_of_one_class_is_refused(dataset: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        shutil.copytree(dataset / split / "hat", tmp_path / "one" / split / "hat")
    with pytest.raises(DataError, match=r"one=.*3 training images are of one class, 'hat'"):
        open_task("one", str(tmp_path / "one"))


def test_a_task_without_labels_is_refused(tmp_path: Path) -> None:
    rows = [{"bytes": b"", "path": "a.jpg"}] * 3
    parquet.write_table(pa.table({"image": rows}), tmp_path / "train-0.parquet")
    with pytest.raises(DataError, match="label"):
        open_task("bare", str(tmp_path))


def test_an_image_that_cannot_be_read_is_named(model: Path, dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clothes"
    shutil.copytree(dataset, folder)
    bad = next((folder / "train" / "hat").iterdir())
    bad.write_bytes(bad.read_bytes()[:40])
    subject, task = open_subject(str(model)), open_task("clothes", str(folder))
    with pytest.raises(DecodeError, match=rf"{bad.name}: .*repair or remove it"):
        embed_task(subject, task)
    with pytest.raises(DecodeError, match=rf"{bad.name}: .*repair or remove it"):
        classify_corrupted(subject, None, task.train)  # type: ignore[arg-type] # no image gets as far as a head
    bad.unlink()
    with pytest.raises(DecodeError, match=rf"{bad.name}: .*repair or remove it"):
        embed_task(subject, task)


def test_a_file_of_features_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "feats.npy", np.zeros((3, 512), np.float32))
    with pytest.raises(DataError, match="features of another model cannot be compared"):
        open_task("feats", str(tmp_path / "feats.npy"))


def test_what_is_no_model_is_told_what_to_do(model: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "feats.npy", np.zeros((3, 512), np.float32))
    for file in (tmp_path / "feats.npy", model / "model.safetensors"):
        with pytest.raises(InputError, match=rf"is a {file.suffix} file; expected a model folder"):
            open_subject(str(file))
    with pytest.raises(InputError, match="robustfeat import timm:resnet18 --out FOLDER"):
        open_subject("timm:resnet18")


def test_a_model_folder_keeps_its_own_preprocessing(model: Path) -> None:
    with pytest.raises(InputError, match="has its own preprocessing"):
        open_subject(str(model), image_size=32)


@pytest.mark.parametrize("text", ["=data", "name=", " = "])
def test_tasks_have_a_name_and_a_place(text: str) -> None:
    with pytest.raises(InputError, match="expected NAME=DATA"):
        parse_task(text)


def test_a_task_without_a_name_is_called_after_its_data() -> None:
    assert parse_task("data/pets") == ("pets", "data/pets")


@pytest.mark.parametrize("label", ["", "model: train"])
def test_an_error_of_an_embedding_keeps_its_subject(monkeypatch: pytest.MonkeyPatch, label: str) -> None:
    def refuse(*_: object) -> None:
        raise DataError("not finite", argument="image", value="a.jpg", fix="repair it")

    monkeypatch.setattr("robustfeat.training.evaluation.tasks._embed_all", refuse)
    with pytest.raises(DataError) as caught:
        embed_images(None, None, label=label)  # type: ignore[arg-type]
    expected = "model: train: `image=a.jpg`: not finite; repair it" if label else "image=a.jpg: not finite; repair it"
    assert str(caught.value) == expected
