"""The golden check: what each way to run a model reaches here, and how fast it is."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from robustfeat import FeatureExtractor
from robustfeat.errors import EngineError
from robustfeat.hub.catalog import builtin_model
from robustfeat.hub.folder import ModelFolder
from robustfeat.serving import verify
from robustfeat.serving.engines.options import RunOptions
from robustfeat.serving.verify import Check, check_golden, check_ways, compare, ways_to_run


def test_every_way_of_this_machine_is_checked_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_MEASURE_S", 0.01)
    folder = builtin_model()
    checks = list(check_ways(partial(FeatureExtractor.open, folder), ways_to_run(folder, "fp16"), timed=True))
    assert [(check.engine, check.precision) for check in checks] == [
        ("onnxruntime", "fp32"),
        ("onnxruntime", "fp16"),
        ("onnxruntime", "int8"),
        ("openvino", "fp32"),
        ("openvino", "fp16"),
        ("openvino", "bf16"),
        ("openvino", "int8"),
    ]
    for check in checks:
        if check.reason is None:
            assert check.cosine is not None
            assert check.cosine >= check.needed
            assert check.images_per_s is not None
            assert check.images_per_s > 0
            assert str(check).endswith(" images/s")
        else:
            assert check.precision in {"fp16", "bf16"}


def test_a_folder_without_int8_is_not_asked_for_it(small_fp32: Path) -> None:
    assert {options.precision for options in ways_to_run(ModelFolder(small_fp32))} == {"fp32", "bf16"}


def test_a_way_that_cannot_run_says_why() -> None:
    def refuse(options: RunOptions) -> FeatureExtractor:
        raise EngineError("it is not installed", fix="install it")

    (check,) = check_ways(refuse, [RunOptions(engine="openvino")])
    assert (check.cosine, check.short, check.reason) == (None, False, "it is not installed; install it")
    assert str(check) == "openvino    fp32  not run: it is not installed; install it"


def test_a_reason_names_no_parameters_to_pass() -> None:
    def refuse(options: RunOptions) -> FeatureExtractor:
        raise EngineError("cannot do it", argument="device", value="cpu", fix="pass `precision=fp32`")

    (check,) = check_ways(refuse, [RunOptions(engine="openvino")])
    assert check.reason == "device=cpu: cannot do it"


def test_a_check_without_a_clock_has_no_speed() -> None:
    check = check_golden(FeatureExtractor.from_pretrained(threads=1))
    assert check.images_per_s is None
    assert "images/s" not in str(check)


@pytest.mark.parametrize(
    ("precision", "decoding", "needed"),
    [("fp32", "exact", 0.9999), ("fp32", "scaled", 0.99), ("bf16", "exact", 0.99), ("int8", "scaled", 0.99)],
)
def test_what_is_needed_follows_from_the_precision_and_the_decoding(
    precision: str, decoding: str, needed: float
) -> None:
    right, off = np.array([[1.0, 0.0]]), np.array([[1.0, 0.1]])  # cosine 0.99504
    check = compare(off, right, engine="onnxruntime", precision=precision, decoding=decoding)
    assert check.needed == needed
    assert check.short == (needed > 0.999)


def test_features_that_are_not_numbers_fall_short() -> None:
    assert compare(np.array([[np.nan, 1.0]]), np.array([[1.0, 1.0]]), engine="onnxruntime").short
    assert not Check("pytorch", "fp32", None, 0.9999, "not installed").short
