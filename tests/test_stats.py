"""Known answers, and simulations that count how often an interval holds the truth."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import wilcoxon

from tvmlab.core import InputError
from tvmlab.stats import (
    enough_pairs,
    enough_turns,
    faster,
    fewest_pairs,
    holm,
    median_interval,
    paired_difference,
    paired_ratio,
    ratio_in_turns,
    resampled_ratio,
    turn_ratio,
)

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


@pytest.mark.parametrize("turns", [30, 40])  # 40 of the other: pairs; 30: none
def test_the_ratio_in_turns_holds_the_true_ratio_about_as_often_as_it_says(turns):
    generator = np.random.default_rng(2)
    held = 0
    for seed in range(100):
        a, b = 3 * generator.lognormal(sigma=0.1, size=turns), 2 * generator.lognormal(sigma=0.2, size=40)
        _, low, high = ratio_in_turns(a, b, seed=seed)
        held += low <= 1.5 <= high
    assert 0.88 <= held / 100 <= 0.99


def test_the_ratio_in_turns_is_a_median_and_repeats_with_its_seed():
    a, b = [1.0, 2.0, 300.0] * 3, [4.0, 4.0, 5.0] * 3
    assert ratio_in_turns(a, b).value == turn_ratio(a, b) == 0.5
    assert ratio_in_turns(a, b, seed=3) == ratio_in_turns(a, b, seed=3)
    narrow = ratio_in_turns(a, b, confidence=0.2)
    wide = ratio_in_turns(a, b, confidence=0.99)
    assert wide.low <= narrow.low <= narrow.high <= wide.high
    assert turn_ratio(a, [4.0]) == 0.5  # no pairs: of the medians


@pytest.mark.parametrize(("confidence", "fewest"), [(0.95, 6), (0.99, 8)])
def test_too_few_turns_have_a_ratio_and_no_interval(confidence, fewest):
    """As of a median: with fewer, even the least and the largest leave the truth out too often."""
    a, b = np.linspace(1, 2, fewest), np.full(fewest, 3.0)
    assert np.isfinite(ratio_in_turns(a, b, confidence)).all()
    for few in (ratio_in_turns(a[1:], b[1:], confidence), ratio_in_turns(a, b[1:], confidence)):
        assert few.value > 0 and np.isnan(few.low) and np.isnan(few.high)
    both = resampled_ratio([(a, b), (a[1:], b[1:])], confidence)
    assert both.value > 0 and np.isnan(both.low)


def test_a_machine_that_is_slow_for_a_while_does_not_change_the_ratio_in_turns():
    """As cores of a virtual machine are: one median may be of the slow turns, the other of the fast ones."""
    generator = np.random.default_rng(11)
    speed = np.where(np.arange(40) // 5 % 2, 1.65, 1.0)
    a, b = 55 * speed * generator.lognormal(sigma=0.02, size=40), 50 * speed * generator.lognormal(sigma=0.02, size=40)
    a[20] /= 1.65  # the change came in the middle of a turn
    b[0] *= 1.65
    assert not 1.08 < np.median(a) / np.median(b) < 1.12
    value, low, high = ratio_in_turns(a, b)
    assert 1.08 < low < value < high < 1.12


@given(st.lists(st.floats(0.1, 10), min_size=6, max_size=30), st.floats(0.01, 100))
def test_the_ratio_does_not_depend_on_the_unit(samples, unit):
    value, low, high = ratio_in_turns([unit * sample for sample in samples], samples)
    assert value == pytest.approx(unit)
    assert low <= value * (1 + 1e-9) and value <= high * (1 + 1e-9)


def test_pairing_sees_through_a_drift_that_hides_the_difference():
    generator = np.random.default_rng(3)
    drift = np.linspace(10, 20, 40)
    slow, fast = drift + 0.1 + generator.normal(0, 0.02, 40), drift + generator.normal(0, 0.02, 40)
    value, low, high = paired_difference(slow, fast)
    assert value == pytest.approx(0.1, abs=0.02)
    assert 0 < low < high
    unpaired = ratio_in_turns(slow, fast[:-1])
    assert unpaired.low < 1 < unpaired.high
    assert ratio_in_turns(slow, fast).low > 1


def test_pairing_claims_a_difference_of_equals_seldom():
    generator = np.random.default_rng(4)
    claimed = 0
    for _ in range(500):
        _, low, high = paired_difference(generator.lognormal(size=20), generator.lognormal(size=20))
        claimed += not low <= 0 <= high
    assert claimed / 500 <= 0.06


def test_enough_turns_are_enough():
    generator = np.random.default_rng(5)
    sigma, wanted = 0.05, 0.015

    def pairs(count):
        drift = generator.lognormal(sigma=0.3, size=count)  # of both: it is no uncertainty of their ratio
        return drift * generator.lognormal(sigma=sigma, size=count), drift

    told = [enough_turns(*pairs(200), wanted) for _ in range(20)]
    # The median of n normal samples has a standard error of 1.2533 sigma / sqrt(n).
    needed = (2 * 1.96 * 1.2533 * sigma / wanted) ** 2
    assert np.median(told) == pytest.approx(needed, rel=0.25)
    widths = []
    for _ in range(50):
        _, low, high = ratio_in_turns(*pairs(int(np.median(told))))
        widths.append(high - low)
    assert np.median(widths) == pytest.approx(wanted, rel=0.2)


def test_steady_latencies_need_no_more_than_an_interval_does():
    assert enough_turns([3.0] * 10, [2.0] * 10, 0.01) == 6
    assert enough_turns([3.0] * 10, [2.0] * 10, 0.01, confidence=0.99) == 8


@pytest.mark.parametrize("count", [6, 8, 11, 20])
@pytest.mark.parametrize("draw", ["normal", "standard_t", "laplace"])
def test_the_paired_ratio_is_as_sure_as_it_says(count, draw):
    generator = np.random.default_rng(6)
    options = {"df": 3} if draw == "standard_t" else {}
    held = claimed = 0
    for _ in range(200):
        found = paired_ratio(1.25 * np.exp(0.1 * getattr(generator, draw)(size=count, **options)), np.ones(count))
        held += found.low <= 1.25 <= found.high
        claimed += (
            paired_ratio(np.exp(0.1 * getattr(generator, draw)(size=count, **options)), np.ones(count))[3] <= 0.05
        )
    assert 0.92 <= held / 200 <= 0.99
    assert claimed / 200 <= 0.08


@given(st.lists(st.floats(-1, 1).filter(lambda x: abs(x) > 1e-6), min_size=6, max_size=10))
def test_the_interval_and_the_test_of_a_paired_ratio_agree(logs):
    """The interval leaves out 1 where few changes of sign are as extreme: at 6 pairs exactly where none is but two."""
    found = paired_ratio(np.exp(logs), np.ones(len(logs)))
    assert found.low <= found.ratio * (1 + 1e-9) and found.ratio <= found.high * (1 + 1e-9)
    swapped = paired_ratio(np.ones(len(logs)), np.exp(logs))
    assert swapped.p_value == found.p_value
    assert (swapped.low, swapped.high) == (pytest.approx(1 / found.high), pytest.approx(1 / found.low))
    if len(logs) == 6:
        assert (found.low > 1 or found.high < 1) == (found.p_value <= 0.05)


def test_a_paired_ratio_by_hand():
    found = paired_ratio([1.0, 2.0, 1.0], [2.0, 1.0, 4.0])  # log ratios -1, +1, -2 (times log 2)
    assert found.ratio == pytest.approx(2 ** (-2 / 3)) and found.pairs == 3 and np.isnan(found.low)
    # Sums of the eight changes of sign: -4 -2 -2 0 0 2 2 4; at least as far as -2 are six.
    assert found.p_value == 6 / 8


def test_as_few_pairs_as_are_told_can_show_a_difference():
    for comparisons in (1, 3, 7):
        least = fewest_pairs(comparisons=comparisons)
        assert paired_ratio(np.full(least, 2.0), np.ones(least)).p_value * comparisons <= 0.05
        assert paired_ratio(np.full(least - 1, 2.0), np.ones(least - 1)).p_value * comparisons > 0.05


def test_enough_pairs_have_the_power_they_are_told_to_have():
    generator = np.random.default_rng(7)
    sigma, difference = 0.04, 0.05
    count = enough_pairs(np.exp(generator.normal(0, sigma, 500)), difference)
    assert count == pytest.approx((2.8 * sigma / np.log(1.05)) ** 2 + 1.96**2 / 2, rel=0.2)
    ratios = (np.exp(generator.normal(np.log(1.05), sigma, count)) for _ in range(400))
    shown = sum(paired_ratio(found, np.ones(count)).p_value <= 0.05 for found in ratios)
    assert 0.65 <= shown / 400 <= 0.9
    assert enough_pairs([1.0, 1.1], difference, comparisons=10) > enough_pairs([1.0, 1.1], difference)
    assert enough_pairs([1.0, 1.0], difference) == fewest_pairs()


def test_holm_is_between_no_correction_and_bonferroni():
    p_values = np.array([0.04, 0.001, 0.3, 0.02])
    corrected = holm(p_values)
    assert corrected.tolist() == [pytest.approx(0.08), 0.004, 0.3, pytest.approx(0.06)]
    assert ((p_values <= corrected) & (corrected <= 4 * p_values)).all()
    assert holm([0.9, 0.8]).tolist() == [1.0, 1.0] and holm([]).tolist() == []


def test_resampled_ratio_of_several_pairs():
    generator = np.random.default_rng(8)
    a, b = 3 * generator.lognormal(sigma=0.1, size=30), 2 * generator.lognormal(sigma=0.1, size=30)
    one = resampled_ratio([(a, b)])
    assert one == ratio_in_turns(a, b)
    both = resampled_ratio([(a, b), (b, a)])
    assert both.value == pytest.approx(1) and both.low < 1 < both.high
    weighted = resampled_ratio([(a, b), (b, a), (b, a)], weights=[0.5, 0.25, 0.25])  # two of one block count once
    assert weighted.value == pytest.approx(1) and weighted.low < 1 < weighted.high
    four = resampled_ratio([(a, b)] * 4)
    assert four.high - four.low < one.high - one.low  # each pair is resampled on its own


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: median_interval([1, 2, 3, 4, 5]), "take at least 6"),
        (lambda: median_interval([]), "empty"),
        (lambda: median_interval([1.0] * 9, confidence=95), "between 0 and 1"),
        (lambda: ratio_in_turns([1.0, float("nan")], [1.0]), "a is empty or holds NaN"),
        (lambda: ratio_in_turns([1.0], [0.0]), "zero or negative"),
        (lambda: paired_difference([1, 2], [1, 2, 3]), "2 and 3 samples"),
        (lambda: enough_turns([1.0] * 9, [1.0] * 9, 0), "relative_width=0"),
        (lambda: enough_turns([1.0] * 5, [1.0] * 5, 0.02), "too few .* pass a pilot of 6 or more"),
        (lambda: paired_ratio([1.0, 2.0], [1.0]), "2 and 1 values are not pairs"),
        (lambda: paired_ratio([1.0, 0.0], [1.0, 1.0]), "zero or negative"),
        (lambda: enough_pairs([1.1], 0.03), "a spread needs two ratios"),
    ],
)
def test_unusable_samples_are_refused_with_a_remedy(call, said):
    with pytest.raises(InputError, match=said):
        call()


def test_the_signed_rank_test_gives_the_tabled_probabilities():
    """Of n pairs that all point one way, 2^-n; and with one of five against it, by its rank (Wilcoxon 1945)."""
    for pairs in (1, 4, 8, 20):
        ours = np.linspace(1.0, 2.0, pairs)
        theirs = ours * (1 + np.linspace(0.01, 0.2, pairs))
        assert faster(ours, theirs) == pytest.approx(0.5**pairs)
        assert faster(theirs, ours) == 1.0
    for rank, probability in ((1, 2 / 32), (2, 3 / 32), (5, 10 / 32)):
        ratios = np.array([1.01, 1.02, 1.03, 1.04, 1.05])
        ratios[rank - 1] = 1 / ratios[rank - 1]
        assert faster(np.ones(5), ratios) == pytest.approx(probability)
    assert faster([1.0, 2.0], [1.0, 2.0]) == 1.0
    assert faster([1.0] * 3, [2.0] * 3) == pytest.approx(1 / 8)  # ties


def test_the_signed_rank_test_is_scipys_where_that_is_exact(monkeypatch):
    """Ours does without scipy, which fails where torch is hidden, as it is in the search process."""
    rng = np.random.default_rng(0)
    pairs = [np.exp(0.1 * rng.standard_normal((2, count))) for count in (2, 5, 13, 40) for _ in range(5)]
    expected = [wilcoxon(np.log(ours / theirs), alternative="less", method="exact").pvalue for ours, theirs in pairs]
    monkeypatch.setitem(sys.modules, "torch", None)
    assert [faster(ours, theirs) for ours, theirs in pairs] == pytest.approx(expected, abs=1e-12)


def test_the_signed_rank_test_is_wrong_as_often_as_it_says():
    rng = np.random.default_rng(0)
    drift = np.exp(np.cumsum(0.05 * rng.standard_normal((1500, 20)), axis=1))
    noise = np.exp(0.1 * rng.standard_normal((2, 1500, 20)) ** 3)  # long tails
    found = np.array([faster(a, b) for a, b in zip(drift * noise[0], drift * noise[1], strict=True)])
    for level in (0.2, 0.05):
        assert (found <= level).mean() == pytest.approx(level, rel=0.25)


def test_the_signed_rank_test_refuses_what_are_no_pairs():
    for ours, theirs in (([1.0], [1.0, 2.0]), ([1.0, 0.0], [1.0, 2.0]), ([], [])):
        with pytest.raises(InputError):
            faster(ours, theirs)
