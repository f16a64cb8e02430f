"""Intervals of differences, against SciPy's."""

import numpy as np
import pytest
from scipy import stats

from robustfeat.training.comparison.statistics import (
    compare,
    dunnett,
    equivalence_mark,
    holm,
    image_interval,
    paired,
    pooled,
)


def runs(rng: np.random.Generator, share: float, seeds: int = 3, images: int = 2000) -> list[np.ndarray]:
    return [rng.random(images) < share for _ in range(seeds)]


def test_intervals_are_scipys() -> None:
    rng = np.random.default_rng(0)
    right, baseline = runs(rng, 0.6), runs(rng, 0.5)
    result = compare(right, baseline)
    by_seed = [a.mean() - b.mean() for a, b in zip(right, baseline, strict=True)]
    expected = stats.ttest_rel([a.mean() for a in right], [b.mean() for b in baseline]).confidence_interval()
    assert result.difference == pytest.approx(np.mean(by_seed))
    assert result.over_seeds == pytest.approx(tuple(expected), abs=1e-12)
    by_image = (np.stack(right).astype(float) - np.stack(baseline)).mean(0)
    reference = stats.bootstrap((by_image,), np.mean, n_resamples=10_000, method="percentile", random_state=1)
    assert result.over_images == pytest.approx(tuple(reference.confidence_interval), abs=1e-3)


@pytest.mark.parametrize(("share", "mark"), [(0.7, "holds"), (0.3, "fails"), (0.5, "undecided")])
def test_marks_need_both_intervals(share: float, mark: str) -> None:
    rng = np.random.default_rng(1)
    assert compare(runs(rng, share), runs(rng, 0.5)).mark == mark


def test_one_seed_decides_nothing() -> None:
    rng = np.random.default_rng(2)
    result = compare(runs(rng, 0.9, 1), runs(rng, 0.1, 1))
    assert (result.over_seeds, result.mark) == (None, "undecided")
    assert result.over_images[0] > 0.5


def test_seeds_that_disagree_are_undecided_however_many_images() -> None:
    base = np.zeros(100_000, bool)
    better, worse = base.copy(), base.copy()
    better[:60_000], worse[:1] = True, True
    result = compare([better, worse], [base, base])
    assert result.over_images[0] > 0
    assert result.mark == "undecided"


def test_seeds_that_agree_on_too_few_images_are_undecided() -> None:
    base = np.zeros(50, bool)
    better = base.copy()
    better[7] = True
    result = compare([better] * 3, [base] * 3)
    assert result.over_seeds == pytest.approx((0.02, 0.02))
    assert result.mark == "undecided"


@pytest.mark.parametrize(("counts", "degrees"), [((3, 3, 3), 6), ((4, 2, 3), 6)])
def test_the_pooled_interval_is_that_of_an_analysis_of_variance(counts: tuple[int, ...], degrees: int) -> None:
    rng = np.random.default_rng(3)
    groups = {name: 0.5 + 0.02 * rng.standard_normal(count) for name, count in zip("abc", counts, strict=True)}
    found = pooled({name: list(values) for name, values in groups.items()}, "a")
    assert list(found) == ["b", "c"]
    error = np.sqrt(sum(len(one) * one.var() for one in groups.values()) / degrees)
    for name in "bc":
        scale = error * np.sqrt(1 / len(groups["a"]) + 1 / len(groups[name]))
        mean = groups[name].mean() - groups["a"].mean()
        assert found[name].mean == pytest.approx(mean)
        assert found[name].interval == pytest.approx(stats.t.interval(0.95, degrees, mean, scale))
        assert found[name].p == pytest.approx(2 * stats.t.cdf(-abs(mean) / scale, degrees))


def test_two_methods_pooled_are_students_test_and_pairs_are_the_paired_one() -> None:
    a, b = np.random.default_rng(4).random((2, 5))
    assert pooled({"a": a, "b": b}, "a")["b"].p == pytest.approx(stats.ttest_ind(b, a).pvalue)
    assert paired(b, a).p == pytest.approx(stats.ttest_rel(b, a).pvalue)


def test_without_a_second_seed_there_is_no_deviation() -> None:
    assert paired([0.6], [0.5]).interval is None
    assert pooled({"a": [0.5], "b": [0.6]}, "a")["b"].p is None


def test_seeds_that_agree_exactly_leave_no_doubt() -> None:
    assert paired([0.75, 0.5], [0.5, 0.25]).p == 0
    assert paired([0.5, 0.25], [0.5, 0.25]).p == 1


