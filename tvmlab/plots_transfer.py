"""Transfer between models as a heat map: rows are targets, columns sources."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm, to_rgba
from matplotlib.patches import Rectangle

from tvmlab.core import InputError
from tvmlab.plots_style import COLORS, GREY, new_axes

__all__ = ["transfer_heat"]

_MAP = LinearSegmentedColormap.from_list("faster-slower", (COLORS[0], "#ffffff", COLORS[1]))
_LETTERS_PER_MODEL = 17  # of the title, in the width of a cell
_NEEDED = ("model", "source", "ratio")


def transfer_heat(
    frame: pd.DataFrame, *, of: str = "untuned", diagonal: str = "itself", ax: Axes | None = None
) -> Axes:
    """One cell a pair: latency of the target with the source's schedules, as a multiple of what `of` names.

    `frame` has one row a pair: model, source, ratio; `low` and `high`, if there, are its interval and are
    written below. A row whose target is its source fills the diagonal (a model's own search, say); else the diagonal
    says `diagonal`. A pair without a row is hatched. Blue is faster than `of`, orange slower.

    Raises InputError for a frame that lacks a column or has two rows for a pair.
    """
    cells = _cells(frame)
    models = sorted({*frame["model"], *frame["source"]})
    ax = ax if ax is not None else new_axes(1.9 + 1.15 * len(models), 1.3 + 0.75 * len(models))
    reach = float(np.exp(np.abs(np.log(frame["ratio"])).max())) or 1.0
    norm = LogNorm(1 / max(reach, 1.05), max(reach, 1.05))
    for row, target in enumerate(models):
        for column, source in enumerate(models):
            _draw_cell(ax, column, row, cells.get((target, source)), norm, diagonal if target == source else "not run")
    ax.set_xlim(-0.5, len(models) - 0.5)
    ax.set_ylim(len(models) - 0.5, -0.5)
    ax.set_xticks(range(len(models)), models)
    ax.set_yticks(range(len(models)), models)
    ax.set_xlabel("schedules from")
    ax.set_ylabel("model")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    low = "; below: 95 % interval" if {"low", "high"} <= set(frame.columns) else ""
    width = int(_LETTERS_PER_MODEL * (len(models) + 1))
    ax.set_title(textwrap.fill(f"latency as a multiple of {of}{low}", width), loc="left", fontsize=8, color=GREY)
    return ax


def _cells(frame: pd.DataFrame) -> dict[tuple[str, str], pd.Series]:
    if missing := [name for name in _NEEDED if name not in frame.columns]:
        raise InputError(f"the frame has no column {missing[0]!r}", remedy=f"it needs {', '.join(_NEEDED)}")
    if frame.duplicated(["model", "source"]).any():
        raise InputError("the frame has two rows for a pair", remedy="pass one arm, and one row for all its seeds")
    return {(row["model"], row["source"]): row for _, row in frame.iterrows()}


def _draw_cell(ax: Axes, x: int, y: int, cell: Any, norm: LogNorm, otherwise: str) -> None:
    empty = cell is None or not np.isfinite(cell["ratio"])
    face = "#f4f4f4" if empty else _MAP(norm(cell["ratio"]))
    hatch = "////" if empty and otherwise == "not run" else None
    ax.add_patch(Rectangle((x - 0.48, y - 0.47), 0.96, 0.94, facecolor=face, edgecolor="#d0d0d0", lw=0.6, hatch=hatch))
    if empty:
        box = {"facecolor": "#f4f4f4", "edgecolor": "none", "pad": 1.5}
        ax.text(x, y, otherwise, ha="center", va="center", fontsize=8, color=GREY, bbox=box)
        return
    red, green, blue, _ = to_rgba(face)
    ink = "#ffffff" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.55 else "#202020"
    interval = "low" in cell and np.isfinite(cell["low"])
    ax.text(
        x, y - (0.1 if interval else 0), f"{_ratio(cell['ratio'])}×", ha="center", va="center", fontsize=11, color=ink
    )
    if interval:
        ax.text(
            x,
            y + 0.22,
            f"{_ratio(cell['low'])} to {_ratio(cell['high'])}",
            ha="center",
            va="center",
            fontsize=7.5,
            color=ink,
        )


def _ratio(value: float) -> str:
    """Two digits after the point, three where the first would be a zero.

    >>> _ratio(1.234), _ratio(0.0312)
    ('1.23', '0.031')
    """
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"
