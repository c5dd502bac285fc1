"""The descent of a droplet search as a picture: the latency falling move by move, and the knob each trial changed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator

from tvmlab.core import InputError
from tvmlab.plots_style import COLORS, GREY, new_axes, number, tidy

__all__ = ["descent_figure", "descent_knobs", "descent_latency", "descent_map"]

_INCUMBENT, _MOVED, _FAILED = COLORS[0], COLORS[1], COLORS[3]
_LABELLED = 12  # moves that get their change written beside them


def descent_figure(frame: pd.DataFrame) -> tuple[Axes, Axes]:
    """Both pictures of a descent in one figure, above each other: `descent_latency` and `descent_knobs`."""
    from matplotlib import pyplot

    knobs = len(_knobs_of(frame))
    _, (above, below) = pyplot.subplots(
        2, 1, figsize=(9.0, 4.2 + 0.22 * knobs), sharex=True, layout="constrained",
        height_ratios=(3.2, 0.6 + 0.22 * knobs),
    )  # fmt: skip
    descent_latency(frame, ax=above)
    above.set_xlabel("")
    return above, descent_knobs(frame, ax=below)


def descent_latency(frame: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Latency of every neighbour tried, for a frame of `tvmlab.descent.of_trials`.

    The line is the incumbent, as measured in turns with each neighbour; a disc is a neighbour that was moved to, its
    number leads to what it changed; a ring one that was not (orange: faster too, but by less than 2 %, or not the
    fastest of its batch). Failed ones are marks along the bottom, those more than twice as slow as any incumbent arrows
    at the top. The stripes are the neighbourhoods of one incumbent each.
    """
    ax = ax if ax is not None else new_axes(9.0, 4.2)
    _stripe(ax, frame)
    top = 2.0 * float(frame["rival_us"].max()) if frame["rival_us"].notna().any() else np.inf
    rings = frame[frame["outcome"].isin(["rejected", "faster", "start"])]
    near, far = rings[rings["latency_us"] <= top], rings[rings["latency_us"] > top]
    known = frame.dropna(subset="rival_us")
    ax.step(known["order"], known["rival_us"], where="mid", color=_INCUMBENT, lw=1.8, zorder=3,
            label="incumbent, measured again beside each")  # fmt: skip
    for faster, color, label in ((False, GREY, "rejected"), (True, _MOVED, "faster, not taken")):
        part = near[(near["outcome"] == "faster") == faster]
        count = int(((rings["outcome"] == "faster") == faster).sum())
        if count:
            ax.plot(part["order"], part["latency_us"], "o", mfc="none", mec=color, ms=5, label=f"{label} ({count})")
    moved = frame[frame["outcome"] == "moved"]
    ax.plot(moved["order"], moved["latency_us"], "o", color=_MOVED, ms=7, zorder=4, label=f"moved to ({len(moved)})")
    ax.plot(far["order"], np.full(len(far), 0.985), "^", color=GREY, ms=4.5, transform=ax.get_xaxis_transform())
    failed = frame[frame["outcome"] == "failed"]
    if len(failed):
        ax.plot(failed["order"], np.full(len(failed), 0.02), "|", color=_FAILED, ms=8, mew=1.4,
                transform=ax.get_xaxis_transform(), label=f"failed ({len(failed)})")  # fmt: skip
    _label_moves(ax, moved)
    shown = [*known["rival_us"], *near["latency_us"], *moved["latency_us"]]
    if shown:
        span = (max(shown) - min(shown)) or max(shown)
        ax.set_ylim(min(shown) - 0.14 * span, max(shown) + 0.08 * span)
    ax.set_ylabel("latency (µs)")
    _dress(ax, frame)
    ax.legend(frameon=False, fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0.0, 1.0))
    return ax


