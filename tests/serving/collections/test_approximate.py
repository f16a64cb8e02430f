"""The index for very large collections: what it finds is exact, and it belongs to its features."""

from __future__ import annotations

import contextlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import robustfeat
from robustfeat import Features, InputError
from robustfeat.progress import Progress
from robustfeat.serving.collections import approximate
from robustfeat.serving.collections.approximate import index_place, make_index, open_index
from robustfeat.serving.collections.directions import Directions
from robustfeat.serving.collections.neighbours import find_neighbours
from tests.conftest import WriteFeatures
from tests.serving.collections.conftest import FeaturesOf

FAILED = (3, 777)


def clustered(count: int, seed: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).standard_normal((60, 32))
    return (centres[rng.integers(0, 60, count)] + 0.4 * rng.standard_normal((count, 32))).astype(np.float32)


@pytest.fixture
def features(write_features: WriteFeatures, tmp_path: Path) -> Features:
    values = clustered(20_000, 1)
    values[list(FAILED)] = np.nan
    place = tmp_path / "feats.npy"
    write_features(place, values, [f"{row}.jpg" for row in range(len(values))], dict.fromkeys(FAILED, "damaged"))
    return robustfeat.load(place)


def test_nearly_all_nearest_rows_are_found_with_exact_cosines(features: Features) -> None:
    make_index(features, threads=2)
    queries = np.concatenate([clustered(200, 2), features.values[:50], np.full((1, 32), np.nan)])
    own = np.array([-1] * 200 + list(range(50)) + [-1])
    found = open_index(features, threads=2).search(queries, 10, own)
    exact = find_neighbours(Directions(features), queries, 10, own=own)
    finite = np.isfinite(queries).all(1)
    shared = [len(set(a) & set(b)) / 10 for a, b in zip(found.rows[finite], exact.rows[finite], strict=True)]
    assert np.mean(shared) > 0.97
    assert (found.rows[~finite] == -1).all()
    assert not set(FAILED) & set(found.rows.ravel().tolist())
    for number in range(200, 250):
        assert own[number] not in found.rows[number]
    same = (found.rows == exact.rows) & (found.rows >= 0)
    np.testing.assert_allclose(found.cosines[same], exact.cosines[same], atol=1e-14)


def test_an_index_of_other_features_or_a_damaged_one_is_refused(features: Features) -> None:
    make_index(features, threads=1)
    place = Path(index_place(features))
    with pytest.raises(InputError, match=r"feats\.faiss: is the index of an earlier .*feats\.npy; remove"):
        open_index(replace(features, meta_sha256="0" * 64), threads=1)
    data = bytearray(place.read_bytes())
    data[len(data) // 2] ^= 1
    place.write_bytes(data)
    with pytest.raises(InputError, match="its sha256 differs from"):
        open_index(features, threads=1)
    about = place.with_name("feats.faiss.json")
    about.write_text(json.dumps({"sha256": 1}))
    with pytest.raises(InputError, match=r"cannot be read .*features_meta_sha256"):
        open_index(features, threads=1)
    about.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        open_index(features, threads=1)


def test_few_rows_have_an_index_too(write_features: WriteFeatures, tmp_path: Path) -> None:
    write_features(tmp_path / "few.npy", np.eye(3, 8, dtype=np.float32), ["a", "b", "c"])
    features = robustfeat.load(tmp_path / "few.npy")
    make_index(features, threads=1)
    found = open_index(features, threads=1).search(np.eye(1, 8, dtype=np.float32), 5, np.array([-1]))
    assert found.rows.tolist() == [[0, 1, 2, -1, -1]]


def test_features_of_failed_images_only_have_no_index(write_features: WriteFeatures, tmp_path: Path) -> None:
    values = np.full((2, 8), np.nan, np.float32)
    write_features(tmp_path / "none.npy", values, ["a", "b"], {0: "damaged", 1: "damaged"})
    with pytest.raises(InputError, match=r"none\.npy: all images failed"):
        make_index(robustfeat.load(tmp_path / "none.npy"), threads=1)
    assert not list(tmp_path.glob("*.faiss*"))


def test_arrays_made_elsewhere_have_no_index(features_of: FeaturesOf) -> None:
    with pytest.raises(InputError, match="an index needs features that embed wrote to this machine"):
        make_index(features_of(np.ones((2, 4), np.float32)), threads=1)


def test_two_that_need_an_index_at_the_same_time_build_it_once(
    features: Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    both_build, build, built = threading.Barrier(2), approximate._build_index, list[str]()

    def build_together(of: Features, place: str, threads: int, progress: Progress | None) -> None:
        with contextlib.suppress(threading.BrokenBarrierError):  # one waits for the other, as it should
            both_build.wait(0.5)
        build(of, place, threads, progress)
        built.append(place)

    monkeypatch.setattr(approximate, "_build_index", build_together)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda threads: make_index(features, threads=threads), (1, 1)))
    assert built == [index_place(features)]
    open_index(features, threads=1)
    assert not [file.name for file in Path(built[0]).parent.iterdir() if file.name.startswith(".")]
