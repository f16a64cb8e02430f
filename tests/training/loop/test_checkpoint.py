"""What a checkpoint may hold: damage and odd fields are refused in one line, and it never chooses code."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from robustfeat.errors import CheckpointError, InputError, TrainingError
from robustfeat.files import FileLock
from robustfeat.training.export.backbones import import_backbone
from robustfeat.training.loop.checkpoint import load_checkpoint, network_of, save_checkpoint
from robustfeat.training.loop.trainer import train
from robustfeat.training.tensors import load_tensors
from tests.conftest import Run
from tests.training.small import recipe


@pytest.fixture
def run(narrow_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(narrow_run, tmp_path / "run"))


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def test_one_flipped_bit_in_a_weight_is_found(run: Path) -> None:
    file = run / "checkpoint.pt"
    with zipfile.ZipFile(file) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    flip(file, largest.header_offset + 200 + largest.file_size // 2)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: damaged"):
        load_checkpoint(run)


def test_one_flipped_bit_in_given_weights_is_found(tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    torch.save({"a": torch.arange(1000.0)}, file)
    assert load_tensors(file)["a"][-1] == 999
    flip(file, file.read_bytes().index(torch.arange(500.0, 501.0).numpy().tobytes()))
    with pytest.raises(InputError, match="damaged, or not a file of tensors alone"):
        import_backbone("timm:resnet18", tmp_path / "out", weights=file)


def repacked(file: Path, compression: int, times: int = 1) -> None:
    """The same entries in another archive: compressed, or listed several times."""
    with zipfile.ZipFile(file) as archive:
        contents = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
        archive.filelist *= times


@pytest.mark.parametrize(("compression", "times"), [(zipfile.ZIP_DEFLATED, 1), (zipfile.ZIP_STORED, 3)])
def test_entries_that_claim_more_than_the_file_has_are_refused(tmp_path: Path, compression: int, times: int) -> None:
    file = tmp_path / "weights.pt"
    torch.save({"a": torch.zeros(100_000)}, file)
    repacked(file, zipfile.ZIP_STORED)
    assert len(load_tensors(file)["a"]) == 100_000
    repacked(file, compression, times)
    with pytest.raises(ValueError, match="its entries claim more bytes than it has"):
        load_tensors(file)


def test_tensors_larger_than_what_is_stored_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    for held in ({"a": torch.zeros(1).expand(10**9)}, {"a": [(torch.zeros(9).as_strided((5, 5), (1, 1)),)]}):
        torch.save(held, file)
        assert file.stat().st_size < 10_000
        with pytest.raises(ValueError, match="larger than what is stored of it"):
            load_tensors(file)
    torch.save({"a": torch.zeros(9)[2:5], "b": torch.zeros(2, 3).T}, file)
    assert set(load_tensors(file)) == {"a", "b"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("recipe", []),
        ("recipe", {1: 2}),
        ("data", {}),
        ("data", {"root": 1, "fingerprint": "x", "images": 1}),
        ("classes", "abc"),
        ("classes", [1, 2]),
        ("concepts", None),
        ("concept_of_class", [0, -1, 1]),
        ("concept_of_class", [0]),
        ("epoch", "1"),
        ("epoch", True),
        ("step", -1),
        ("global_step", 1.5),
        ("model", 7),
        ("optimizer", []),
        ("objective", None),
        ("bad_images", 0),
        ("best", {"x": 1}),
    ],
)
def test_a_field_of_another_kind_is_named(run: Path, field: str, value: Any) -> None:
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    torch.save(state | {field: value}, run / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=rf"checkpoint\.pt: damaged \((.* )?{field}"):
        load_checkpoint(run)


@pytest.mark.parametrize("field", ["model", "optimizer", "objective"])
def test_state_that_does_not_fit_is_one_line(run: Path, dataset: Path, field: str) -> None:
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    torch.save(state | {field: {"x": 1}}, run / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="state does not fit"):
        train(dataset, recipe(dataset), run, resume=True, workers=0, threads=1, quiet=True)
    if field == "model":
        with pytest.raises(CheckpointError, match="state does not fit"):
            network_of(load_checkpoint(run))


@pytest.mark.parametrize("resume", [True, False])
def test_two_processes_do_not_train_in_one_folder(run: Path, dataset: Path, tmp_path: Path, resume: bool) -> None:
    out = run if resume else tmp_path / "new"
    out.mkdir(exist_ok=True)
    lock = FileLock(out)
    assert lock.take()
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    with pytest.raises(InputError, match=r"another process is training there"):
        train(dataset, recipe(dataset), out, resume=resume, workers=0, threads=1, quiet=True)
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == before
    lock.release()
    if resume:
        train(dataset, recipe(dataset), out, resume=True, workers=0, threads=1, quiet=True)
        assert lock.take()  # freed at the end


@pytest.mark.parametrize("source", ["checkpoint", "config"])
def test_a_file_does_not_choose_code(
    run: Path, dataset: Path, tmp_path: Path, robustfeat: Run, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is its module, or a package above it, imported to look for it."""
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "__init__.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    state["recipe"]["method"] = "evil.module:Evil"
    torch.save(state, run / "checkpoint.pt")
    (tmp_path / "own.toml").write_text('method = "evil.module:Evil"')
    arguments = (
        ["--out", run, "--resume"]
        if source == "checkpoint"
        else ["--out", tmp_path / "new", "--config", tmp_path / "own.toml"]
    )
    result = robustfeat("train", dataset, *arguments)
    assert result.returncode == 1
    assert "its recipe names code outside robustfeat, method = 'evil.module:Evil'" in result.stderr
    assert "add --method evil.module:Evil if you trust that code" in result.stderr
    assert not (tmp_path / "pwned").exists()


def test_a_full_disk_at_a_checkpoint_says_how_to_resume(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = load_checkpoint(run)

    def refuse(*_: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed\nmore")

    monkeypatch.setattr("torch.save", refuse)
    with pytest.raises(InputError, match=r"cannot be written .*; free space, then pass `resume=True`"):
        save_checkpoint(saved, run)
    assert load_checkpoint(run) is not None


def test_a_decoding_process_that_dies_while_a_checkpoint_is_written_is_no_full_disk(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = load_checkpoint(run)

    def refuse(*_: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    monkeypatch.setattr("torch.save", refuse)
    with pytest.raises(TrainingError, match="a process that decodes images died"):
        save_checkpoint(saved, run)