def descent_knobs(frame: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Which knobs each neighbour changed: a row a knob, discs where the search moved, rings where it did not."""
    names = _knobs_of(frame)
    ax = ax if ax is not None else new_axes(9.0, 0.9 + 0.24 * len(names))
    _stripe(ax, frame)
    for row in frame.to_dict("records"):
        moved = row["outcome"] == "moved"
        color = {"moved": _MOVED, "faster": _MOVED, "failed": _FAILED}.get(row["outcome"], GREY)
        marker = "|" if row["outcome"] == "failed" else "o"
        for name in row["changed"]:
            face = color if moved else "none"
            ax.plot(row["order"], names.index(name), marker, mec=color, mfc=face, ms=6 if moved else 4)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set_ylim(len(names) - 0.5, -0.5)
    _dress(ax, frame)
    ax.grid(axis="y", color="#e6e6e6", lw=0.7)
    return ax


def descent_map(points: pd.DataFrame, path: Sequence[int], x: str, y: str, *, ax: Axes | None = None) -> Axes:
    """A descent's way over two knobs of a recorded space.

    `points` is the frame of a `tvmlab.recorded_space`, `path` the points stood on, the start first. A cell is the best
    latency that any values of the other knobs give there, as a multiple of the best of all (dark is fast; hatched:
    nothing ran). A move along another knob stays in its cell. Raises InputError for a knob that the space lacks.
    """
    known = [name for name in points.columns if name not in ("status", "latency_us")]
    if missing := [name for name in (x, y) if name not in known]:
        raise InputError(f"the space has no knob {missing[0]!r}", remedy=f"it has {', '.join(known)}")
    table = points.pivot_table(index=y, columns=x, values="latency_us", aggfunc="min", dropna=False)
    table = table.reindex(index=points[y].unique(), columns=points[x].unique()) / points["latency_us"].min()
    ax = ax if ax is not None else new_axes(1.9 + 0.62 * table.shape[1], 1.1 + 0.5 * table.shape[0])
    ax.patch.set(hatch="////", edgecolor="#d0d0d0", facecolor="#f4f4f4")
    ax.imshow(table, cmap="Blues_r", norm=LogNorm(1.0, max(2.0, np.nanmax(table))), origin="lower", aspect="auto")
    for (row, column), ratio in np.ndenumerate(table.to_numpy()):
        if np.isfinite(ratio):
            ink = "#ffffff" if ratio < np.sqrt(np.nanmax(table)) else "#202020"
            ax.text(column, row + 0.3, f"{ratio:.2f}", ha="center", va="center", fontsize=7, color=ink)
    xs = [table.columns.get_loc(points.loc[point, x]) for point in path]
    ys = [table.index.get_loc(points.loc[point, y]) for point in path]
    ax.plot(xs, ys, "-o", color=_MOVED, lw=1.8, ms=5, mec="#ffffff", mew=0.8)
    ax.plot(xs[:1], ys[:1], "o", color="#ffffff", mec=_MOVED, mew=1.6, ms=8)
    ax.set_xticks(range(table.shape[1]), table.columns)
    ax.set_yticks(range(table.shape[0]), table.index)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return ax


def _knobs_of(frame: pd.DataFrame) -> list[str]:
    """Every knob that was changed, in the order of the space."""
    return sorted({name for names in frame["changed"] for name in names}, key=_place)


def _place(name: str) -> tuple[int, str]:
    """Knobs of a sketch are numbered over all kinds."""
    last = name.rsplit(" ", 1)[-1]
    return (int(last), name) if last.isdigit() else (-1, name)


def _stripe(ax: Axes, frame: pd.DataFrame) -> None:
    odd = frame[frame["incumbent"] % 2 == 1]
    for _, orders in odd.groupby("incumbent")["order"]:
        ax.axvspan(orders.min() - 0.5, orders.max() + 0.5, color="#f3f3f3", zorder=0, lw=0)


def _label_moves(ax: Axes, moved: pd.DataFrame) -> None:
    """A number at each move; what it changed stands beside the axes."""
    said = []
    for place, row in enumerate(moved.to_dict("records"), start=1):
        at = (row["order"], row["latency_us"])
        ax.annotate(str(place), at, xytext=(0, -7), textcoords="offset points", ha="center", va="top", fontsize=8,
                    color=_MOVED, weight="bold", zorder=5)  # fmt: skip
        change = row["change"] if len(row["change"]) <= 44 else f"{row['change'][:43]}…"
        fell = f"{number(row['rival_us'])} → {number(row['latency_us'])} µs"
        said.append(f"{place}  {change or 'another point'}\n    {fell}")
    more = [f"and {len(said) - _LABELLED} more"] if len(said) > _LABELLED else []
    ax.text(1.01, 1.0, "\n".join([*said[:_LABELLED], *more]), transform=ax.transAxes, va="top", fontsize=7.5,
            color="#404040", linespacing=1.35)  # fmt: skip


def _dress(ax: Axes, frame: pd.DataFrame) -> None:
    ax.set_xlim(0.5, len(frame) + 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    ax.set_xlabel("neighbours tried, in order")
    tidy(ax, "y")
