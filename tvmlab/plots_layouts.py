"""The layouts of a run's model as a figure: each convolution's packings and what they cost, and the transforms paid."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from tvmlab import frames
from tvmlab.core import InputError

__all__ = ["layout_graph"]

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # as in tvmlab.plots
_GREY = "#8c8c8c"


def layout_graph(run: Any, *, ax: Axes | None = None) -> Axes:
    """Each convolution's and dense layer's packings by their latency in us, in the order of the model.

    A filled dot is the packing chosen, a ring one that was measured; its latency is the best of the run so far. A
    packing that was not chosen and has no latency is not drawn: `tvmlab.frames.layouts` says why. Below the sites, in
    grey, the layout transforms that the model makes. Raises InputError for several runs, or one without packing.
    """
    table, paid = frames.layouts(run), frames.layout_transforms(run)
    if table.empty or table["run"].nunique() > 1:
        problem = "several runs" if not table.empty else "the run's model is in NCHW"
        raise InputError(f"no layouts to draw: {problem}", remedy="pass one run with a LayoutTuning or AutoTVM step")
    sites = list(table["site"].unique())
    rows = sites + [f"{row.tensor}: {row.source} → {row.target}" for row in paid.itertuples()]
    if ax is None:
        from matplotlib import pyplot

        _, ax = pyplot.subplots(figsize=(8.0, 1.2 + 0.2 * len(rows)), layout="constrained")
    _draw_packings(ax, table.dropna(subset="best_us"), sites)
    ax.plot(paid["cost_us"].clip(lower=0.1), range(len(sites), len(rows)), "s", color=_GREY, ms=5, ls="none")
    _dress(ax, table, sites, rows)
    return ax


def _draw_packings(ax: Axes, table: pd.DataFrame, sites: list[str]) -> None:
    place = {site: row for row, site in enumerate(sites)}
    for color, (packing, part) in zip(cycle(_COLORS), table.groupby("packing")):
        for chosen, face in ((True, color), (False, "none")):
            shown = part[part["chosen"] == chosen]
            label = packing if chosen or not part["chosen"].any() else None
            if len(shown):
                ys = shown["site"].map(place)
                ax.plot(shown["best_us"], ys, "o", ms=6, mec=color, mfc=face, ls="none", label=label)


def _dress(ax: Axes, table: pd.DataFrame, sites: list[str], rows: list[str]) -> None:
    about = table.drop_duplicates("site").set_index("site")["about"]
    labels = [f"{site}  {about[site]}" for site in sites] + rows[len(sites) :]
    ax.set_yticks(np.arange(len(rows)), labels, fontsize=7)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    if table["best_us"].notna().any():
        ax.set_xscale("log")
    ax.set_xlabel("best latency (µs)")
    ax.grid(axis="y", lw=0.4, color="#e0e0e0")
    ax.spines[["top", "right"]].set_visible(False)
    if (found := table.attrs).get("best_uniform"):
        ax.set_title(
            f"{found['cost_us'] / 1e3:.3g} ms when chosen, {100 * found['gain']:.1f} % less than "
            f"{found['best_uniform']} throughout",
            fontsize=9,
            loc="left",
        )
    if ax.get_legend_handles_labels()[0]:
        # Beside the axes: the sites fill them.
        ax.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0))
