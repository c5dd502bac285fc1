"""compare.json as rows of a frame: what tvmlab.compare timed end to end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tvmlab import stats

__all__ = ["comparison_rows", "in_shared_turns", "median_ms", "ratio_of"]


def comparison_rows(run: str, compared: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of `comparison` for what one compare.json holds."""
    rows = []
    for subject, found in compared.get("subjects", {}).items():
        samples, ratio = found["samples_ms"], ratio_of(compared, "tvmlab", subject)
        low, high = stats.median_interval(samples)[1:] if len(samples) >= 6 else (np.nan, np.nan)
        rows.append(
            {
                "run": run,
                "subject": subject,
                "median_ms": float(np.median(samples)),
                "low_ms": low,
                "high_ms": high,
                "samples": len(samples),
                "ratio": ratio.get("ratio", np.nan),
                "ratio_low": ratio.get("low", np.nan),
                "ratio_high": ratio.get("high", np.nan),
            }
        )
    return rows


def median_ms(compared: dict[str, Any], subject: str) -> float:
    """The median latency of a subject, NaN if it was not timed."""
    samples = compared.get("subjects", {}).get(subject, {}).get("samples_ms")
    return float(np.median(samples)) if samples else np.nan


def ratio_of(compared: dict[str, Any], subject: str, baseline: str) -> dict[str, float]:
    """The ratio of two subjects with its interval (NaN: too few turns), empty if it is not there."""
    pairs = compared.get("ratios", [])
    found: dict[str, Any] = next((row for row in pairs if (row["subject"], row["baseline"]) == (subject, baseline)), {})
    return {name: np.nan if value is None else value for name, value in found.items()}  # JSON has null for NaN


def in_shared_turns(a: Mapping[str, list[Any]], b: Mapping[str, list[Any]]) -> tuple[list[float], list[float]]:
    """The samples_ms of two subjects in the turns that both took; all of both where an older file has no `turns`.

    >>> slow, fast = {"samples_ms": [5.0, 7.0], "turns": [0, 2]}, {"samples_ms": [1.0, 2.0, 3.0], "turns": [0, 1, 2]}
    >>> in_shared_turns(slow, fast)
    ([5.0, 7.0], [1.0, 3.0])
    """
    if "turns" not in a or "turns" not in b:
        return list(a["samples_ms"]), list(b["samples_ms"])
    first, second = (dict(zip(subject["turns"], subject["samples_ms"], strict=True)) for subject in (a, b))
    shared = [turn for turn in first if turn in second]
    return [first[turn] for turn in shared], [second[turn] for turn in shared]
