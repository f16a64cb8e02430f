"""The hint that another engine or precision would be faster here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from robustfeat import FeatureExtractor
from robustfeat.serving import speeds
from robustfeat.serving.extractor import cosine
from robustfeat.serving.speeds import Speed, fastest_way, measure_speeds


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    return FeatureExtractor.from_pretrained(threads=2, streams=2)


def test_every_way_that_is_installed_is_measured(extractor: FeatureExtractor) -> None:
    found = {(speed.engine, speed.precision): speed for speed in measure_speeds(extractor)}
    exact = {("onnxruntime", "fp32"), ("openvino", "fp32")}
    assert found.keys() >= exact | {("onnxruntime", "int8"), ("openvino", "int8")}
    assert found.keys() <= exact | {("onnxruntime", "int8"), ("openvino", "int8"), ("openvino", "bf16")}
    images, expected = extractor.folder.golden()
    for (engine, precision), speed in found.items():
        assert speed.images_per_s > 0
        other = FeatureExtractor.from_pretrained(engine=engine, precision=precision)
        assert speed.cosine == pytest.approx(cosine(other.embed(images), expected).min(), abs=1e-4)


def test_the_best_way_that_is_exact_enough_is_named_once_measured(
    extractor: FeatureExtractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ways = [
        Speed("onnxruntime", "fp32", 100.0, 1.0),
        Speed("openvino", "int8", 400.0, 0.98),
        Speed("onnxruntime", "int8", 300.0, 0.999),
    ]
    monkeypatch.setattr(speeds, "measure_speeds", lambda _: ways)
    assert fastest_way(extractor) == (ways[2], 3.0)
    monkeypatch.setattr(speeds, "measure_speeds", lambda _: pytest.fail("measured again"))
    assert fastest_way(extractor) == (ways[2], 3.0)
    (file,) = (tmp_path / "robustfeat").iterdir()
    file.write_text("junk")
    monkeypatch.setattr(speeds, "measure_speeds", lambda _: [ways[0], Speed("openvino", "fp32", 110.0, 1.0)])
    assert fastest_way(extractor) is None  # a tenth is not worth a line


def test_a_cache_that_cannot_be_written_is_no_error(
    extractor: FeatureExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    monkeypatch.setattr(speeds, "measure_speeds", lambda _: [])
    assert fastest_way(extractor) is None


def test_embed_says_it_in_one_line(
    robustfeat: Callable[..., CompletedProcess[str]], examples: Path, tmp_path: Path
) -> None:
    def say(*options: Any) -> list[str]:
        result = robustfeat("embed", examples / "hat", "--out", tmp_path / "feats.npy", *options)
        assert result.returncode == 0
        return [line for line in result.stderr.splitlines() if line.startswith("faster here: ")]

    (line,) = say()
    assert " x as fast, at cosine 0.99" in line
    assert say("--quiet") == []
