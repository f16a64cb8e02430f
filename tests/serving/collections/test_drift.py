"""Drift between collections: the test, typicality, shares and accuracy, against simulations and other libraries."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from scipy.stats import kstest
from sklearn.neighbors import NearestNeighbors

from robustfeat import Head, InputError
from robustfeat.serving.collections import drift as drifts
from robustfeat.serving.collections.drift import Reference, measure_drift
from robustfeat.serving.collections.drift_report import headline, remarks, to_csv, to_dict, to_jsonl
from robustfeat.serving.collections.two_sample import compare_samples, energy_distance
from robustfeat.serving.heads.accuracy import estimate_accuracy
from tests.serving.collections.conftest import FeaturesOf

Array = NDArray[np.float64]


def normal(rows: int, seed: int, shift: float = 0.0, size: int = 8) -> Array:
    return np.random.default_rng(seed).normal(shift, 1.0, (rows, size))


def test_the_distance_is_the_energy_distance_of_all_pairs() -> None:
    x, y = normal(30, 0), normal(20, 1, 0.5)
    between = 2 * cdist(x, y).mean()
    within = cdist(x, x).sum() / (30 * 29) + cdist(y, y).sum() / (20 * 19)
    assert compare_samples(x, y).distance == pytest.approx((between - within) / between)


def test_weights_count_as_repeated_rows_do() -> None:
    x, y = normal(5, 0), normal(20, 1, 0.5)
    many = np.repeat(x, [400, 800, 400, 400, 0], axis=0)
    weights = np.array([1.0, 2.0, 1.0, 1.0, 0.0])
    between = 2 * cdist(many, y).mean()
    own = weights / weights.sum()
    within = own @ cdist(x, x) @ own / (1 - (own**2).sum()) + cdist(y, y).sum() / (20 * 19)
    assert energy_distance(x, y, weights) == pytest.approx((between - within) / between)


def test_p_is_uniform_without_a_shift() -> None:
    found = [
        compare_samples(normal(12, seed), normal(15, seed + 10_000), permutations=99, seed=seed).p
        for seed in range(400)
    ]
    # p takes the values 0.01 to 1; noise within these steps makes it continuous.
    steps = np.random.default_rng(0).uniform(0, 0.01, len(found))
    assert kstest(np.array(found) - steps, "uniform").pvalue > 0.01
    assert np.mean(np.array(found) <= 0.05) < 0.09


def test_p_counts_the_divisions_that_lie_as_far_apart() -> None:
    """All 20 divisions of six rows, by hand."""
    x, y = normal(3, 0, 1.5, 1), normal(3, 1, 0.0, 1)
    pooled = np.concatenate([x, y])
    away = cdist(pooled, pooled)

    def energy(mine: tuple[int, ...]) -> float:
        weights = np.array([1 / 3 if row in mine else -1 / 3 for row in range(6)])
        return float(-weights @ away @ weights)

    divisions = [(a, b, c) for a in range(6) for b in range(a + 1, 6) for c in range(b + 1, 6)]
    exact = np.mean([energy(one) >= energy((0, 1, 2)) - 1e-9 for one in divisions])
    assert compare_samples(x, y, permutations=9999).p == pytest.approx(exact, abs=0.02)


def test_p_is_small_after_a_shift_and_never_zero() -> None:
    assert compare_samples(normal(200, 0), normal(200, 1, 0.5), permutations=199).p == 1 / 200
    assert compare_samples(np.ones((5, 3)), np.ones((6, 3))).p == 1


def test_distances_to_the_tenth_neighbour_are_those_of_scikit_learn() -> None:
    sample, values = normal(100, 0), normal(50, 1, 1.0)
    unit, other = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (sample, values))
    index = NearestNeighbors(n_neighbors=10).fit(unit)
    expected, own = index.kneighbors(other)[0][:, -1], index.kneighbors()[0][:, -1]
    reference = Reference(sample)
    np.testing.assert_allclose(reference.distances(values), expected, atol=1e-7)
    by_hand = [(1 + (own >= one).sum()) / 101 for one in expected]
    np.testing.assert_allclose(reference.typicality(reference.distances(values)), by_hand)


def test_accuracy_is_estimated_by_the_best_assignment() -> None:
    """Of four images that a head all takes for one class, half are right if the classes are even."""
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
    assert estimate_accuracy(probabilities, np.array([0.5, 0.5])) == pytest.approx((0.9 + 0.8 + 0.3 + 0.4) / 4)
    assert estimate_accuracy(probabilities, np.array([1.0, 0.0])) == pytest.approx(0.75)
    # Shares that are no whole numbers of images: the class that lacks more gets the image.
    assert estimate_accuracy(probabilities[:3], np.array([0.55, 0.45])) == pytest.approx((0.9 + 0.8 + 0.3) / 3)


def clouds(shares: list[float], rows: int, seed: int) -> tuple[Array, NDArray[np.int64]]:
    """Three overlapping clouds of points and which each is from."""
    draw = np.random.default_rng(seed)
    labels = draw.choice(3, rows, p=shares)
    return 3 + 1.5 * np.eye(3)[labels] + draw.normal(0, 0.7, (rows, 3)), labels


@pytest.fixture(scope="module")
def head() -> Head:
    """A classifier that knows the clouds: its probabilities are the true ones."""
    means = 3 + 1.5 * np.eye(3)
    coefficients = means / 0.49
    intercepts = -0.5 * (means**2).sum(1) / 0.49
    arrays = {"coefficients": coefficients, "intercepts": intercepts}
    arrays |= {"calibration.scale": np.ones(3), "calibration.offset": np.zeros(3)}
    return Head(kind="logistic", classes=("a", "b", "c"), scaling="none", arrays=arrays)


EVEN = [1 / 3] * 3


@pytest.mark.parametrize("shares", [EVEN, [0.7, 0.2, 0.1]])
def test_shares_and_accuracy_are_close_to_the_truth(head: Head, features_of: FeaturesOf, shares: list[float]) -> None:
    (x, _), (y, labels) = clouds(EVEN, 1500, 0), clouds(shares, 1200, 1)
    answers = measure_drift(features_of(x), features_of(y), head).answers
    assert answers is not None
    np.testing.assert_allclose(answers.new_shares, np.bincount(labels) / len(y), atol=0.05)
    assert answers.moved == pytest.approx(np.abs(np.array(shares) - EVEN).sum() / 2, abs=0.06)
    assert shares == EVEN or answers.explained > 0.9
    accuracy = (head.predict(y) == np.array(["a", "b", "c"])[labels]).mean()
    assert answers.new_accuracy == pytest.approx(accuracy, abs=0.05)


def test_a_head_that_no_longer_sees_a_class_is_not_believed(head: Head, features_of: FeaturesOf) -> None:
    (x, _), (y, labels) = clouds(EVEN, 800, 0), clouds(EVEN, 800, 1)
    y[:, 0] -= 2.0
    answers = measure_drift(features_of(x), features_of(y), head).answers
    assert answers is not None
    accuracy = (head.predict(y) == np.array(["a", "b", "c"])[labels]).mean()
    confidence = head.probabilities(y).max(1).mean()
    assert abs(answers.new_accuracy - accuracy) < abs(confidence - accuracy) / 2


def test_a_shift_of_the_images_is_not_explained_by_shares(head: Head, features_of: FeaturesOf) -> None:
    x, y = clouds(EVEN, 800, 0)[0], clouds(EVEN, 800, 1)[0]
    y[:, 0] -= 2.0
    found = measure_drift(features_of(x), features_of(y), head)
    assert found.comparison.p == 0.001
    assert found.answers is not None
    assert found.answers.explained < 0.5


def test_no_shift_is_found_where_there_is_none(head: Head, features_of: FeaturesOf) -> None:
    found = measure_drift(features_of(clouds(EVEN, 700, 0)[0]), features_of(clouds(EVEN, 600, 1)[0]), head)
    assert found.comparison.p > 0.01
    assert (found.typicality < 0.05).mean() == pytest.approx(0.05, abs=0.03)
    assert list(found.typicality) == sorted(found.typicality)


def test_large_collections_are_drawn_from_and_failed_rows_left_out(
    monkeypatch: pytest.MonkeyPatch, features_of: FeaturesOf
) -> None:
    monkeypatch.setattr(drifts, "MOST_MEASURED", 60)
    x, y = normal(100, 0), normal(90, 1)
    x[3], y[5] = np.nan, np.nan
    found = measure_drift(features_of(x, (3,)), features_of(y, (5,)), sample=40, permutations=19)
    assert found.comparison.rows == (40, 40)
    assert len(found.rows) == 60
    assert 5 not in found.rows
    lines = list(remarks(found, features_of(x, (3,)), features_of(y, (5,))))
    assert lines[0].startswith("compared 40 of the 99 images, drawn at random, of feats.npy with 40 of the 89 images")
    assert lines[1] == "typicality of 60 of the 89 images, drawn at random, of feats.npy"


def test_bad_inputs_are_refused(head: Head, features_of: FeaturesOf) -> None:
    x = normal(20, 0, size=3)
    with pytest.raises(InputError, match="expected two images or more that did not fail; got 1"):
        measure_drift(features_of(x), features_of(x[:2], (0,)))
    with pytest.raises(InputError, match=r"expected the 3 features of feats\.npy; got 2"):
        measure_drift(features_of(x), features_of(x[:, :2]))
    with pytest.raises(InputError, match="takes 3 features"):
        measure_drift(features_of(x[:, :2]), features_of(x[:, :2]), head)
    broken = x.copy()
    broken[7] = np.inf
    with pytest.raises(InputError, match=r"row 7 \(7\.jpg\) is not finite"):
        measure_drift(features_of(x), features_of(broken))
    with pytest.raises(ValueError, match="two rows or more; got 1 and 20"):
        compare_samples(x[:1], x)


def test_reports_agree(head: Head, features_of: FeaturesOf) -> None:
    x, y = clouds(EVEN, 100, 0)[0], clouds(EVEN, 80, 1)[0]
    y[:, 0] -= 2.0
    reference, new = features_of(x), features_of(y)
    found = measure_drift(reference, new, head, permutations=199)
    content = to_dict(found, reference, new, 0.01)
    assert (content["shift"], content["p"], content["compared"]) == (True, 0.005, {"reference": 100, "new": 80})
    rows = list(csv.DictReader(io.StringIO("".join(to_csv(found, new)))))
    objects = [json.loads(line) for line in to_jsonl(found, new)]
    assert [row["path"] for row in rows] == [one["path"] for one in objects] == [f"{row}.jpg" for row in found.rows]
    assert content["least_typical"] == objects[:10]
    assert sum(content["shares"]["new"].values()) == pytest.approx(1)
    line = headline(found, 0.01)
    assert line.startswith("shift: p 0.005, distance 0.")
    assert line.endswith("% on the reference")
    assert headline(found, 0.001).startswith("no shift found: p 0.005")
