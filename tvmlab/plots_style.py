"""What the figures of a study share: colours, an axes of their own, how numbers are written."""

from __future__ import annotations

import textwrap
from typing import Any

from matplotlib.axes import Axes

__all__ = ["COLORS", "GREY", "caption", "new_axes", "number", "tidy"]

# Okabe & Ito, "Color Universal Design" (2008): colours that colour-blind readers tell apart; as in tvmlab.plots.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#8c8c8c"
_LETTERS_PER_INCH = 17  # of a caption


def new_axes(width: float = 7.5, height: float = 3.8) -> Axes:
    """An axes in a new figure of width x height inches."""
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), layout="constrained")[1]


def tidy(ax: Axes, grid: Any = None) -> None:
    """No frame at the top and right; grid lines "x", "y", "both" or None, behind what is drawn."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_axisbelow(True)
    if grid:
        ax.grid(axis=grid, color="#e6e6e6", lw=0.7)


def number(value: float) -> str:
    """Three significant digits, never in powers of ten.

    >>> number(1234.5), number(0.12345)
    ('1,234', '0.123')
    """
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def caption(ax: Axes, text: str) -> Axes:
    """Say in small print above a figure where its data come from (a recording's `label`); returns the axes."""
    figure: Any = ax.get_figure(root=True)
    width = int(_LETTERS_PER_INCH * figure.get_figwidth())
    figure.suptitle(textwrap.fill(text, width), x=0.01, ha="left", fontsize=7.5, color="#6b6b6b")
    return ax
