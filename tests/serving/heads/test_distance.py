"""Distances beside the formula with a whole covariance matrix, and what they tell on images of other classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import normalize

from robustfeat.errors import HeadError
from robustfeat.serving.heads import distance
from robustfeat.serving.heads import head as head_module
from robustfeat.serving.heads.distance import fit_distance, measure_distance, measure_typicality
from robustfeat.serving.heads.features import open_features
from robustfeat.serving.heads.fitting.fit import fit_head
from robustfeat.serving.heads.fitting.selection import fold
from robustfeat.serving.heads.head import Head
from robustfeat.serving.heads.labels.matching import match_labels
from robustfeat.serving.heads.labels.reading import read_labels
from tests.conftest import WriteFeatures
from tests.serving.heads.solver.test_newton import blobs


def by_the_formula(x: NDArray[Any], y: NDArray[np.int64], query: NDArray[Any]) -> NDArray[np.float64]:
    unit, wanted = normalize(x), normalize(query)
    means = np.stack([unit[y == group].mean(0) for group in np.unique(y)])
    within = unit - means[y]
    covariance = within.T @ within / len(x)
    size = len(covariance)
    covariance = 0.9 * covariance + 0.1 * np.trace(covariance) / size * np.eye(size)
    inverse = np.linalg.inv(covariance)
    squares = [((wanted - mean) @ inverse * (wanted - mean)).sum(1) for mean in means]
    found: NDArray[np.float64] = np.min(squares, 0)
    return found


@pytest.mark.parametrize(("rows", "size"), [(200, 16), (30, 64), (64, 64)])
def test_distances_are_those_of_the_whole_covariance(rows: int, size: int) -> None:
    """With all directions kept: of fewer rows than features, the directions that they span."""
    x, y = blobs([rows // 2, rows - rows // 2], size, 1.0)
    query = np.random.default_rng(1).normal(size=(20, size))
    arrays = fit_distance(x, np.arange(rows), y, fold(y)[0])
    np.testing.assert_allclose(measure_distance(arrays, query), by_the_formula(x, y, query), rtol=1e-6)


def test_few_directions_keep_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = blobs([300, 300], 64, 1.0)
    x = x * np.geomspace(3, 0.1, 64)
    query = np.random.default_rng(1).normal(size=(200, 64)) * np.geomspace(3, 0.1, 64)
    monkeypatch.setattr(distance, "_DIRECTIONS", 16)
    arrays = fit_distance(x, np.arange(600), y, fold(y)[0])
    assert arrays["distance.basis"].shape == (16, 64)
    found, whole = measure_distance(arrays, query), by_the_formula(x, y, query)
    assert np.corrcoef(found.argsort().argsort(), whole.argsort().argsort())[0, 1] > 0.8


def test_typicality_is_the_share_of_unseen_rows_that_lie_as_far() -> None:
    x, y = blobs([400, 400], 12, 0.5)
    mine, others = x[::2], x[1::2]
    arrays = fit_distance(mine, np.arange(400), y[::2], fold(y[::2])[0])
    shares = measure_typicality(arrays, others)
    for level in (0.05, 0.2, 0.5):
        assert np.mean(shares < level) == pytest.approx(level, abs=0.06)  # three deviations of 400 rows
    unseen = arrays["distance.unseen"]
    one = measure_distance(arrays, others[:1])[0]
    assert shares[0] == (1 + np.count_nonzero(unseen >= one)) / (1 + len(unseen))


def test_rows_are_drawn_from_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distance, "_MOST_ROWS", 50)
    monkeypatch.setattr(distance, "_MOST_UNSEEN", 20)
    x, y = blobs([100, 100], 8, 1.0)
    arrays = fit_distance(x, np.arange(200), y, fold(y)[0])
    assert arrays["distance.unseen"].shape == (20,)
    assert measure_typicality(arrays, x).mean() > 0.2


def fitted(folder: Path, values: NDArray[Any], names: list[str], write_features: WriteFeatures) -> Head:
    features = open_features(str(write_features(folder / "f.npy", values.astype(np.float32), names)))
    return fit_head(features, match_labels(features, read_labels(["folder"])))[0]


def test_a_head_tells_images_of_other_classes(
    digits: Any, tmp_path: Path, write_features: WriteFeatures, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = np.random.default_rng(0).permutation(len(digits[1]))  # a writer's digits stand together
    x, y = digits[0][mixed], digits[1][mixed]
    known = np.flatnonzero(y < 6)
    names = [f"{y[row]}/{row}.png" for row in known[:400]]
    head = fitted(tmp_path, x[known[:400]], names, write_features)
    head.save(tmp_path / "head")
    head = Head.load(tmp_path / "head")
    same, other = head.typicality(x[known[400:]]), head.typicality(x[y >= 6])
    assert head.typicality(x[:0]).shape == (0,)
    monkeypatch.setattr(head_module, "CHUNK_ROWS", 7)
    np.testing.assert_array_equal(head.typicality(x[known[400:]]), same)
    truth = np.repeat([1, 0], [len(same), len(other)])
    assert roc_auc_score(truth, np.concatenate([same, other])) > 0.85
    assert np.mean(same < 0.05) < 0.1
    assert np.mean(other < 0.05) > 5 * np.mean(same < 0.05)
    assert head.to_sklearn().predict(x[:5].astype(np.float64)).tolist() == head.predict(x[:5]).tolist()


def test_heads_without_distances_say_so(tmp_path: Path, write_features: WriteFeatures) -> None:
    head = fitted(tmp_path, np.eye(3, 8), ["a/1.png", "b/1.png", "c/1.png"], write_features)
    assert not head.tells_typicality
    head.save(tmp_path / "head")
    assert '"format_version": 1' in (tmp_path / "head" / "head.json").read_text()
    with pytest.raises(HeadError, match="cannot detect images of other classes"):
        Head.load(tmp_path / "head").typicality(np.eye(3, 8))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("distance.floor", np.array([0.0])),
        ("distance.unseen", np.array([2.0, 1.0])),
        ("distance.unseen", np.empty(0)),
        ("distance.means", np.empty((0, 8))),
        ("distance.means", np.zeros((3, 8))),
        ("distance.basis", np.zeros((2, 7))),
        ("distance.inverses", np.zeros(1)),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    name: str, value: NDArray[Any], tmp_path: Path, write_features: WriteFeatures
) -> None:
    x, y = blobs([10, 10], 8, 0.5)
    head = fitted(tmp_path, x, [f"{label}/{row}.png" for row, label in enumerate(y)], write_features)
    with pytest.raises(ValueError, match=r"must|distances"):
        Head(head.kind, head.classes, head.scaling, {**head.arrays, name: value})
    with pytest.raises(ValueError, match="has \\["):
        Head(head.kind, head.classes, head.scaling, {key: v for key, v in head.arrays.items() if key != name})


def test_no_more_directions_than_features(tmp_path: Path, write_features: WriteFeatures) -> None:
    x, y = blobs([10, 10], 8, 0.5)
    head = fitted(tmp_path, x, [f"{label}/{row}.png" for row, label in enumerate(y)], write_features)
    many = {"distance.basis": np.zeros((9, 8)), "distance.inverses": np.zeros(9)}
    with pytest.raises(ValueError, match="at most 2 means and 8 directions; got 2 and 9"):
        Head(head.kind, head.classes, head.scaling, {**head.arrays, **many})
