"""Figures. Those of run folders take runs (as frames do) and an Axes, draw, and return the Axes.

The figures of the modules plots_* are here too; they draw the frames that their docstrings name. `caption` says above
any of them where its data come from.

What is drawn is computed first, by `frames` and `latency_bands`, and can be tested as numbers. pyplot is used
only to make a figure where no `ax` is given; `latency_png` never uses it and may be called from any thread.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from itertools import accumulate, cycle
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from tvmlab import frames
from tvmlab.columns import identity
from tvmlab.core import InputError, TrialStatus
from tvmlab.plots_descent import descent_figure, descent_knobs, descent_latency, descent_map
from tvmlab.plots_knobs import arm_ends, doubling_shares, stopping_costs
from tvmlab.plots_layouts import layout_graph
from tvmlab.plots_profile import profile_bars
from tvmlab.plots_published import published_bars, published_beside, selective_beside
from tvmlab.plots_similarity import similarity
from tvmlab.plots_study import arm_costs, arm_curves, budget_curve
from tvmlab.plots_style import caption
from tvmlab.plots_transfer import transfer_heat
from tvmlab.plots_tuners import tuner_bands, tuner_curves

__all__ = [
    "arm_costs", "arm_curves", "arm_ends", "budget_curve", "caption", "descent_figure", "descent_knobs",
    "descent_latency", "descent_map", "doubling_shares", "latency_bands", "latency_png", "latency_vs_trials",
    "layout_graph", "lump", "profile_bars", "published_bars", "published_beside", "selective_beside", "similarity",
    "stopping_costs", "task_shares", "transfer_heat", "trial_scatter", "tuner_bands", "tuner_curves",
]  # fmt: skip

# Okabe & Ito, "Color Universal Design" (2008): seven of the eight colours that colour-blind readers tell apart.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_GREY = "#8c8c8c"
# kind -> name, colour and dashes of a reference line
_REFERENCES = {
    "untuned": ("untuned", "#6b6b6b", (0, (1, 1.5))),
    "end-to-end": ("tuned", _COLORS[0], (0, (5, 2))),
    "onnxruntime": ("onnxruntime", _COLORS[1], (0, (5, 2))),
    "roofline": ("roofline", _COLORS[6], (0, (3, 1.5, 1, 1.5))),
}
_LOG_FROM = 10.0  # ratio of the largest to the smallest latency that makes the axis logarithmic
_LABEL_POINTS = 8
_POINTS = 2000  # steps of a line; more cannot be seen
_X_LABELS = {"trial": "trials", "elapsed_s": "tuning time (s)"}
_DRAWING = threading.Lock()


def latency_vs_trials(
    runs: Any, *, x: str = "trial", task: str | None = None, references: bool = True, ax: Axes | None = None
) -> Axes:
    """The model estimate in ms (or one task's best latency in us) against trials or `"elapsed_s"`.

    Runs that differ only in their seed become one line, the median, with a band from the least to the
    largest. Failed trials are not drawn. `references` adds the untuned latency, the roofline, and (for the
    model) what tvmlab.compare timed end to end, as labelled lines, if all runs are of one model and target.
    With `task`, its trials are light dots. The latency axis is logarithmic where it spans more than 10x.
    """
    bands = latency_bands(runs, x=x, task=task)
    lines = _reference_lines(runs, task) if references else []
    dots = _valid_trials(runs, task) if task else pd.DataFrame({x: [], "latency_us": []})
    ax = ax if ax is not None else _new_axes()
    if bands.empty:
        return _draw_nothing(ax, runs, x)
    for color, (_, band) in zip(cycle(_COLORS), bands.groupby("line", sort=False)):
        _draw_band(ax, band, color)
    ax.scatter(dots[x], dots["latency_us"], s=7, color=_GREY, alpha=0.45, lw=0, zorder=1, rasterized=True)
    shown = [*bands["low"], *bands["high"], *dots["latency_us"], *(line.value for line in lines)]
    _scale_latency(ax, np.array(shown))
    if bands["line"].nunique() == 1:
        lines.append(_Line("best", bands["median"].iloc[-1], "" if task else "model estimate", _COLORS[0], None))
    _draw_lines(ax, lines, "µs" if task else "ms")
    _dress(ax, x, bands["x"].max(), f"{task}: best latency (µs)" if task else "model estimate (ms)")
    if bands["line"].nunique() > 1 or bands["runs"].max() > 1:
        ax.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0.0, 1.0))
    return ax


def latency_bands(runs: Any, *, x: str = "trial", task: str | None = None) -> pd.DataFrame:
    """The lines that latency_vs_trials draws, one row a step: line (label), x, median, low, high, runs.

    Runs with equal experiments but for the seed, on the same target, are one line. `low` and `high` are the
    least and the largest over the seeds; a run that ended early keeps its best. A line begins where all its
    runs have a value. In ms (model estimate), or in us with `task`. Raises InputError for task="all".
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
        {
            "x": grid,
            "median": np.median(values, axis=0),
            "low": values.min(axis=0),
            "high": values.max(axis=0),
        }
    )


