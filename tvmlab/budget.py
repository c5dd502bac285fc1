"""The knobs that every step with a search has: how much, when to stop, where to begin."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from tvmlab.options import knob

__all__ = [
    "MOST",
    "RATIO",
    "Threshold",
    "batch_size",
    "capped",
    "converted",
    "early_stopping",
    "halved",
    "max_trials",
    "patience_of",
    "reuse",
    "warm_start",
]

RATIO = 2  # trials of an AutoTVM task for each of Ansor's: the ratio of the two defaults
MOST = 100_000  # trials of one task that anything may ask for


def _threshold(value: Any) -> int | str:
    """A number of trials as it is, a percentage as '40 %'. Raises ValueError for anything else."""
    if type(value) is int and 1 <= value <= MOST:
        return value
    percentage = re.fullmatch(r"(\d+(?:\.\d+)?) ?%", value.strip()) if isinstance(value, str) else None
    if percentage and 0 < float(percentage[1]) <= 100:
        return f"{percentage[1]} %"
    raise ValueError(f"should be 1 to {MOST:,} trials, or a percentage of the budget above 0 % and up to 100 %")


Threshold = Annotated[int | str, BeforeValidator(_threshold)]


def early_stopping(default: int) -> Any:
    """The knob early_stopping_threshold: a `Threshold`."""
    text = (
        "Stop a task after so many trials without an improvement: a number, or a percentage of a task's trials, which "
        "are its even share where max_trials leaves less"
    )
    return Field(default, description=f"{text} ('40 %'; '100 %' never stops early)",
                 json_schema_extra={"unit": "trials"})  # fmt: skip


def patience_of(threshold: int | str, trials: int, tasks: int) -> float:
    """The threshold in trials, where so many tasks have so many together; infinity for 100 %.

    >>> patience_of(250, 64, 2), patience_of("40 %", 64, 2), patience_of("100 %", 64, 2)
    (250, 13, inf)
    """
    if isinstance(threshold, int):
        return threshold
    share = float(threshold.removesuffix("%")) / 100
    return math.inf if share == 1 else math.ceil(round(share * trials / max(tasks, 1), 9))


def reuse(of_what: str) -> Any:
    """The knob reuse, which says what of earlier runs counts."""
    return knob(True, f"Count {of_what} of earlier runs in the runs folder on this target, and start from them")


def max_trials() -> Any:
    """The knob max_trials."""
    return knob(None, "Cap on the trials of the whole step; empty for none", unit="trials", ge=1, le=100_000_000)


def batch_size() -> Any:
    """The knob batch_size."""
    return knob(
        None,
        "Trials measured between two updates of what guides the search; empty to fit it to the budget",
        unit="trials",
        ge=1,
        le=1024,
    )


def warm_start() -> Any:
    """The knob warm_start."""
    return Field(
        (), description="Earlier runs (folders or ids) whose records of the same task and target are used first"
    )


def capped(total: int, cap: int | None) -> int:
    """So many trials, or what a cap leaves of them."""
    return total if cap is None else min(total, cap)


def halved(trials: int) -> int:
    """AutoTVM's trials as Ansor's, rounded up."""
    return math.ceil(trials / RATIO)


def converted(step: Any, scale: Callable[[int], int]) -> dict[str, Any]:
    """The knobs that both engines have, those that count trials scaled."""
    threshold, cap = step.early_stopping_threshold, step.max_trials
    return {
        "early_stopping_threshold": scale(threshold) if isinstance(threshold, int) else threshold,
        "max_trials": None if cap is None else scale(cap),
        **{name: getattr(step, name) for name in ("batch_size", "warm_start", "reuse")},
    }
