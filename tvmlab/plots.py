"""Figures of run folders. Each function takes runs (as frames do) and an Axes, draws, and returns the Axes.

What is drawn is computed first, by `frames` and `latency_bands`, and can be tested as numbers. pyplot is used only
to make a figure where no `ax` is given; `latency_png` never uses it and may be called from any thread.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from tvmlab import frames
from tvmlab.core import InputError, TrialStatus

__all__ = ["latency_bands", "latency_png", "latency_vs_trials", "task_shares", "trial_scatter"]

# Okabe & Ito, "Color Universal Design" (2008): eight colours that colour-blind readers tell apart.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_GREY = "#8c8c8c"
# kind -> colour and dashes of a reference line
_REFERENCES = {
    "untuned": ("#6b6b6b", (0, (1, 1.5))),
    "end-to-end": (_COLORS[0], (0, (5, 2))),
    "onnxruntime": (_COLORS[1], (0, (5, 2))),
    "roofline": (_COLORS[6], (0, (3, 1.5, 1, 1.5))),
}
_LOG_FROM = 10.0  # ratio of the largest to the smallest latency that makes the axis logarithmic
_POINTS = 2000  # steps of a line; more cannot be seen
_X_LABELS = {"trial": "trials", "elapsed_s": "tuning time (s)"}
_DRAWING = threading.Lock()


def latency_vs_trials(
    runs: Any, *, x: str = "trial", task: str | None = None, references: bool = True, ax: Axes | None = None
) -> Axes:
    """The model estimate in ms (or one task's best latency in us) against trials or `"elapsed_s"`.

    Runs that differ only in their seed become one line, the median, with a band from the least to the largest. Failed
    trials are not drawn. `references` adds the untuned latency, the roofline, and (for the model) what
    tvmlab.compare timed end to end, as labelled lines, if all runs are of one model and target. With `task`, its
    trials are light dots. The latency axis is logarithmic where it spans more than 10x.
    """
    bands = latency_bands(runs, x=x, task=task)
    lines = _reference_lines(runs, task) if references else []
    dots = _dots(runs, task) if task else None
    ax = ax if ax is not None else _new_axes()
    unit = "us" if task else "ms"
    if bands.empty:
        return _waiting(ax, x, unit, task)
    for number, (label, line) in enumerate(bands.groupby("line", sort=False)):
        color = _COLORS[number % len(_COLORS)]
        if line["runs"].iloc[0] > 1:
            label = f"{label}, median of {line['runs'].iloc[0]} seeds (band: min to max)"
            ax.fill_between(line["x"], line["low"], line["high"], step="post", color=color, alpha=0.2, lw=0)
        ax.step(line["x"], line["median"], where="post", color=color, lw=1.8, label=label, zorder=3)
    if dots is not None:
        ax.scatter(dots[x], dots["latency_us"], s=7, color=_GREY, alpha=0.45, lw=0, zorder=1, rasterized=True)
    shown = np.concatenate([bands["low"], bands["high"], [value for _, _, value in lines]])
    _scale_latency(ax, shown if dots is None else np.concatenate([shown, dots["latency_us"]]))
    _label_lines(ax, lines, unit)
    _dress(ax, x, bands["x"].max(), f"{task}, best latency (us)" if task else "model estimate (ms)")
    if bands["line"].nunique() > 1 or bands["runs"].max() > 1:
        ax.legend(frameon=False, fontsize=8, loc="upper right")
    return ax


def latency_bands(runs: Any, *, x: str = "trial", task: str | None = None) -> pd.DataFrame:
    """The lines that latency_vs_trials draws, one row a step: line (label), x, median, low, high, runs.

    Runs with equal experiments but for the seed, on the same target, are one line. `low` and `high` are the least
    and the largest over the seeds; a run that ended early keeps its best. A line begins where all its runs have a
    value. In ms (model estimate), or in us with `task`. Raises InputError for task="all".
    """
    if task == "all":
        raise InputError("one figure shows one task", remedy="pass a task's name")
    curve = frames.curve(runs, by=x, task=task)
    value = "best_us" if task else "estimate_ms"
    parts = []
    for label, ids in _lines(runs).items():
        steps = [
            (part[x].to_numpy(float), part[value].to_numpy(float))
            for run in ids
            if len(part := curve[(curve["run"] == run) & curve[value].notna()])
        ]
        if steps:
            parts.append(_band(steps).assign(line=label, runs=len(steps)))
    columns = ["line", "x", "median", "low", "high", "runs"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def _band(steps: Sequence[tuple[np.ndarray, np.ndarray]]) -> pd.DataFrame:
    """Median, least and largest of step functions, at every place where one of them changes."""
    changes = [xs[np.flatnonzero(np.diff(ys, prepend=np.inf))] for xs, ys in steps]
    ends = max(xs[-1] for xs, _ in steps)
    grid = np.unique(np.concatenate([*changes, [ends]]))
    grid = grid[grid >= max(xs[0] for xs, _ in steps)]
    if len(grid) > _POINTS:
        grid = grid[np.unique(np.linspace(0, len(grid) - 1, _POINTS).astype(int))]
    values = np.array([ys[np.searchsorted(xs, grid, side="right") - 1] for xs, ys in steps])
    return pd.DataFrame(
        {"x": grid, "median": np.median(values, axis=0), "low": values.min(axis=0), "high": values.max(axis=0)}
    )


def _lines(runs: Any) -> dict[str, list[str]]:
    """Label of each line -> the ids of its runs. The label names what differs between the lines."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for row in frames.summary_names(runs):
        groups.setdefault(row[1:], []).append(row[0])
    keys = list(groups)
    differing = [place for place in range(len(keys[0])) if len({key[place] for key in keys}) > 1] or [0]
    labels = [", ".join(key[place] for place in differing) for key in keys]
    return dict(zip(labels, groups.values(), strict=True))
