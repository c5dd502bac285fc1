"""Known answers, and simulations that count how often an interval holds the truth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvmlab.core import InputError
from tvmlab.stats import bootstrap_ratio, enough_repeats, median_interval, paired_difference

# Ranks of the median's 95 % interval as in tables of the sign test: {n: r}, r-th least to r-th largest.
RANKS = {6: 1, 8: 1, 9: 2, 10: 2, 12: 3, 15: 4, 20: 6, 25: 8, 30: 10, 50: 18, 100: 40}


@pytest.mark.parametrize(("count", "rank"), RANKS.items())
def test_the_median_interval_uses_the_published_ranks(count, rank):
    shuffled = np.random.default_rng(0).permutation(np.arange(1, count + 1))
    assert median_interval(shuffled) == ((count + 1) / 2, rank, count + 1 - rank)


@pytest.mark.parametrize("draw", ["lognormal", "exponential", "standard_cauchy"])
def test_the_median_interval_holds_the_true_median_often_enough(draw):
    generator = np.random.default_rng(1)
    truth = {"lognormal": 1.0, "exponential": np.log(2), "standard_cauchy": 0.0}[draw]
    held = 0
    for _ in range(1000):
        _, low, high = median_interval(getattr(generator, draw)(size=21))
        held += low <= truth <= high
    assert 0.95 <= held / 1000 <= 0.99  # its exact coverage is 0.973


def test_the_bootstrap_ratio_holds_the_true_ratio_about_as_often_as_it_says():
    generator = np.random.default_rng(2)
    held = 0
    for seed in range(100):
        a, b = 3 * generator.lognormal(sigma=0.1, size=30), 2 * generator.lognormal(sigma=0.2, size=40)
        _, low, high = bootstrap_ratio(a, b, seed=seed)
        held += low <= 1.5 <= high
    assert 0.88 <= held / 100 <= 0.99


def test_the_bootstrap_ratio_is_of_medians_and_repeats_with_its_seed():
    a, b = [1.0, 2.0, 300.0], [4.0, 4.0, 5.0, 4.0]
    assert bootstrap_ratio(a, b).value == 0.5
    assert bootstrap_ratio(a, b, seed=3) == bootstrap_ratio(a, b, seed=3)
    narrow = bootstrap_ratio(a, b, confidence=0.2)
    wide = bootstrap_ratio(a, b, confidence=0.99)
    assert wide.low <= narrow.low <= narrow.high <= wide.high


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=30), st.floats(0.01, 100))
def test_the_ratio_does_not_depend_on_the_unit(samples, unit):
    value, low, high = bootstrap_ratio([unit * sample for sample in samples], samples)
    assert value == pytest.approx(unit)
    assert low <= value * (1 + 1e-9) and value <= high * (1 + 1e-9)


def test_pairing_sees_through_a_drift_that_hides_the_difference():
    generator = np.random.default_rng(3)
    drift = np.linspace(10, 20, 40)
    slow, fast = drift + 0.1 + generator.normal(0, 0.02, 40), drift + generator.normal(0, 0.02, 40)
    value, low, high = paired_difference(slow, fast)
    assert value == pytest.approx(0.1, abs=0.02)
    assert 0 < low < high
    unpaired = bootstrap_ratio(slow, fast)
    assert unpaired.low < 1 < unpaired.high


def test_pairing_claims_a_difference_of_equals_seldom():
    generator = np.random.default_rng(4)
    claimed = 0
    for _ in range(500):
        _, low, high = paired_difference(generator.lognormal(size=20), generator.lognormal(size=20))
        claimed += not low <= 0 <= high
    assert claimed / 500 <= 0.06


def test_enough_repeats_are_enough():
    generator = np.random.default_rng(5)
    sigma, wanted = 0.1, 0.03
    told = [enough_repeats(generator.normal(1, sigma, 200), wanted) for _ in range(20)]
    # The median of n normal samples has a standard error of 1.2533 sigma / sqrt(n).
    needed = (2 * 1.96 * 1.2533 * sigma / wanted) ** 2
    assert np.median(told) == pytest.approx(needed, rel=0.25)
    widths = []
    for _ in range(50):
        _, low, high = median_interval(generator.normal(1, sigma, int(np.median(told))))
        widths.append(high - low)
    assert np.median(widths) == pytest.approx(wanted, rel=0.2)


def test_steady_latencies_need_no_more_than_an_interval_does():
    assert enough_repeats([3.0] * 10, 0.01) == 6
    assert enough_repeats([3.0] * 10, 0.01, confidence=0.99) == 8


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: median_interval([1, 2, 3, 4, 5]), "take at least 6"),
        (lambda: median_interval([]), "empty"),
        (lambda: median_interval([1.0] * 9, confidence=95), "between 0 and 1"),
        (lambda: bootstrap_ratio([1.0, float("nan")], [1.0]), "a is empty or holds NaN"),
        (lambda: bootstrap_ratio([1.0], [0.0]), "zero or negative"),
        (lambda: paired_difference([1, 2], [1, 2, 3]), "2 and 3 samples"),
        (lambda: enough_repeats([1.0] * 9, 0), "relative_width=0"),
    ],
)
def test_unusable_samples_are_refused_with_a_remedy(call, said):
    with pytest.raises(InputError, match=said):
        call()