def _lines(runs: Any) -> dict[str, list[str]]:
    """Label of each line -> the ids of its runs. The label names what differs between the lines."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for folder in frames.folders(runs):
        _, model, target, _ = identity(folder)
        experiment = folder.experiment.model_copy(update={"seed": 0})
        steps = ", ".join(step.code() for step in experiment.steps)
        groups.setdefault((model, target, steps, experiment.code()), []).append(folder.id)
    differing = [place for place in range(3) if len({key[place] for key in groups}) > 1]
    for places in (differing or [0], [3], [3, 1]):  # they may differ in something else, such as the time limit
        labels = [", ".join(key[place] for place in places) for key in groups]
        if len(set(labels)) == len(labels):
            break
    return dict(zip(labels, groups.values(), strict=True))


class _Line(NamedTuple):
    """A horizontal line and its label. `measure` says what kind of latency the value is; no dashes: label
    only."""

    name: str
    value: float
    measure: str
    color: str
    dashes: Any


def _reference_lines(runs: Any, task: str | None) -> list[_Line]:
    """What to hold the curve against; nothing if the runs are of several models or targets."""
    if len({identity(folder)[1:3] for folder in frames.folders(runs)}) > 1:
        return []
    if task is None:
        known = frames.references(runs)
    else:
        table = frames.tasks(runs)
        table = table[(table["task"] == task) | (table["task_key"] == task)]
        known = pd.concat(
            pd.DataFrame({"kind": kind, "measure": "", "value_ms": table[column]})
            for kind, column in (("untuned", "default_us"), ("roofline", "roofline_us"))
        ).dropna()
    middles = known.groupby(["kind", "measure"])["value_ms"].median()
    return [
        _Line(name, middles[kind, measure], measure, color, dashes)
        for kind, (name, color, dashes) in _REFERENCES.items()
        for measure in ("", "model estimate", "end-to-end")
        if (kind, measure) in middles
    ]


def _valid_trials(runs: Any, task: str) -> pd.DataFrame:
    return _trials_of(runs, task).dropna(subset="latency_us")


def _trials_of(runs: Any, task: str) -> pd.DataFrame:
    """The trials of one task by name or key, the untuned kernel left out."""
    columns = ["run", "trial", "elapsed_s", "strategy", "status", "task", "task_key", "latency_us"]
    found = frames.trials(runs, columns=columns)
    return found[((found["task"] == task) | (found["task_key"] == task)) & (found["trial"] > 0)]


def task_shares(run: Any, *, top: int = 10, ax: Axes | None = None) -> Axes:
    """Each task's share of one run's model estimate, untuned and now; the largest `top`, the rest as one.

    The shares are of different wholes (see the legend), so the milliseconds stand at the bars. Raises
    InputError if `run` names several runs.
    """
    if len(frames.folders(run)) > 1:
        raise InputError("task shares are of one run", remedy="pass one run")
    table = frames.tasks(run)
    ax = ax if ax is not None else _new_axes(height=0.8 + 0.34 * min(top + 1, max(len(table), 4)))
    if table.empty or table["share"].isna().all():
        return _draw_nothing(ax, run, "share")
    table = lump(table, top)
    places = np.arange(len(table))
    for column, name, offset, color in (
        ("default", "untuned", -0.2, "#bdbdbd"),
        ("best", "best so far", 0.2, _COLORS[0]),
    ):
        shares = 100 * table[f"{column}_ms"] / table[f"{column}_ms"].sum()
        whole = f"{name}: {_number(table[f'{column}_ms'].sum())} ms"
        bars = ax.barh(places + offset, shares, height=0.38, color=color, label=whole)
        ax.bar_label(bars, [f"{_number(value)} ms" for value in table[f"{column}_ms"]], padding=3, fontsize=7)
    ax.set_yticks(places, [_short(name) for name in table["task"]], fontsize=8)
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.set_xlabel("share of the model estimate (%)")
    _tidy(ax, grid="x")
    ax.legend(
        title="model estimate", title_fontsize=8, frameon=False, fontsize=8,
        loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, alignment="left",
    )  # fmt: skip
    return ax


def lump(tasks: pd.DataFrame, top: int) -> pd.DataFrame:
    """Tunable tasks of one run by their part of the model estimate, largest first: task, default_ms, best_ms.

    Tasks after the first `top` become one row, "N other tasks".
    """
    tasks = tasks[tasks["tunable"].astype(bool) & (tasks["weight"] > 0)]
    parts = pd.DataFrame(
        {
            "task": [f"{name} (x{weight})" for name, weight in zip(tasks["task"], tasks["weight"], strict=True)],
            "default_ms": tasks["weight"] * tasks["default_us"] / 1e3,
            "best_ms": tasks["weight"] * tasks["best_us"] / 1e3,
        }
    ).sort_values("best_ms", ascending=False, kind="stable")
    if len(parts) <= top + 1:  # a lump of one task would hide a name to save no space
        return parts.reset_index(drop=True)
    rest = parts.iloc[top:]
    lumped = {"task": f"{len(rest)} other tasks", **rest[["default_ms", "best_ms"]].sum(skipna=False)}
    return pd.concat([parts.iloc[:top], pd.DataFrame([lumped])], ignore_index=True)


def trial_scatter(runs: Any, task: str, *, ax: Axes | None = None) -> Axes:
    """Each trial of a task: latency in us against the trial number, coloured by strategy, and the best so
    far.

    Failed trials have no latency: they are marks along the bottom, coloured by status. Raises InputError for
    an unknown task.
    """
    curve = frames.curve(runs, task=task)
    trials = _trials_of(runs, task)
    ax = ax if ax is not None else _new_axes()
    if trials.empty:
        return _draw_nothing(ax, runs, "trial")
    valid, failed = trials.dropna(subset="latency_us"), trials[trials["status"] != TrialStatus.OK]
    colors = iter(_COLORS[1:] * 3)
    for name, part in valid.groupby("strategy", observed=True):
        label = f"{name} ({len(part)})"
        ax.scatter(part["trial"], part["latency_us"], s=12, alpha=0.7, lw=0, color=next(colors), label=label)
    for _, part in curve.dropna(subset="best_us").groupby("run", observed=True):
        ax.step(part["trial"], part["best_us"], where="post", color=_COLORS[0], lw=1.6)
    ax.plot([], [], color=_COLORS[0], lw=1.6, label="best so far")
    for name, part in failed.groupby("status", observed=True):
        at_bottom = np.full(len(part), 0.02)
        ax.plot(part["trial"], at_bottom, "|", transform=ax.get_xaxis_transform(), ms=8, mew=1.2,
                color=next(colors), label=f"{name} ({len(part)})")  # fmt: skip
    shown = [*valid["latency_us"], *curve["best_us"].dropna()]
    if shown:
        _scale_latency(ax, np.array(shown), below=0.08 if len(failed) else 0.0)
    _dress(ax, "trial", trials["trial"].max(), f"{task}: latency (µs)")
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax


def latency_png(run: Any, width: float = 8.8, height: float = 3.6, dpi: float = 100) -> bytes:
    """latency_vs_trials as a PNG of width x height inches, for a live view: no pyplot, any thread."""
    with _DRAWING:  # matplotlib's text and font caches are shared between figures
        figure = Figure(figsize=(width, height), dpi=dpi)
        FigureCanvasAgg(figure)
        # Fixed margins, in inches, and light compression: the constrained layout draws everything twice.
        left, bottom, right, top = 0.75 / width, 0.5 / height, 1 - 1.5 / width, 1 - 0.3 / height
        latency_vs_trials(run, ax=figure.add_axes((left, bottom, right - left, top - bottom)))
        png = io.BytesIO()
        figure.savefig(png, format="png", pil_kwargs={"compress_level": 1})
    return png.getvalue()


def _new_axes(width: float = 7.5, height: float = 3.8) -> Axes:
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), layout="constrained")[1]


def _draw_band(ax: Axes, band: pd.DataFrame, color: str) -> None:
    label, count = band["line"].iloc[0], band["runs"].iloc[0]
    if count > 1:
        label = f"{label}: median of {count} seeds, band from least to largest"
        ax.fill_between(band["x"], band["low"], band["high"], step="post", color=color, alpha=0.2, lw=0)
    marker = "o" if len(band) == 1 else None  # a step of one point has no length
    ax.step(band["x"], band["median"], where="post", color=color, lw=1.8, label=label, zorder=3, marker=marker)


def _draw_lines(ax: Axes, lines: list[_Line], unit: str) -> None:
    """Lines with their labels at the right, moved apart where they would overlap."""
    lines = sorted(lines, key=lambda line: line.value)
    wanted = [ax.transLimits.transform(ax.transScale.transform((1.0, line.value)))[1] for line in lines]
    text_inches = _LABEL_POINTS * 1.25 * (2 if unit == "ms" else 1) / 72
    gap = text_inches / (ax.get_window_extent().height / ax.figure.dpi)
    for line, y in zip(lines, _apart(wanted, gap), strict=True):
        if line.dashes is not None:
            ax.axhline(line.value, color=line.color, linestyle=line.dashes, lw=1.1, zorder=2)
        text = f"{line.name} {_number(line.value)} {unit}" + (f"\n{line.measure}" if line.measure else "")
        ax.text(1.01, y, text, transform=ax.transAxes, va="center", fontsize=_LABEL_POINTS, color=line.color,
                linespacing=1.0)  # fmt: skip


def _apart(places: list[float], gap: float) -> list[float]:
    """Ascending places moved as little as needed to be at least `gap` apart, off the bottom and at most 1."""
    upward, downward = _spread(places, gap), [-y for y in _spread([-y for y in reversed(places)], gap)][::-1]
    middle = [(up + down) / 2 for up, down in zip(upward, downward, strict=True)]
    lifted = _spread([max(place, 0.75 * gap) for place in middle], gap)
    return [-y for y in _spread([-min(y, 1.0) for y in reversed(lifted)], gap)][::-1]


def _spread(places: list[float], gap: float) -> list[float]:
    """Ascending places, each moved up until it is `gap` above the one before."""
    return list(accumulate(places, lambda below, place: max(place, below + gap)))


def _draw_nothing(ax: Axes, runs: Any, x: str) -> Axes:
    """An axes that says why it is empty."""
    tried = any(len(frames.trials(folder, columns=["trial"])) for folder in frames.folders(runs))
    text = "no estimate yet: a task has no valid latency" if tried else "waiting for the first trial"
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=_GREY, fontsize=11)
    ax.set_xlabel(_X_LABELS.get(x, ""))
    ax.set_xticks([])
    ax.set_yticks([])
    _tidy(ax, grid=None)
    return ax


def _scale_latency(ax: Axes, values: np.ndarray, below: float = 0.0) -> None:
    """Limits with a margin; logarithmic where it serves. `below` leaves that part of the height free."""
    low, high = values.min(), values.max()
    if high > _LOG_FROM * low:
        ax.set_yscale("log")
        span = np.log10(high / low)
        ax.set_ylim(low / 10 ** ((0.05 + below) * span), high * 10 ** (0.05 * span))
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if span < 2.5 else (1.0,)))
        ax.yaxis.set_minor_locator(NullLocator() if span < 2.5 else LogLocator(subs=(2.0, 5.0)))
        ax.yaxis.set_minor_formatter(NullFormatter())
    else:
        span = (high - low) or high
        ax.set_ylim(low - (0.05 + below) * span, high + 0.05 * span)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def _dress(ax: Axes, x: str, right: float, ylabel: str) -> None:
    ax.set_xlim(0, 1.01 * right if right > 0 else 1)
    ax.set_xlabel(_X_LABELS[x])
    ax.set_ylabel(ylabel)
    ax.xaxis.set_major_locator(MaxNLocator(integer=x == "trial", nbins=8, steps=[1, 2, 5, 10]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    _tidy(ax, grid="y")


def _tidy(ax: Axes, grid: Any) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_axisbelow(True)
    if grid:
        ax.grid(axis=grid, color="#e6e6e6", lw=0.7)


def _number(value: float) -> str:
    """Three significant digits, never in powers of ten."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _short(name: str, longest: int = 42) -> str:
    return name if len(name) <= longest else f"{name[: longest // 2 - 1]}…{name[-longest // 2 :]}"
