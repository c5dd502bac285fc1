"""Intervals for latencies, paired comparisons, and how many repeats are enough. Distribution-free throughout.

Latencies are skewed and have outliers, so everything is about medians and nothing assumes a normal
distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom

from tvmlab.core import InputError

__all__ = ["Interval", "bootstrap_ratio", "enough_repeats", "median_interval", "paired_difference"]

_RESAMPLES = 10_000
_BLOCK_VALUES = 1_000_000  # resampled at once, to bound the memory


class Interval(NamedTuple):
    """An estimate and its confidence interval, in the unit of the samples (a ratio has none)."""

    value: float
    low: float
    high: float


def bootstrap_ratio(a: ArrayLike, b: ArrayLike, confidence: float = 0.95, seed: int = 0) -> Interval:
    """median(a) / median(b) with its percentile bootstrap interval (Efron & Tibshirani 1993, chapter 13).

    `a` and `b` are latencies, in the same unit, each of any length; they are resampled independently, which
    stays valid (and is a little wide) for interleaved measurements that drift together. Below 1, `a` is
    faster. The same seed gives the same interval.

    >>> bootstrap_ratio([2.0, 2.0, 2.0], [4.0, 4.0, 4.0])
    Interval(value=0.5, low=0.5, high=0.5)
    """
    _check_confidence(confidence)
    above, below = _samples(a, "a"), _samples(b, "b")
    if above.min() <= 0 or below.min() <= 0:
        raise InputError("a latency is zero or negative", remedy="pass measured latencies only")
    generator = np.random.default_rng(seed)
    ratios = _resampled_medians(above, generator) / _resampled_medians(below, generator)
    low, high = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(np.median(above) / np.median(below)), float(low), float(high))


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
            remedy=f"take at least {_fewest(confidence)}",
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


def enough_repeats(samples: ArrayLike, relative_width: float, confidence: float = 0.95) -> int:
    """How many repeats give a median interval no wider than `relative_width` x the median (0.02: +-1 %).

    `samples` is a pilot of at least the size that an interval needs. A median interval narrows with the
    square root of the number of samples (Le Boudec, Performance Evaluation, 2010, 2.2), so the pilot's own is
    scaled; a pilot of a few dozen gives the right order, not the exact number.

    >>> enough_repeats([10.0] * 20, relative_width=0.02)
    6
    """
    if not relative_width > 0:
        raise InputError(
            f"relative_width={relative_width} is not usable", remedy="pass a positive number, such as 0.02"
        )
    pilot = _samples(samples, "samples")
    middle, low, high = median_interval(pilot, confidence)
    if middle <= 0:
        raise InputError("the median is not positive", remedy="pass latencies")
    needed = len(pilot) * ((high - low) / (relative_width * middle)) ** 2
    return max(_fewest(confidence), math.ceil(needed))


def _samples(values: ArrayLike, name: str) -> NDArray[np.float64]:
    found = np.asarray(values, dtype=np.float64).ravel()
    if len(found) == 0 or not np.isfinite(found).all():
        raise InputError(f"{name} is empty or holds NaN", remedy="pass the latencies of successful repeats")
    return found


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise InputError(f"confidence={confidence} is not usable", remedy="pass a number between 0 and 1")


def _rank(count: int, confidence: float) -> int:
    """Largest r for which [r-th least, r-th largest] covers the median often enough; 0 if none does."""
    ranks = np.arange(1, count // 2 + 1)
    covers = 1 - 2 * binom.cdf(ranks - 1, count, 0.5) >= confidence
    return int(ranks[covers].max()) if covers.any() else 0


def _fewest(confidence: float) -> int:
    """Fewest samples that give an interval: their least and largest leave out 2 x 2^-n."""
    return math.ceil(1 - math.log2(1 - confidence))


def _resampled_medians(samples: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    block = max(1, _BLOCK_VALUES // len(samples))
    sizes: Sequence[int] = [min(block, _RESAMPLES - start) for start in range(0, _RESAMPLES, block)]
    return np.concatenate([np.median(generator.choice(samples, (size, len(samples))), axis=1) for size in sizes])
