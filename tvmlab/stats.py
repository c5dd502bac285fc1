"""Intervals for latencies, paired comparisons, and how many repeats are enough. Distribution-free throughout.

Latencies are skewed and have outliers, so everything is about medians and nothing assumes a normal
distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tvmlab.core import InputError

__all__ = [
    "LEAD", "Interval", "Paired", "enough_pairs", "enough_turns", "faster", "fewest_pairs",
    "fewest_samples", "holm", "is_faster", "median_interval", "paired_difference", "paired_ratio", "ratio_in_turns",
    "resampled_ratio", "turn_ratio",
]  # fmt: skip

# Of its rival's latency has what leads. A smaller gain another process may take back: the ratio of two kernels differs
# from process to process by 1 % (standard deviation, decision 8).
LEAD = 0.98
_RESAMPLES = 10_000
_BLOCK_VALUES = 1_000_000  # resampled at once, to bound the memory
_ENUMERATED = 14  # pairs whose 2^n changes of sign are all looked at
_DRAWN = 2**_ENUMERATED  # changes of sign drawn for more pairs


class Interval(NamedTuple):
    """An estimate and its confidence interval, in the unit of the samples (a ratio has none)."""

    value: float
    low: float
    high: float


def ratio_in_turns(a: ArrayLike, b: ArrayLike, confidence: float = 0.95, seed: int = 0) -> Interval:
    """How many times as long `a` takes as `b`, timed in turns: the median of a[i] / b[i], below 1 where `a` is faster.

    What a machine does to both of a turn cancels. On a virtual machine that is not little: its cores may be those of
    one physical core for a second (docs/benchmarks.md), and two medians may then be of different seconds (Bulej et al.,
    "Duet Benchmarking: Improving Measurement Accuracy in the Cloud", ICPE 2020, section 3). The interval is the
    percentile bootstrap's over turns (Efron & Tibshirani 1993, chapter 13); the same seed gives the same.

    If one has fewer values, there are no pairs: median(a) / median(b), each resampled on its own. What
    `tvmlab.compare` keeps of a slow subject is paired by its turns (tvmlab.comparison_rows.in_shared_turns).

    Too few turns for a median to have an interval (95 % needs 6) give NaN for its ends: resampling three pairs gives
    nothing wider than their range, which holds the true ratio in 75 % of cases.

    >>> ratio_in_turns([1.0, 2.0, 1.0] * 2, [2.0, 4.0, 2.0] * 2)
    Interval(value=0.5, low=0.5, high=0.5)
    """
    return resampled_ratio([(a, b)], confidence, seed)


def median_interval(samples: ArrayLike, confidence: float = 0.95) -> Interval:
    """The median and an interval between two order statistics (David & Nagaraja, Order Statistics, 2003,
    7.1).

    The interval holds the true median with at least this probability whatever the distribution: the number of
    samples below it is binomial(n, 1/2). Raises InputError for too few samples (95 % needs 6).

    >>> median_interval([5, 1, 4, 2, 3, 6])
    Interval(value=3.5, low=1.0, high=6.0)
    """
    _check_confidence(confidence)
    ordered = np.sort(_samples(samples, "samples"))
    rank = _rank(len(ordered), confidence)
    if rank == 0:
        raise InputError(
            f"{len(ordered)} samples cannot give a {confidence:.0%} interval",
            remedy=f"take at least {fewest_samples(confidence)}",
        )
    return Interval(float(np.median(ordered)), float(ordered[rank - 1]), float(ordered[-rank]))


def paired_difference(a: ArrayLike, b: ArrayLike, confidence: float = 0.95) -> Interval:
    """Median of a[i] - b[i] with its interval, for measurements taken in turns (a, b, a, b, ...).

    Drift that hits both of a pair cancels. The interval is the inverted sign test (Hollander & Wolfe 1999,
    3.6): the difference is significant where it leaves out 0. Negative: `a` is faster. Raises InputError for
    unequal lengths or too few pairs.

    >>> paired_difference([2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6])
    Interval(value=1.0, low=1.0, high=1.0)
    """
    first, second = _samples(a, "a"), _samples(b, "b")
    if len(first) != len(second):
        raise InputError(
            f"{len(first)} and {len(second)} samples are not pairs",
            remedy="measure both equally often, in turns",
        )
    return median_interval(first - second, confidence)


class Paired(NamedTuple):
    """A paired ratio, its confidence interval (NaN where the pairs are too few for one), and the test's p-value."""

    ratio: float
    low: float
    high: float
    p_value: float
    pairs: int


