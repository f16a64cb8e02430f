"""The one-standard-error rule of the selection, by hand."""

import pytest

from robustfeat.training.paper.choice import FoldMeans, choose_within_one_error


def test_means_and_errors_are_over_folds() -> None:
    # Two runs with five folds. Their means are 0.52, 0.54, 0.56, 0.58, 0.6.
    scores = FoldMeans.of([[0.50, 0.52, 0.54, 0.56, 0.58], [0.54, 0.56, 0.58, 0.60, 0.62]])
    assert scores.folds == pytest.approx((0.52, 0.54, 0.56, 0.58, 0.60))
    assert scores.mean == pytest.approx(0.56)
    # Squares of the distances from 0.56: 16 + 4 + 0 + 4 + 16 = 40, over 4, then over 5.
    assert scores.error == pytest.approx((0.0040 / 4 / 5) ** 0.5)
    assert FoldMeans((0.5,)).error == 0


def folds(mean: float) -> FoldMeans:
    """Five folds with this mean and a standard error of sqrt(0.001 / 5) = 0.01414."""
    return FoldMeans(tuple(mean + distance for distance in (-0.04, -0.02, 0.0, 0.02, 0.04)))


@pytest.mark.parametrize(
    ("means", "smallest", "largest"),
    [
        ({0.1: 0.500, 0.35: 0.510, 1.0: 0.490}, 0.1, 0.35),  # 0.500 is within 0.01414 of the best, 0.490 is not
        ({0.1: 0.490, 0.35: 0.510, 1.0: 0.500}, 0.35, 1.0),
        ({0.1: 0.500, 0.35: 0.502, 1.0: 0.504}, 0.1, 1.0),
        ({0.1: 0.400, 0.35: 0.450, 1.0: 0.500}, 1.0, 1.0),
        ({1.0: 0.500}, 1.0, 1.0),
    ],
)
def test_the_value_nearest_to_erm_within_one_error_is_chosen(
    means: dict[float, float], smallest: float, largest: float
) -> None:
    tried = {value: folds(mean) for value, mean in means.items()}
    assert choose_within_one_error(tried, min) == smallest
    assert choose_within_one_error(tried, max) == largest


def test_the_error_is_of_the_best_value() -> None:
    steady = FoldMeans((0.6, 0.6, 0.6, 0.6, 0.6))
    assert choose_within_one_error({0.1: folds(0.595), 1.0: steady}, min) == 1.0
    assert choose_within_one_error({0.1: steady, 1.0: folds(0.605)}, min) == 0.1
