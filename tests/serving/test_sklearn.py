"""`ImageFeatures` behaves as scikit-learn's own transformers do."""

from __future__ import annotations

import functools
import pickle
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC
from sklearn.utils.estimator_checks import check_estimator
from sklearn.utils.validation import check_is_fitted, validate_data

from robustfeat import FeatureExtractor
from robustfeat.errors import DecodeError, InputError, ModelFolderError
from robustfeat.serving import Head, ImageFeatures


class _Pictures(ImageFeatures):
    """Takes tables of numbers, as scikit-learn's checks have them, and shows each row as a small picture."""

    def fit(self, X: Any, y: Any = None) -> _Pictures:
        super().fit(self._show(X, reset=True))
        return self

    def transform(self, X: Any) -> NDArray[np.float32]:
        check_is_fitted(self)
        return super().transform(self._show(X, reset=False))

    def _show(self, X: Any, *, reset: bool) -> list[NDArray[np.uint8]]:
        rows = validate_data(self, X, reset=reset, dtype=np.float64)
        return [np.resize((row * 40).astype(np.int64).astype(np.uint8), (8, 8, 3)) for row in rows]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        tags.no_validation = False
        tags.requires_fit = True
        return tags

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "n_features_in_")


EXPECTED_FAILURES = {
    "check_transformer_preserve_dtypes": "features are float32 whatever the images are",
}