def paired_ratio(a: ArrayLike, b: ArrayLike, confidence: float = 0.95) -> Paired:
    """Geometric mean of a[i] / b[i] over independent pairs, such as seeds, tested by changes of sign.

    If `a` and `b` did not differ, each log ratio could as well have had the other sign: the p-value is the share of
    all changes of sign whose sum is at least as far from 0 (Fisher's randomization test, The Design of Experiments,
    1935, section 21). The interval is that test's own, between means of subsets (Hartigan, "Using Subsample Values as
    Typical Values", JASA 1969). Both hold for any distribution that is symmetric on the log scale, however few pairs.
    Up to 14 pairs all 2^n changes are looked at, for more a fixed draw of 2^14. Raises InputError for unequal lengths
    or values that are not positive.

    >>> paired_ratio([2.0, 4.0, 8.0], [4.0, 8.0, 16.0])
    Paired(ratio=0.5, low=nan, high=nan, p_value=0.25, pairs=3)
    >>> [round(value, 4) for value in paired_ratio([1.0] * 8, [2.0] * 8)]
    [0.5, 0.5, 0.5, 0.0078, 8]
    """
    _check_confidence(confidence)
    logs = _log_ratios(a, b)
    chosen = _subsets(len(logs))
    sums = chosen @ logs
    # A change of sign of the chosen: total - 2 sum(chosen).
    total = logs.sum()
    p_value = np.mean(np.abs(total - 2 * sums) >= abs(total) - 1e-12 * np.abs(logs).sum())
    middle, low, high = total / len(logs), math.nan, math.nan
    rank = math.floor((1 - confidence) / 2 * len(chosen))
    if rank >= 1 and len(logs) >= fewest_pairs(confidence):
        sizes = chosen.sum(axis=1)
        means = np.sort(sums[sizes > 0] / sizes[sizes > 0])
        low, high = np.exp(means[rank - 1]), np.exp(means[-rank])
    return Paired(float(np.exp(middle)), float(low), float(high), float(p_value), len(logs))


def fewest_pairs(confidence: float = 0.95, comparisons: int = 1) -> int:
    """Fewest pairs with which `paired_ratio` can show a difference, when Holm's correction is over so many comparisons.

    However large the difference, n pairs have 2^n changes of sign, of which two are as extreme as it.

    >>> fewest_pairs(), fewest_pairs(comparisons=6)
    (6, 8)
    """
    _check_confidence(confidence)
    return math.ceil(1 - math.log2((1 - confidence) / comparisons) - 1e-9)


def enough_pairs(
    ratios: ArrayLike, difference: float, confidence: float = 0.95, power: float = 0.8, comparisons: int = 1
) -> int:
    """How many pairs (seeds) show a relative `difference` (0.03: 3 %) with this power, from a pilot's ratios.

    The usual formula for a paired comparison on log ratios, ((z_{1-alpha/2} + z_power) s / d)^2 + z_{1-alpha/2}^2 / 2
    (Guenther, The American Statistician 1981), and no fewer than the test needs at all. The pilot, of 2
    ratios at least, gives the spread s: few of them give the order, not the number.

    >>> enough_pairs([1.0, 1.01, 0.99, 1.02, 0.98], difference=0.03)
    6
    """
    found = np.log(_positive(ratios, "ratios"))
    if len(found) < 2 or not difference > 0:
        raise InputError("a spread needs two ratios, and the difference to be positive", remedy="run a second seed")
    normal = NormalDist()
    z = normal.inv_cdf(1 - (1 - confidence) / comparisons / 2)
    needed = ((z + normal.inv_cdf(power)) * float(found.std(ddof=1)) / math.log1p(difference)) ** 2 + z**2 / 2
    return max(fewest_pairs(confidence, comparisons), math.ceil(needed))


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """The p-values corrected so that all claims hold together (Holm, Scandinavian Journal of Statistics 1979).

    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    """
    found = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(found, kind="stable")
    steps = found[order] * np.arange(len(found), 0, -1)
    corrected = np.empty_like(found)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return corrected


