"""What may be missing where robustfeat runs: a home folder, standard streams, pyarrow."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from robustfeat.doctor import examine
from robustfeat.errors import HubError, InputError
from robustfeat.hub.catalog import cached_models
from robustfeat.hub.remote import HubAccess
from robustfeat.progress import Progress, remark
from robustfeat.serving.bulk.job import Places
from robustfeat.serving.extractor import FeatureExtractor
from robustfeat.system import python_command


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a user id that no account has, and without HOME."""
    from huggingface_hub import constants

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    place = "~/.cache/huggingface/hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", place)


@pytest.mark.usefixtures("no_home")
def test_without_a_home_folder_nothing_is_cached_and_doctor_says_what_to_set() -> None:
    with pytest.raises(RuntimeError):
        Path("~").expanduser()
    assert list(cached_models()) == []
    (finding,) = examine(only={"cache"})
    assert (finding.status, finding.fix) == ("note", "set HF_HOME to a writable folder")
    assert "no home folder" in finding.found
    with pytest.raises(HubError, match="no home folder; set HF_HOME"), HubAccess().explaining("a/b"):
        Path("~").expanduser()


def test_commands_work_whatever_streams_are_closed(tmp_path: Path) -> None:
    """What is opened next must not get the number of a closed stream: what is printed would be written into it."""
    code = (
        "import os, sys; sys.argv[:] = ['robustfeat', 'models']\n"
        "from robustfeat.cli import main\n"
        "try: main()\n"
        f"finally:\n    file = open({str(tmp_path / 'number')!r}, 'w'); file.write(str(file.fileno()))\n"
    )
    for closed in ("<&-", ">&-", "2>&-", "<&- >&- 2>&-"):
        done = subprocess.run(["bash", "-c", f'"$@" {closed}', "x", *python_command(code)], check=False)
        assert done.returncode == 0
        assert int((tmp_path / "number").read_text()) > 2


def test_progress_without_stderr_is_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    progress = Progress("x", 2)
    progress.advance(1)
    progress.say("x")
    progress.finish()
    remark("x")
    assert capsys.readouterr().out == ""


def test_parquet_without_pyarrow_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^out=f\.parquet: needs pyarrow; pip install 'robustfeat\[parquet\]'"):
        Places.of("f.parquet")


def test_an_extractor_is_pickled_as_where_its_model_lies_and_how_it_is_run(
    model: Path, example_files: list[Path]
) -> None:
    extractor = FeatureExtractor.from_pretrained(model, threads=1, decoding="scaled")
    data = pickle.dumps(extractor)
    assert len(data) < 4096
    again = pickle.loads(data)
    assert again.options == replace(extractor.options, config_hash=extractor.folder.config_hash)
    assert np.array_equal(again.embed(example_files[:2]), extractor.embed(example_files[:2]))


def test_a_pickled_extractor_holds_no_token(model: Path) -> None:
    extractor = FeatureExtractor.from_pretrained(model, threads=1)
    extractor.folder.access = HubAccess(token="hf_secret", endpoint="https://hub")
    assert b"hf_secret" not in pickle.dumps(extractor)
