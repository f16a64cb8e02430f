"""The public names: lazy, complete, and one call for bulk work."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import robustfeat
from robustfeat import EmbeddingResult, FeatureExtractor, InputError, errors


def test_importing_the_package_loads_no_library() -> None:
    code = "import sys, robustfeat; robustfeat.InputError; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"numpy", "PIL", "sklearn", "onnxruntime", "click"} & set(done.stdout.split())


def test_all_names_are_there() -> None:
    assert dir(robustfeat) == sorted(robustfeat.__all__)
    assert {name for name in errors.__all__ if name.endswith("Error")} < set(robustfeat.__all__)
    for name in robustfeat.__all__:
        assert getattr(robustfeat, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = robustfeat.nothing


def test_old_places_of_names_still_work() -> None:
    from robustfeat import serving

    assert dir(serving) == ["FeatureExtractor", "Head", "ImageFeatures"]
    for name in dir(serving):
        assert getattr(serving, name) is getattr(robustfeat, name)


def test_embed_writes_what_the_extractor_gives(example_files: list[Path], tmp_path: Path) -> None:
    files, out = example_files[:3], tmp_path / "feats.npy"
    result: EmbeddingResult = robustfeat.embed(files[:2], out, threads=1, workers=1, batch_size=2, quiet=True)
    assert (result.images, result.feature_size, result.failed) == (2, 512, 0)
    more = robustfeat.embed(files, out, threads=1, workers=1, batch_size=2, append=True, quiet=True)
    assert (more.images, more.known) == (3, 2)
    np.testing.assert_allclose(np.load(out), FeatureExtractor.from_pretrained(threads=1).embed(files), atol=1e-5)


def test_embed_is_quiet_and_may_stop_at_a_failure_and_load_tells_it(
    tmp_path: Path, example_files: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"junk")
    out = str(tmp_path / "feats.parquet")
    with pytest.raises(InputError, match=r"bad\.jpg"):
        robustfeat.embed(bad, out, workers=1, on_error="stop", quiet=True)
    assert robustfeat.embed([bad, example_files[0]], out, workers=1, restart=True, quiet=True).failed == 1
    features = robustfeat.load(Path(out))
    assert [Path(path).name for path in features.paths] == ["bad.jpg", example_files[0].name]
    assert features.good.tolist() == [False, True]
    assert list(features.errors) == [0]
    assert np.isfinite(features.values[features.good]).all()
    assert features.model is not None
    with pytest.raises(InputError, match=r"nowhere\.npy"):
        robustfeat.load(tmp_path / "nowhere.npy")
    assert capfd.readouterr().err == ""


def test_a_wrong_name_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\.npy"):
        robustfeat.embed(tmp_path, tmp_path / "feats.xyz", model="no/such-model")


def test_embed_refuses_no_inputs_and_unknown_answers_to_errors_before_it_loads_a_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="inputs: got none") as caught:
        robustfeat.embed([], tmp_path / "feats.npy", model="nosuch")
    assert caught.value.argument == "inputs"
    with pytest.raises(ValueError, match="on_error must be nan or stop"):
        robustfeat.embed(tmp_path, tmp_path / "feats.npy", model="nosuch", on_error="skip")


def test_the_old_place_of_embed_files_warns_and_works() -> None:
    with pytest.warns(DeprecationWarning, match=r"use robustfeat\.embed"):
        old = importlib.import_module("robustfeat.serving.embedding")
    assert old.embed_files is importlib.import_module("robustfeat.serving.bulk.embedding").embed_files