def resampled_ratio(
    pairs: Sequence[tuple[ArrayLike, ArrayLike]],
    confidence: float = 0.95,
    seed: int = 0,
    weights: Sequence[float] | None = None,
) -> Interval:
    """Geometric mean over pairs of `ratio_in_turns`, resampling the turns of each; NaN ends if one has too few.

    `weights` of the pairs in the mean add up to 1; without them all count the same.

    It says how well these very pairs are known, whose number stays as it is: not what other seeds would give (that is
    `paired_ratio`).

    >>> resampled_ratio([([1.0] * 6, [2.0] * 6), ([4.0] * 6, [2.0] * 6)])
    Interval(value=1.0, low=1.0, high=1.0)
    """
    _check_confidence(confidence)
    shares = [1 / len(pairs)] * len(pairs) if weights is None else weights
    value = sum(share * math.log(turn_ratio(a, b)) for share, (a, b) in zip(shares, pairs, strict=True))
    if min(np.size(samples) for pair in pairs for samples in pair) < fewest_samples(confidence):
        return Interval(math.exp(value), math.nan, math.nan)
    generator = np.random.default_rng(seed)
    resampled = np.zeros(_RESAMPLES)
    for share, (a, b) in zip(shares, pairs, strict=True):
        above, below = _positive(a, "a"), _positive(b, "b")
        if len(above) == len(below):
            logs = _resampled_medians(np.log(above / below), generator)
        else:
            logs = np.log(_resampled_medians(above, generator) / _resampled_medians(below, generator))
        resampled += share * logs
    low, high = np.exp(np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2]))
    return Interval(math.exp(value), float(low), float(high))


def turn_ratio(a: ArrayLike, b: ArrayLike) -> float:
    """The value of `ratio_in_turns`, without its interval.

    >>> turn_ratio([10.0, 20.0, 11.0], [10.0, 20.0, 22.0])
    1.0
    """
    above, below = _positive(a, "a"), _positive(b, "b")
    # Of logarithms: the middle of two is then their geometric mean, and b over a is 1 over that of a over b.
    pairs = len(above) == len(below)
    return float(np.exp(np.median(np.log(above / below))) if pairs else np.median(above) / np.median(below))


def faster(a: ArrayLike, b: ArrayLike) -> float:
    """How probable it is, at most, to find `a` this much faster than `b` by chance, timed in turns (a, b, b, a, ...).

    The one-sided signed-rank test (Wilcoxon, Biometrics Bulletin 1945) of log(a[i] / b[i]), exact for any number of
    pairs, with ties or without; pairs that are equal are left out. Where both are equally fast a pair is as often the
    one way round as the other, which is all that it asks for, and unlike the sign test it makes use of how far the
    pairs lie apart. Raises InputError for unequal lengths or values that are not positive.

    >>> faster([1.0, 1.1, 1.2, 1.3, 1.4], [1.1, 1.25, 1.5, 1.7, 2.0])
    0.03125
    """
    # Not scipy.stats.wilcoxon: it looks for torch, which the search process hides (tvmlab.compat.hide_torch).
    differences = _log_ratios(a, b)
    differences = differences[differences != 0]
    _, group, sizes = np.unique(np.abs(differences), return_inverse=True, return_counts=True)
    ranks = (2 * np.cumsum(sizes) - sizes + 1)[group]  # doubled, so that the mean rank of equals is whole
    chances = np.zeros(int(ranks.sum()) + 1)  # of each sum of the ranks of pairs in which `a` is slower
    chances[0] = 1.0
    for rank in ranks:
        shifted = np.concatenate([np.zeros(rank), chances[:-rank]])
        chances = (chances + shifted) / 2
    return float(chances[: int(ranks[differences > 0].sum()) + 1].sum())


