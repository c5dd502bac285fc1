"""The similarity of a model's tasks as a figure: the matrix, its clusters framed, their representatives named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle

from tvmlab import frames
from tvmlab.core import InputError
from tvmlab.plots_style import COLORS, GREY, new_axes

__all__ = ["similarity"]

_MAP = LinearSegmentedColormap.from_list("alike", ("#ffffff", COLORS[5], COLORS[0]))
_LETTER = 0.072  # inches that a letter of a name takes
_MOST_NAMES = 48  # tasks beyond which only the clusters of several are named


def similarity(run: Any, *, ax: Axes | None = None) -> Axes:
    """The matrix of `tvmlab.similarity`, or of a run's Selective step: a cell a pair of tasks, a frame a cluster.

    The darker, the more of their spaces two tasks share. A cluster is named after its representative, the task that is
    searched and its first row. Raises InputError for a frame of anything else.
    """
    matrix = run if isinstance(run, pd.DataFrame) else frames.similarity(run)
    clusters = matrix.attrs.get("clusters")
    names = list(matrix.index)
    if not clusters or [task for cluster in clusters for task in cluster] != names or list(matrix.columns) != names:
        raise InputError("this frame is no similarity matrix", remedy="pass what tvmlab.similarity returned, or a run")
    side = min(8.0, 1.4 + 0.16 * len(names))
    labels = _LETTER * max(len(cluster[0]) + 5 for cluster in clusters)
    ax = ax if ax is not None else new_axes(labels + side + 1.2, side + 0.6)  # square cells fill it
    image = ax.imshow(matrix.to_numpy(float), cmap=_MAP, vmin=0.0, vmax=1.0, interpolation="none")
    ticks = _frame_clusters(ax, clusters, every=len(names) <= _MOST_NAMES)
    ax.set_yticks([place for place, _ in ticks], [label for _, label in ticks], fontsize=7)
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_color("#d0d0d0")
    figure: Any = ax.get_figure()
    bar = figure.colorbar(image, ax=ax, shrink=0.6, ticks=np.linspace(0, 1, 5))
    bar.set_label("similarity of the tuning spaces", fontsize=8)
    bar.outline.set_visible(False)
    alone = sum(len(cluster) == 1 for cluster in clusters)
    text = f"{len(names)} tasks in {len(clusters)} clusters, {alone} of a single task"
    ax.set_title(text, loc="left", fontsize=8, color=GREY)
    return ax


def _frame_clusters(ax: Axes, clusters: list[list[str]], every: bool) -> list[tuple[float, str]]:
    """Draw the frames; where each cluster's name goes, and its text."""
    found, start = [], 0
    for cluster in clusters:
        size = len(cluster)
        ax.add_patch(Rectangle((start - 0.5, start - 0.5), size, size, fill=False, edgecolor=COLORS[1], lw=1.2))
        if every or size > 1:
            more = f" + {size - 1}" if size > 1 else ""
            found.append((start + (0 if every else (size - 1) / 2), f"{cluster[0]}{more}"))
        start += size
    return found
