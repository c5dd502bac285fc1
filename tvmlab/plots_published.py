"""Published tables as figures: the report's, with the untuned model and beside a study of ours; selective tuning's."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from tvmlab.core import InputError
from tvmlab.plots_style import COLORS, GREY, new_axes, number, tidy

__all__ = ["published_bars", "published_beside", "selective_beside"]

_ARMS = {"ansor": COLORS[0], "ansor+droplet": COLORS[4]}
_UNTUNED = "#202020"


def published_bars(
    cells: pd.DataFrame, *, target: str | None = None, untuned: bool = True, ax: Axes | None = None
) -> Axes:
    """The report's bars: whole-model latency in ms by target and source, a colour an arm, for `published.cells()`.

    With `target` only the pairs of that model, as in the report's figure. `untuned` adds what the report left out:
    each target's untuned latency, as a line across its bars. Raises InputError for an unknown target.
    """
    shown = cells if target is None else cells[cells["model"] == target]
    if shown.empty:
        raise InputError(f"no target model {target!r}", remedy=f"there are {', '.join(cells['model'].unique())}")
    pairs = list(dict.fromkeys(zip(shown["model"], shown["source"], strict=True)))
    ax = ax if ax is not None else new_axes(1.8 + 1.0 * len(pairs), 3.6)
    for offset, (arm, color) in zip((-0.2, 0.2), _ARMS.items(), strict=True):
        values = shown[shown["arm"] == arm].set_index(["model", "source"])["transferred_ms"].loc[pairs]
        bars = ax.bar(np.arange(len(pairs)) + offset, values, 0.38, color=color, label=arm)
        ax.bar_label(bars, [number(value) for value in values], fontsize=7.5, padding=2)
    if untuned:
        _draw_untuned(ax, shown, pairs)
    ax.set_xticks(range(len(pairs)), [f"{to}\nfrom {source}" for to, source in pairs], fontsize=8)
    ax.set_ylabel("whole model (ms)")
    tidy(ax, "y")
    ax.margins(y=0.12)
    ax.legend(frameon=False, fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0.0, 1.0))
    return ax


def _draw_untuned(ax: Axes, shown: pd.DataFrame, pairs: Sequence[tuple[str, str]]) -> None:
    levels = shown.groupby("model")["untuned_ms"].mean()
    for place, (model, _) in enumerate(pairs):
        label = "untuned model" if place == 0 else ""
        ax.hlines(levels[model], place - 0.45, place + 0.45, color=_UNTUNED, lw=1.6, ls=(0, (3, 1)), label=label)


def published_beside(published: pd.DataFrame, ours: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Each pair's transferred latency as a multiple of the untuned model: the report's dots, ours with intervals.

    `published` is of `published.cells()`; `ours` has one row a pair: model, source, ratio, low, high. The
    machines and TVM versions differ, so only the multiples can be held beside each other. The axis is logarithmic.
    """
    pairs = list(dict.fromkeys(zip(published["model"], published["source"], strict=True)))
    places = {pair: place for place, pair in enumerate(pairs)}
    ax = ax if ax is not None else new_axes(7.5, 1.2 + 0.5 * len(pairs))
    for offset, (arm, color) in zip((-0.22, 0.0), _ARMS.items(), strict=True):
        part = published[published["arm"] == arm]
        ys = [places[pair] + offset for pair in zip(part["model"], part["source"], strict=True)]
        ax.plot(part["ratio"], ys, "o", color=color, ms=6, label=f"report, {arm}: measured once")
    found = [pair for pair in zip(ours["model"], ours["source"], strict=True) if pair in places]
    rows = ours.set_index(["model", "source"]).loc[found]
    ys = [places[pair] + 0.22 for pair in found]
    errors = [rows["ratio"] - rows["low"], rows["high"] - rows["ratio"]]
    ax.errorbar(
        rows["ratio"], ys, xerr=errors, fmt="s", color=COLORS[2], ms=5, capsize=3, label="tvmlab, 95 % interval"
    )
    ax.axvline(1.0, color=_UNTUNED, lw=1.2, ls=(0, (3, 1)))
    ax.set_xscale("log")
    ax.text(1.0, 1.01, "untuned", transform=ax.get_xaxis_transform(), ha="center", va="bottom", fontsize=8)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    ax.xaxis.set_minor_formatter(lambda value, _: f"{value:g}×" if f"{value:e}"[0] in "25" else "")
    ax.set_yticks(range(len(pairs)), [f"{to} from {source}" for to, source in pairs], fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel("latency with transferred schedules, as a multiple of the untuned model")
    tidy(ax, "both")
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax


def selective_beside(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Selective over full tuning, a point a model: its share of the time against the performance it reaches.

    `table` is of `published_selective.beside()`: the RFC's points, and ours where there are any, joined by a line a
    model, with a marker of their own for each experiment. A point above 1 is a model that selective tuning made faster
    than full tuning did.
    """
    ax = ax if ax is not None else new_axes(7.5, 4.4)
    for row in table.to_dict("records"):
        times, performances = ([row[f"rfc_{name}"], row[name]] for name in ("time", "performance"))
        ax.plot(times, performances, color=GREY, lw=0.8, zorder=1)
    theirs = table.drop_duplicates("model")
    for name, time, performance in theirs[["model", "rfc_time", "rfc_performance"]].itertuples(index=False):
        ax.annotate(name, (time, performance), (6, 3), textcoords="offset points", fontsize=7)
    ax.plot(theirs["rfc_time"], theirs["rfc_performance"], "o", color=COLORS[0], label="RFC (V100, TVM of 2019)")
    mine = list(table.dropna(subset=["time", "performance"]).groupby("experiment"))
    for mark, color, (experiment, part) in zip(cycle("sD^v"), cycle(COLORS[2:]), mine):
        label = f"tvmlab, experiment {experiment}" if len(mine) > 1 else "tvmlab"
        ax.plot(part["time"], part["performance"], mark, color=color, label=label)
    ax.axhline(1.0, color=_UNTUNED, lw=1.2, ls=(0, (3, 1)))
    ax.set_xlim(left=0.0)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.set_xlabel("time, as a share of full tuning's")
    ax.set_ylabel("performance, of full tuning's")
    tidy(ax, "both")
    ax.legend(frameon=False, fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0.0, 1.0))
    return ax
