"""The arms of a study as figures: what each costs in tuning time and what it gives, and its way there."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from tvmlab.core import InputError
from tvmlab.plots_style import COLORS, GREY, new_axes, tidy

__all__ = ["arm_costs", "arm_curves", "budget_curve"]

_MARKERS = "osD^vP*X"
_SIDE_BY_SIDE = 0.012  # of the time axis, between two dots
_PLACES = 300  # at which the searches of several seeds are read off


def arm_costs(frame: pd.DataFrame, *, versus: str = "onnxruntime", ax: Axes | None = None) -> Axes:
    """Whole-model latency against tuning time, a colour an arm, a marker a model, for a study's frame.

    Latency is the multiple of `versus` ("onnxruntime" or "untuned"), turn by turn. A dot is the median over the
    seeds, the bar goes from the least to the largest; the dots of an arm stand a little side by side. The grey whisker
    of an arm that transfers adds the search of the runs it takes its schedules from. Raises InputError for another
    `versus`, or where nothing was timed yet.
    """
    if versus not in ("onnxruntime", "untuned"):
        raise InputError(f"nothing was timed against {versus!r}", remedy="versus is 'onnxruntime' or 'untuned'")
    ratio = frame["vs_onnxruntime"] if versus == "onnxruntime" else 1 / frame["speedup"]
    shown = frame.assign(ratio=ratio).dropna(subset="ratio")
    if shown.empty:
        raise InputError("no whole model of this study was timed yet", remedy="let the study go on")
    ax = ax if ax is not None else new_axes(8.0, 4.2)
    colors = dict(zip(dict.fromkeys(shown["arm"]), cycle(COLORS)))
    markers = dict(zip(dict.fromkeys(shown["model"]), cycle(_MARKERS)))
    cells = shown.groupby(["arm", "model", "source"], sort=False)
    for aside, ((arm, model, _), part) in zip(_aside(cells, shown["search_s"].max()), cells, strict=True):
        x, y, whole = part["search_s"].median() + aside, part["ratio"].median(), part["source_search_s"].median()
        if whole > 0:
            ax.hlines(y, x, x + whole, color="#c8c8c8", lw=1.0, zorder=1)
        ax.vlines(x, part["ratio"].min(), part["ratio"].max(), color=colors[arm], lw=1.2, zorder=2)
        ax.plot(x, y, markers[model], color=colors[arm], ms=7, mec="#ffffff", mew=0.6, zorder=3)
    ax.axhline(1.0, color=GREY, lw=1.0, ls=(0, (5, 2)))
    ax.text(1.005, 1.0, versus, transform=ax.get_yaxis_transform(), va="center", fontsize=8, color=GREY)
    if shown["ratio"].max() > 10 * shown["ratio"].min():
        ax.set_yscale("log")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    ax.set_xlim(left=0)
    ax.set_xlabel("tuning time (s); grey: with the search of the source")
    ax.set_ylabel(f"end to end / {versus}")
    tidy(ax, "both")
    arms = [Line2D([], [], color=color, marker="o", ls="none", label=arm) for arm, color in colors.items()]
    models = [Line2D([], [], color=GREY, marker=marker, ls="none", label=model) for model, marker in markers.items()]
    ax.legend(handles=[*arms, *models], frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.12, 1.0))
    return ax


def _aside(cells: Any, longest_s: float) -> list[float]:
    """How far to move each cell's dot, seconds, so that those of an arm do not hide each other."""
    arms = [key[0] for key, _ in cells]
    return [
        (arms[:place].count(arm) - (arms.count(arm) - 1) / 2) * _SIDE_BY_SIDE * longest_s
        for place, arm in enumerate(arms)
    ]