def test_holms_correction_is_the_published_one() -> None:
    """The example of R's help on p.adjust, in words: multiply by the number that is left, never decrease."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


def test_holms_correction_counts_planned_comparisons_as_ones() -> None:
    p = [0.01, 0.04, 0.03, 0.005]
    assert holm(p, 9) == pytest.approx(holm([*p, *[1.0] * 5])[:4])
    assert holm(p, 2) == holm(p)


@pytest.mark.parametrize("counts", [(5, 5, 5, 5, 5), (5, 4, 3, 5, 2), (3, 3)])
def test_dunnetts_intervals_are_scipys(counts: tuple[int, ...]) -> None:
    rng = np.random.default_rng(6)
    groups = {
        name: 0.5 + 0.01 * rng.standard_normal(count) + 0.005 * place
        for place, (name, count) in enumerate(zip("abcde", counts, strict=False))
    }
    found = dunnett({name: list(values) for name, values in groups.items()}, "a")
    others = [groups[name] for name in list(groups)[1:]]
    reference = stats.dunnett(*others, control=groups["a"], rng=np.random.default_rng(0))
    ends = reference.confidence_interval()
    for place, one in enumerate(found.values()):
        assert one.mean == pytest.approx(others[place].mean() - groups["a"].mean())
        assert one.p == pytest.approx(reference.pvalue[place], abs=1e-3)  # SciPy's are simulated
        assert one.interval == pytest.approx((ends.low[place], ends.high[place]), abs=1e-4)


@pytest.mark.parametrize(
    ("comparisons", "degrees", "published"), [(1, 20, 2.09), (4, 20, 2.65), (3, 16, 2.59), (9, 5, 3.97)]
)
def test_dunnetts_limits_are_the_published_ones(comparisons: int, degrees: int, published: float) -> None:
    """Dunnett, Biometrics 1964, two-sided, 95 %; the first is Student's."""
    count = degrees // 2 + 1
    baseline, other = (np.arange(count + extra, dtype=float) for extra in (0, degrees % 2))
    (found,) = dunnett({"a": list(baseline), "b": list(other)}, "a", comparisons).values()
    (alone,) = pooled({"a": list(baseline), "b": list(other)}, "a").values()
    assert found.interval is not None
    assert alone.interval is not None
    error = (alone.interval[1] - alone.mean) / stats.t.isf(0.025, degrees)
    assert (found.interval[1] - found.mean) / error == pytest.approx(published, abs=0.02)


def test_dunnetts_intervals_hold_together_in_a_simulation() -> None:
    """Of ties of four methods with the baseline, one in twenty has an interval without 0."""
    rng, outside = np.random.default_rng(7), 0
    (limit,) = dunnett({"a": [0.0, 1.0] * 5, "b": [0.0, 1.0] * 5}, "a", 4).values()
    assert limit.interval is not None
    half = limit.interval[1] / np.sqrt(10 * 0.25 * 2 / 18 * 2 / 10)  # 18 degrees of freedom
    for _ in range(4000):
        values = rng.standard_normal((5, 10))
        error = np.sqrt(rng.chisquare(18) / 18 * 2 / 10)
        outside += bool(np.abs(values[1:].mean(1) - values[0].mean()).max() > half * error)
    assert outside / 4000 == pytest.approx(0.05, abs=0.012)  # 3.5 deviations of the simulation


def test_dunnett_without_a_deviation() -> None:
    assert dunnett({"a": [0.5], "b": [0.6]}, "a")["b"].interval is None
    assert dunnett({"a": [0.5, 0.5], "b": [0.6, 0.6]}, "a")["b"].p == 0
    assert dunnett({"a": [0.5, 0.5], "b": [0.5, 0.5]}, "a")["b"].p == 1
    assert dunnett({"a": [0.5, 0.6]}, "a", 4) == {}


@pytest.mark.parametrize(
    ("interval", "mark"),
    [
        ((-0.004, 0.003), "equivalent"),
        ((-0.005, 0.003), "undecided"),
        ((-0.004, 0.006), "undecided"),
        ((0.001, 0.004), "holds, equivalent"),
        ((0.001, 0.006), "holds"),
        ((-0.004, -0.001), "fails, equivalent"),
        ((-0.01, -0.006), "fails"),
        (None, "undecided"),
    ],
)
def test_a_difference_is_equivalent_if_its_interval_lies_within_the_margin(
    interval: tuple[float, float] | None, mark: str
) -> None:
    assert equivalence_mark(interval, 0.005) == mark


def test_methods_with_other_numbers_of_runs_share_the_images() -> None:
    rng = np.random.default_rng(5)
    right, baseline = runs(rng, 0.6, 4), runs(rng, 0.5, 2)
    by_image = np.mean(right, 0) - np.mean(baseline, 0)
    reference = stats.bootstrap((by_image,), np.mean, n_resamples=10_000, method="percentile", random_state=1)
    assert image_interval(right, baseline) == pytest.approx(tuple(reference.confidence_interval), abs=1e-3)