def test_check_estimator_passes_with_rows_shown_as_pictures(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The checks make forty estimators: they share what each would load for itself.
    monkeypatch.setattr(FeatureExtractor, "load", functools.cache(FeatureExtractor.load))
    results = check_estimator(_Pictures(model, threads=1), expected_failed_checks=EXPECTED_FAILURES, on_skip=None)
    passed = [one["check_name"] for one in results if one["status"] == "passed"]
    assert len(passed) > 30
    assert {"check_estimators_pickle", "check_transformer_general", "check_methods_subset_invariance"} <= set(passed)


def test_check_estimator_passes_as_far_as_it_goes_without_tables() -> None:
    results = check_estimator(ImageFeatures(), on_skip=None)
    assert [one["check_name"] for one in results if one["status"] == "passed"] == ["check_estimator_cloneable"]


def test_features_are_those_of_the_extractor(example_files: list[Path]) -> None:
    expected = FeatureExtractor.from_pretrained().embed(example_files[:4])
    images, features = [Image.open(file) for file in example_files[:4]], ImageFeatures()
    for form in (
        example_files[:4],
        [str(file) for file in example_files[:4]],
        np.array([[str(file)] for file in example_files[:4]]),
        np.array(example_files[:4], object),
        [file.read_bytes() for file in example_files[:4]],
        images,
    ):
        assert (features.fit_transform(form) == expected).all()
    assert list(features.get_feature_names_out())[511] == "imagefeatures511"


def test_it_works_in_pipelines_searches_and_clones(example_files: list[Path], tmp_path: Path) -> None:
    labels = [file.parent.name in {"hat", "shoes"} for file in example_files]
    pipeline = make_pipeline(
        ImageFeatures(threads=1, cache=tmp_path / "cache" / "features.sqlite"), LinearSVC(dual=False)
    )
    search = GridSearchCV(pipeline, {"linearsvc__C": [0.01, 0.1]}, cv=2, n_jobs=2, error_score="raise")
    search.fit(example_files, labels)
    scores = cross_val_score(clone(pipeline), [str(file) for file in example_files], labels, cv=2, error_score="raise")
    features = FeatureExtractor.from_pretrained(threads=1).embed(example_files)
    assert scores.tolist() == cross_val_score(LinearSVC(dual=False), features, labels, cv=2).tolist()
    restored = pickle.loads(pickle.dumps(search.best_estimator_))
    assert restored.predict(example_files).tolist() == search.predict(example_files).tolist()
    head = Head.from_sklearn(search.best_estimator_, classes=["other", "hat or shoes"])
    assert head.model is not None
    assert head.model == ImageFeatures(threads=1).identity
    assert head.predict(ImageFeatures().transform(example_files[:2])).tolist() == ["other", "other"]


def test_the_cache_answers_by_content(example_files: list[Path], tmp_path: Path, monkeypatch: Any) -> None:
    cache = tmp_path / "features.sqlite"
    expected = ImageFeatures(cache=cache).transform(example_files[:5])
    embedded: list[int] = []
    embed = FeatureExtractor.embed_prepared

    def counted(self: FeatureExtractor, squares: Any, failed: Any = ()) -> Any:
        embedded.append(len(squares))
        return embed(self, squares, failed)

    monkeypatch.setattr(FeatureExtractor, "embed_prepared", counted)
    copy = tmp_path / "copy.jpg"
    copy.write_bytes(example_files[2].read_bytes())
    again = ImageFeatures(cache=cache).transform([copy, example_files[5], example_files[0].read_bytes()])
    assert embedded == [1]
    assert (again[[0, 2]] == expected[[2, 0]]).all()
    ImageFeatures(cache=cache, precision="int8").transform(example_files[:1])
    assert embedded[-1] == 1  # others' features are not taken
    with sqlite3.connect(cache) as connection:
        assert connection.execute("SELECT count(*) FROM features").fetchone()[0] == 7


def test_the_cache_knows_images_by_what_the_network_sees(example_files: list[Path], tmp_path: Path) -> None:
    upright = Image.open(example_files[0]).resize((60, 40))
    turned = upright.copy()
    turned.getexif()[0x0112] = 6
    file = tmp_path / "turned.png"
    turned.save(file, exif=turned.getexif())
    images = [upright, Image.open(file), np.asarray(upright)]
    expected = ImageFeatures().transform(images)
    assert np.abs(expected[0] - expected[1]).max() > 0.01
    for _ in range(2):
        found = ImageFeatures(cache=tmp_path / "features.sqlite").transform(images)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_images_that_cannot_be_read(example_files: list[Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    images = [example_files[0], bad, tmp_path / "none.jpg"]
    for cache in (None, tmp_path / "features.sqlite"):
        with pytest.raises(DecodeError, match=r"image 1: .*bad\.jpg"):
            ImageFeatures(cache=cache).transform(images)
        with pytest.raises(DecodeError, match=r"image 0: .*none\.jpg"):
            ImageFeatures(cache=cache).transform([tmp_path / "none.jpg", bad, tmp_path / "none.jpg"])
        features = ImageFeatures(cache=cache, on_error="nan").transform(images)
        assert np.isnan(features).all(1).tolist() == [False, True, True]


def test_wrong_arguments_are_said(tmp_path: Path, example_files: list[Path]) -> None:
    with pytest.raises(TypeError, match="put it in a list"):
        ImageFeatures().fit("a.jpg")
    with pytest.raises(TypeError, match=r"list of images, or \(n, H, W, 3\) uint8; got \(3, 4\) float64"):
        ImageFeatures().fit(np.zeros((3, 4)))
    with pytest.raises(ModelFolderError, match="not a model folder"):
        ImageFeatures(tmp_path).fit(example_files)
    with pytest.raises(ValueError, match="on_error must be"):
        ImageFeatures(on_error="skip").fit(example_files)
    (tmp_path / "notes.txt").write_text("no database, but text that is long enough" * 100)
    with pytest.raises(InputError, match=r"notes\.txt: not a usable cache"):
        ImageFeatures(cache=tmp_path / "notes.txt").transform(example_files[:1])


def test_a_pickle_names_the_public_place(tmp_path: Path) -> None:
    data = pickle.dumps(ImageFeatures(threads=1))
    assert b"robustfeat.serving" in data
    assert b"robustfeat.serving.sklearn" not in data
    (tmp_path / "features.pickle").write_bytes(data)
    code = f"import pickle; print(pickle.load(open({str(tmp_path / 'features.pickle')!r}, 'rb')).threads)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"
