"""Tuners on a replayed space as a figure: how fast each comes near the best point there is."""

from __future__ import annotations

from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from tvmlab.core import InputError
from tvmlab.plots_style import COLORS, GREY, new_axes, tidy

__all__ = ["tuner_bands", "tuner_curves"]

_LOG_FROM = 2.0  # ratio of the largest to the least latency that makes the axis logarithmic
_GRID = 200  # places on a time axis at which the searches are read off


def tuner_curves(
    frame: pd.DataFrame, *, x: str = "trial", least_us: float | None = None, ax: Axes | None = None
) -> Axes:
    """Best latency so far against trials or charged seconds, for a frame of `tvmlab.simulate` or `simulate_steps`.

    A line is a tuner or arm, the median over the seeds, its band the middle half of them. `least_us` is the best point
    of the space: with it the latency is drawn as a multiple of that. Raises InputError for another `x`, or for
    `"elapsed_s"` where the times were not recorded.
    """
    bands = tuner_bands(frame, x)
    scale = 1.0 if least_us is None else least_us
    ax = ax if ax is not None else new_axes()
    for color, (name, band) in zip(cycle(COLORS), bands.groupby(_kind(frame), sort=False)):
        ax.fill_between(
            band["x"], band["low"] / scale, band["high"] / scale, step="post", color=color, alpha=0.15, lw=0
        )
        ax.step(band["x"], band["median"] / scale, where="post", color=color, lw=1.8, label=name)
    least, most = bands["low"].min() / scale, bands["high"].max() / scale
    if most > _LOG_FROM * least:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.2, 1.5, 2.0, 3.0, 5.0)))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    if least_us is not None:
        ax.axhline(1.0, color=GREY, lw=1.0, ls=(0, (5, 2)), label="best point of the space")
        ax.set_ylim(bottom=0.96)
    ax.set_xlim(left=0)
    ax.set_xlabel("trials" if x == "trial" else "charged time: building and running (s)")
    ax.set_ylabel("best latency so far (µs)" if least_us is None else "best latency so far / best of the space")
    tidy(ax, "y")
    seeds = frame["seed"].nunique()
    ax.legend(title=f"median of {seeds} seeds, band: middle half" if seeds > 1 else None, title_fontsize=8,
              frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))  # fmt: skip
    return ax


def tuner_bands(frame: pd.DataFrame, x: str = "trial") -> pd.DataFrame:
    """What `tuner_curves` draws: tuner (or arm), x, median, low, high (quartiles over the seeds, us).

    A line begins where every seed has a valid trial; a search that ended keeps its best.
    """
    if x not in ("trial", "elapsed_s"):
        raise InputError(f"a curve cannot run by {x!r}", remedy="x is 'trial' or 'elapsed_s'")
    if frame[x].isna().any():
        raise InputError("the times of this space were not recorded", remedy="draw by 'trial', or record it again")
    parts, kind = [], _kind(frame)
    for name, part in frame.groupby(kind, sort=False):
        searches = [search.dropna(subset="best_us") for _, search in part.groupby("seed")]
        start, end = max(search[x].iloc[0] for search in searches), max(search[x].iloc[-1] for search in searches)
        places = np.arange(start, end + 1) if x == "trial" else np.linspace(start, end, _GRID)
        values = [
            search["best_us"].to_numpy()[np.searchsorted(search[x], places, side="right") - 1] for search in searches
        ]
        low, median, high = np.quantile(values, [0.25, 0.5, 0.75], axis=0)
        parts.append(pd.DataFrame({kind: name, "x": places, "median": median, "low": low, "high": high}))
    return pd.concat(parts, ignore_index=True)


def _kind(frame: pd.DataFrame) -> str:
    """The column that names a line."""
    return "arm" if "arm" in frame else "tuner"
