"""A profile as a figure: what each kernel costs an inference in the model, beside its record."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from tvmlab.core import InputError

__all__ = ["profile_bars"]

_COLORS = {"in the model": "#0072B2", "tuned record": "#E69F00"}  # of Okabe & Ito, as in tvmlab.plots
_HEIGHT = 0.38


def profile_bars(frame: pd.DataFrame, *, most: int = 15, ax: Axes | None = None) -> Axes:
    """Milliseconds of an inference by kernel, in the model and by the records, for a frame of `tvmlab.profile`.

    The `most` rows with the largest time in the model, the largest on top; the rest is one bar. A kernel without a
    record has one bar only. Raises InputError for a frame that is not a profile.
    """
    missing = {"calls", "in_model_us", "tuned_us"} - set(frame.columns)
    if missing:
        raise InputError(f"the frame has no column {sorted(missing)[0]!r}", remedy="pass what tvmlab.profile returned")
    if ax is None:
        from matplotlib import pyplot

        _, ax = pyplot.subplots(figsize=(7.0, 0.6 + 0.32 * min(most + 1, len(frame))), layout="constrained")
    shown = _bars(frame, most)
    places = range(len(shown))
    for shift, (label, color) in zip((-0.5, 0.5), _COLORS.items(), strict=True):
        ax.barh([place + shift * _HEIGHT for place in places], shown[label], _HEIGHT, color=color, label=label)
    ax.set_yticks(list(places), shown.index, fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel("all calls of an inference (ms)")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    return ax


def _bars(frame: pd.DataFrame, most: int) -> pd.DataFrame:
    """The bars in ms, one column a colour."""
    bars = pd.DataFrame(
        {
            "in the model": frame["calls"] * frame["in_model_us"] / 1e3,
            "tuned record": frame["calls"] * frame["tuned_us"] / 1e3,
        }
    ).sort_values("in the model", ascending=False)
    kept = bars.head(most)
    if len(bars) > most:
        kept = pd.concat([kept, bars.iloc[most:].sum().to_frame(f"{len(bars) - most} others").T])
    return kept