def arm_curves(curves: pd.DataFrame, model: str, *, ax: Axes | None = None) -> Axes:
    """The model estimate of one model against tuning time, a line an arm and source, for a study's curves.

    A line is the median over the seeds, its band goes from the least to the largest. An arm that branches from another
    begins where that ends. Raises InputError for a model that the study does not have.
    """
    shown = curves[curves["model"] == model].dropna(subset="estimate_ms")
    if shown.empty:
        raise InputError(f"there is no curve of {model!r}", remedy=f"there are {', '.join(curves['model'].unique())}")
    ax = ax if ax is not None else new_axes(8.0, 4.0)
    for number, ((arm, source), part) in enumerate(shown.groupby(["arm", "source"], sort=False)):
        color = COLORS[number % len(COLORS)]
        dashes = ("-", "--", ":")[number // len(COLORS) % 3]  # more lines than colours are told apart by these
        band = _band(part)
        label = f"{arm} from {source}" if source else arm
        ax.fill_between(band["x"], band["low"], band["high"], step="post", color=color, alpha=0.15, lw=0)
        ax.step(band["x"], band["median"], where="post", color=color, ls=dashes, lw=1.6, label=label)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    ax.yaxis.set_minor_formatter(lambda value, _: f"{value:,g}" if f"{value:e}"[0] in "25" else "")
    ax.set_xlim(left=0)
    ax.set_xlabel("tuning time (s)")
    ax.set_ylabel(f"{model}: model estimate (ms)")
    tidy(ax, "y")
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax


def budget_curve(curve: pd.DataFrame, budgets: Sequence[int] = (), *, ax: Axes | None = None) -> Axes:
    """The model estimate in ms against the trials spent, both logarithmic, for `tvmlab.frames.curve` of several seeds.

    The line is the median over the runs, from where all have an estimate to where the first ends; thin lines are the
    runs. `budgets` are marked: a disc where a search went so far, a cross at the edge where none did.
    """
    known = curve.dropna(subset="estimate_ms").query("trial > 0")
    if known.empty:
        raise InputError("these runs have no estimate yet", remedy="let them measure every task once")
    ax = ax if ax is not None else new_axes(8.0, 3.8)
    runs = [run.sort_values("trial") for _, run in known.groupby("run")]
    for run in runs:
        ax.step(run["trial"], run["estimate_ms"], where="post", color=COLORS[0], lw=0.7, alpha=0.4)
    places = np.arange(max(run["trial"].iloc[0] for run in runs), min(run["trial"].iloc[-1] for run in runs) + 1)
    values = [run["estimate_ms"].to_numpy()[np.searchsorted(run["trial"], places, side="right") - 1] for run in runs]
    middle = np.median(values, axis=0)
    label = f"median of {len(runs)} seeds" if len(runs) > 1 else "1 seed"
    ax.step(places, middle, where="post", color=COLORS[0], lw=2.0, label=label)
    reached = [budget for budget in budgets if places[0] <= budget <= places[-1]]
    ax.plot(
        reached, middle[np.array(reached, dtype=int) - places[0]], "o", color=COLORS[1], ms=6, label="budget, reached"
    )
    beyond = [budget for budget in budgets if budget > places[-1]]
    ax.plot(beyond, np.full(len(beyond), 0.04), "x", color=GREY, transform=ax.get_xaxis_transform(), label="not run")
    ax.set_xscale("log")
    ax.set_yscale("log")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(lambda value, _: _short(value))
        axis.set_minor_formatter(lambda value, _: _short(value) if f"{value:e}"[0] in "25" else "")
    ax.set_xlabel("trials")
    ax.set_ylabel("model estimate (ms)")
    tidy(ax, "both")
    ax.legend(frameon=False, fontsize=8, loc="upper right")
    return ax


def _short(value: float) -> str:
    """A number at an axis.

    >>> _short(500), _short(20_000)
    ('500', '20k')
    """
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


def _band(part: pd.DataFrame) -> pd.DataFrame:
    """Median, least and largest estimate over the seeds, from where all of them have one."""
    searches = [search.sort_values("elapsed_s") for _, search in part.groupby("seed")]
    ends = [search["elapsed_s"].to_numpy() for search in searches]
    places = np.linspace(max(end[0] for end in ends), max(end[-1] for end in ends), _PLACES)
    values = [
        search["estimate_ms"].to_numpy()[np.searchsorted(search["elapsed_s"], places, side="right") - 1]
        for search in searches
    ]
    low, median, high = np.quantile(values, [0.0, 0.5, 1.0], axis=0)
    return pd.DataFrame({"x": places, "median": median, "low": low, "high": high})
