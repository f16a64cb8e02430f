"""Layouts, clusters and colours: near in the features is near on the map, and the same input gives the same map."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from robustfeat.palette import CATEGORIES
from robustfeat.serving.heads.features import Features, open_features
from robustfeat.serving.maps import layout
from robustfeat.serving.maps.clusters import find_clusters
from robustfeat.serving.maps.colourings import categories_of, category_colours, name_places
from robustfeat.serving.maps.layout import lay_out, to_unit_square
from robustfeat.serving.maps.reduction import reduce_features
from tests.conftest import WriteFeatures


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory, write_features: WriteFeatures) -> tuple[Features, np.ndarray]:
    values, labels = load_digits(return_X_y=True)
    paths = [f"{row:04}.png" for row in range(600)]
    place = write_features(tmp_path_factory.mktemp("digits") / "feats.npy", values[:600].astype(np.float32), paths)
    return open_features(str(place)), labels[:600]


@pytest.fixture(params=["openTSNE", "scikit-learn"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "scikit-learn":
        monkeypatch.setattr(layout, "has_opentsne", lambda: False)
    else:
        pytest.importorskip("openTSNE")
    return str(request.param)


def test_reduced_features_are_the_principal_components_of_unit_rows(digits: tuple[Features, np.ndarray]) -> None:
    features, _ = digits
    rows = np.arange(0, 600, 3)
    units = features.values[rows] / np.linalg.norm(features.values[rows], axis=1, keepdims=True)
    wanted = PCA(50).fit_transform(units.astype(np.float64))
    found = reduce_features(features, rows)
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.abs(found), np.abs(wanted), atol=1e-5)


def test_neighbours_stay_neighbours_and_the_seed_decides(digits: tuple[Features, np.ndarray], library: str) -> None:
    features, labels = digits
    reduced = reduce_features(features, np.arange(600))
    places = lay_out(reduced, seed=1, quiet=True)
    assert places.shape == (600, 2)
    assert places.min() >= 0
    assert places.max() <= 1
    assert np.ptp(places, 0).max() == pytest.approx(1)
    # Class of a digit by its neighbours on the map, as scikit-learn measures it: 0.93 or more by t-SNE, 0.6 by PCA.
    assert KNeighborsClassifier(5).fit(places[::2], labels[::2]).score(places[1::2], labels[1::2]) > 0.88
    _, before = NearestNeighbors(n_neighbors=6).fit(reduced).kneighbors()
    _, after = NearestNeighbors(n_neighbors=6).fit(places).kneighbors()
    kept = np.mean([len(set(one) & set(other)) / 6 for one, other in zip(before, after, strict=True)])
    assert kept > 0.45, library
    np.testing.assert_array_equal(places, lay_out(reduced, seed=1, quiet=True))


@pytest.mark.parametrize("count", [1, 2, 3, 9, 10, 12])
def test_few_rows_have_places(count: int, library: str) -> None:
    reduced = np.random.default_rng(0).normal(size=(count, min(count, 4))).astype(np.float32)
    places = lay_out(reduced, quiet=True)
    assert places.shape == (count, 2)
    assert np.isfinite(places).all()


def test_equal_rows_have_places(library: str) -> None:
    places = lay_out(np.ones((40, 5), np.float32), quiet=True)
    assert np.isfinite(places).all()
    assert places.min() >= 0
    assert places.max() <= 1


def test_places_keep_their_proportions_in_the_unit_square() -> None:
    places = to_unit_square([[10, 20], [14, 22], [12, 21]])
    np.testing.assert_allclose(places, [[0, 0.25], [1, 0.75], [0.5, 0.5]])


def test_clusters_are_found_and_numbered_by_size() -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(6, 8)) * 20
    sizes = (100, 90, 80, 70, 60, 50)
    rows = np.concatenate([centres[at] + rng.normal(size=(size, 8)) for at, size in enumerate(sizes)]).astype(
        np.float32
    )
    found = find_clusters(rows, None)
    assert np.bincount(found).tolist() == list(sizes)
    assert [len(np.unique(part)) for part in np.split(found, np.cumsum(sizes)[:-1])] == [1] * 6
    np.testing.assert_array_equal(found, find_clusters(rows, None))
    assert len(np.unique(find_clusters(rows, 3))) == 3
    assert find_clusters(np.zeros((5, 2), np.float32), None).tolist() == [0] * 5
    assert find_clusters(np.zeros((5, 2), np.float32), 3).tolist() == [0] * 5


def test_categories_beside_each_other_have_different_colours_though_there_are_many() -> None:
    side = 6
    count = side * side
    rng = np.random.default_rng(0)
    values = np.repeat(np.arange(count, dtype=np.int32), 30)
    middles = np.stack([values % side, values // side], 1)
    places = ((middles + rng.uniform(0.05, 0.95, (len(values), 2))) / side).astype(np.float32)
    colours = category_colours(values, count, places)
    beside = [(at, at + 1) for at in range(count) if at % side < side - 1]
    beside += [(at, at + side) for at in range(count - side)]
    assert [pair for pair in beside if colours[pair[0]] == colours[pair[1]]] == []
    assert set(colours) == set(range(len(CATEGORIES.light)))
    assert category_colours(np.array([-1, -1], np.int32), 0, places[:2]) == []


def test_a_name_lies_where_its_points_are_densest() -> None:
    rng = np.random.default_rng(0)
    dense, loose = rng.normal((0.2, 0.8), 0.01, (80, 2)), rng.uniform(0.4, 1, (40, 2))
    places = np.concatenate([dense, loose, rng.normal((0.9, 0.1), 0.01, (50, 2))]).astype(np.float32)
    values = np.array([0] * 120 + [1] * 50, np.int32)
    found = name_places(values, 2, places)
    assert found is not None
    np.testing.assert_allclose(found[0] or (), (0.2, 0.8), atol=0.03)
    np.testing.assert_allclose(found[1] or (), (0.9, 0.1), atol=0.03)
    assert name_places(values, 1000, places) is None


def test_categories_are_sorted_and_rows_without_one_stay_so() -> None:
    one = categories_of("label", ["b", None, "a", "b"])
    assert one.names == ("a", "b")
    assert one.values.tolist() == [1, -1, 0, 1]
    some = one.take(np.array([0, 1]))
    assert some.names == ("b",)
    assert some.values.tolist() == [0, -1]
