"""What a knob does, as figures: what further trials gain, what early stopping costs, where arms end."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

from tvmlab.core import InputError
from tvmlab.plots_style import COLORS, GREY, new_axes, tidy

__all__ = ["arm_ends", "doubling_shares", "stopping_costs"]

_RIGHT = 0.9  # share of the trials from which on a dot's text is on its left
_NEAR = 0.04  # of either axis
_SPREAD = 0.2  # half the width over which the dots of an arm are spread


def doubling_shares(frames: Mapping[str, pd.DataFrame], *, ax: Axes | None = None) -> Axes:
    """The share of searches that twice the trials make faster, against the trials, for frames of `gains.doublings`.

    A line a source of searches, by name; the number at a dot says how many searches it is of. Raises InputError where
    none has a row.
    """
    shown = {name: frame for name, frame in frames.items() if len(frame)}
    if not shown:
        raise InputError("no search is long enough to be doubled", remedy="let one have 16 trials of a task")
    ax = ax if ax is not None else new_axes(8.0, 3.8)
    for color, (name, frame) in zip(cycle(COLORS), shown.items()):
        ax.plot(frame["trials"], frame["share"], "o-", color=color, lw=1.6, ms=5, label=name, zorder=3)
        for row in frame.itertuples():
            ax.annotate(str(row.searches), (row.trials, row.share), xytext=(0, 6), textcoords="offset points",
                        ha="center", fontsize=7, color=color)  # fmt: skip
    every = sorted({trials for frame in shown.values() for trials in frame["trials"]})
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(every))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.set_ylim(-0.03, 1.1)
    ax.set_xlabel("trials of a task, before they are doubled")
    ax.set_ylabel("searches that gain")
    tidy(ax, "y")
    ax.legend(frameon=False, fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0.0, 1.0))  # any corner has dots
    return ax


def stopping_costs(frames: Mapping[str, pd.DataFrame], *, ax: Axes | None = None) -> Axes:
    """What early stopping costs against what it leaves of the trials, for frames of `gains.early_stops`.

    A line a source of searches, by name; a dot is a threshold, written beside it: the means over its searches.
    """
    ax = ax if ax is not None else new_axes(8.0, 3.8)
    for number, (color, (name, frame)) in enumerate(zip(cycle(COLORS), frames.items())):
        above = 5 + 8 * number  # points; where lines meet, their texts stand above each other
        means = frame.groupby("threshold")[["share", "loss"]].mean().reset_index()
        ax.plot(means["share"], means["loss"], "o-", color=color, lw=1.4, ms=5, label=name, zorder=3)
        moved = means[["share", "loss"]].diff().abs()  # dots that nearly touch have one text
        near = (moved["share"] <= _NEAR) & (moved["loss"] <= _NEAR * means["loss"].max())
        for _, part in means.groupby((~near).cumsum()):
            share, loss = float(part["share"].iloc[-1]), float(part["loss"].iloc[-1])
            text = ", ".join(str(threshold) for threshold in part["threshold"])
            on_the_right = share > _RIGHT
            ax.annotate(text, (share, loss), xytext=(-5 if on_the_right else 5, above), textcoords="offset points",
                        ha="right" if on_the_right else "left", fontsize=7, color=color)  # fmt: skip
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    top = max(ax.get_ylim()[1], 0.01)
    ax.set_ylim(-0.04 * top, 1.05 * top)
    ax.set_xlim(0, 1.03)
    ax.set_xlabel("trials that are still measured (mean)")
    ax.set_ylabel("slower than without stopping (mean)")
    tidy(ax, "both")
    ax.legend(title="number: early_stopping_threshold", title_fontsize=8, frameon=False, fontsize=8)
    return ax


def arm_ends(found: pd.DataFrame, least_us: float, *, ax: Axes | None = None) -> Axes:
    """Where each arm's searches end, for a frame of `tvmlab.simulate_steps`: a dot a seed, a bar at their median.

    Latencies are multiples of `least_us`, the best point of the space; the number of trials (median) stands at the
    right.
    """
    ends = found.groupby(["arm", "seed"], sort=False).agg(best_us=("best_us", "last"), trials=("trial", "last"))
    arms = list(dict.fromkeys(found["arm"]))
    ax = ax if ax is not None else new_axes(7.5, 0.9 + 0.42 * len(arms))
    for place, (color, arm) in enumerate(zip(cycle(COLORS), arms)):
        part = ends.loc[arm]
        ratios = np.sort(part["best_us"].to_numpy() / least_us)
        heights = place + np.linspace(-_SPREAD, _SPREAD, len(ratios)) * (len(ratios) > 1)
        ax.plot(ratios, heights, "o", color=color, ms=5, alpha=0.8, mec="white", mew=0.4, zorder=4)
        ax.plot(np.full(2, np.median(ratios)), place + np.array([-0.36, 0.36]), color=color, lw=7, alpha=0.25, zorder=3)
        trials = f"{part['trials'].median():,.0f}"
        ax.text(1.01, place, f"{trials} trial{'' if trials == '1' else 's'}", transform=ax.get_yaxis_transform(),
                va="center", fontsize=8, color=GREY)  # fmt: skip
    ax.axvline(1.0, color=GREY, lw=1.0, ls=(0, (5, 2)))
    ax.set_yticks(range(len(arms)), arms)
    ax.set_ylim(len(arms) - 0.5, -0.5)
    ax.set_xlabel("best latency / best point of the space (bar: median of the seeds)")
    tidy(ax, "x")
    return ax
