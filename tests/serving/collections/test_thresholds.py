"""The threshold that duplicates have where nobody says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import robustfeat
from robustfeat.serving.collections.thresholds import default_threshold
from tests.conftest import WriteFeatures
from tests.serving.collections.conftest import FeaturesOf


@pytest.mark.parametrize("offset", [0.0, 1.0, 5.0])
def test_other_models_go_by_the_mean_cosine_of_their_rows(offset: float, features_of: FeaturesOf) -> None:
    values = (np.random.default_rng(0).standard_normal((3000, 64)) + offset).astype(np.float32)
    units = values / np.linalg.norm(values, axis=1, keepdims=True)
    usual = float(np.mean((units @ units.T)[np.triu_indices(3000, 1)]))
    threshold, why = default_threshold(features_of(values))
    assert threshold == pytest.approx(1 - 0.07 * (1 - usual), abs=2e-4)
    assert float(why.rpartition(" ")[2]) == pytest.approx(usual, abs=2e-3)


def test_failed_rows_do_not_count(features_of: FeaturesOf) -> None:
    values = np.ones((4, 3), np.float32)
    values[1] = np.nan
    assert default_threshold(features_of(values, (1,)))[0] == 1.0
    assert default_threshold(features_of(values[1:2], (0,))) == (1.0, "no rows")


def test_a_measured_model_has_its_threshold(write_features: WriteFeatures, tmp_path: Path) -> None:
    write_features(tmp_path / "feats.npy", np.ones((2, 512), np.float32), ["a", "b"])
    features = robustfeat.load(tmp_path / "feats.npy")
    assert features.model is not None
    measured = replace(features, model=replace(features.model, name="robustfeat-resnet18-tiny-v1"))
    assert default_threshold(measured) == (0.95, "measured for robustfeat-resnet18-tiny-v1")