def is_faster(a: ArrayLike, b: ArrayLike, p_value: float, tests: int = 1) -> bool:
    """Whether `a`, timed in turns with `b`, is shown to be faster: by `faster`, at the p-value over so many `tests`.

    `tests` is how many it is the best of (Bonferroni). And it must lead by 2 % or more (`LEAD`): all pairs are of one
    process, and of two kernels whose latencies lie closer another may be the faster one in the next process. Where
    there are too few pairs for any outcome to be significant (a pair of kernels that takes seconds, a table with few
    repeats) all must be in its favour.

    >>> is_faster([1.0] * 6, [1.1] * 6, 0.05), is_faster([1.0] * 6, [1.1] * 6, 0.05, tests=12)
    (True, False)
    """
    if turn_ratio(a, b) > LEAD:
        return False
    if 0.5 ** len(_samples(a, "a")) > p_value:
        return bool(np.all(_log_ratios(a, b) < 0))
    return faster(a, b) <= p_value / tests


def enough_turns(a: ArrayLike, b: ArrayLike, relative_width: float, confidence: float = 0.95) -> int:
    """How many turns give `ratio_in_turns` an interval no wider than `relative_width` x the ratio (0.02: +-1 %).

    `a` and `b` are a pilot of at least the turns that an interval needs. An interval narrows with the square root of
    the number of turns (Le Boudec, Performance Evaluation, 2010, 2.2), so the pilot's own is scaled; a pilot of a few
    dozen gives the right order, not the exact number. Raises InputError for too few turns, or a width that is not
    positive.

    >>> enough_turns([10.0] * 20, [20.0] * 20, relative_width=0.02)
    6
    """
    if not relative_width > 0:
        raise InputError(
            f"relative_width={relative_width} is not usable", remedy="pass a positive number, such as 0.02"
        )
    value, low, high = ratio_in_turns(a, b, confidence)
    least = fewest_samples(confidence)
    if math.isnan(low):
        raise InputError("the turns are too few to say how many are needed", remedy=f"pass a pilot of {least} or more")
    needed = min(np.size(a), np.size(b)) * ((high - low) / (relative_width * value)) ** 2
    return max(least, math.ceil(needed))


def _samples(values: ArrayLike, name: str) -> NDArray[np.float64]:
    found = np.asarray(values, dtype=np.float64).ravel()
    if len(found) == 0 or not np.isfinite(found).all():
        raise InputError(f"{name} is empty or holds NaN", remedy="pass the latencies of successful repeats")
    return found


def _positive(values: ArrayLike, name: str) -> NDArray[np.float64]:
    found = _samples(values, name)
    if found.min() <= 0:
        raise InputError("a latency is zero or negative", remedy="pass measured latencies only")
    return found


def _log_ratios(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    first, second = _positive(a, "a"), _positive(b, "b")
    if len(first) != len(second):
        raise InputError(
            f"{len(first)} and {len(second)} values are not pairs", remedy="pass one of each for each pair"
        )
    return np.log(first / second)


def _subsets(count: int) -> NDArray[np.float64]:
    """Which of `count` values are in each subset, one row a subset: all, or a fixed draw with the empty one first."""
    if count <= _ENUMERATED:
        return (np.arange(2**count)[:, None] >> np.arange(count) & 1).astype(np.float64)
    drawn = np.random.default_rng(0).integers(0, 2, (_DRAWN, count)).astype(np.float64)
    drawn[0] = 0
    return drawn


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise InputError(f"confidence={confidence} is not usable", remedy="pass a number between 0 and 1")


def _rank(count: int, confidence: float) -> int:
    """Largest r for which [r-th least, r-th largest] covers the median often enough; 0 if none does."""
    from scipy.special import bdtr  # the binomial distribution; each worker imports this module, and none needs that

    ranks = np.arange(1, count // 2 + 1)
    covers = 1 - 2 * bdtr(ranks - 1, count, 0.5) >= confidence
    return int(ranks[covers].max()) if covers.any() else 0


def fewest_samples(confidence: float = 0.95) -> int:
    """Fewest samples that give a median an interval: their least and largest leave out 2 x 2^-n.

    >>> fewest_samples(), fewest_samples(0.99)
    (6, 8)
    """
    return math.ceil(1 - math.log2(1 - confidence))


def _resampled_medians(samples: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    block = max(1, _BLOCK_VALUES // len(samples))
    sizes: Sequence[int] = [min(block, _RESAMPLES - start) for start in range(0, _RESAMPLES, block)]
    return np.concatenate([np.median(generator.choice(samples, (size, len(samples))), axis=1) for size in sizes])
