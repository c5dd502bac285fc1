"""The bars of a profile are its numbers."""

import pandas as pd
import pytest
from matplotlib.figure import Figure

from tvmlab.core import InputError
from tvmlab.plots_profile import profile_bars

FRAME = pd.DataFrame(
    {"calls": [2, 1, 1], "in_model_us": [1000.0, 500.0, 3000.0], "tuned_us": [800.0, None, 2500.0]},
    index=["conv", "reshape", "dense"],
)


def draw(**options):
    return profile_bars(FRAME, ax=Figure().subplots(), **options)


def widths(ax):
    return [[bar.get_width() for bar in bars] for bars in ax.containers]


def test_a_bar_is_all_calls_of_an_inference_and_the_largest_is_first():
    ax = draw()
    in_model, tuned = widths(ax)
    assert in_model == [3.0, 2.0, 0.5]
    assert tuned[:2] == [2.5, 1.6] and tuned[2] != tuned[2]  # no record, no bar
    assert [label.get_text() for label in ax.get_yticklabels()] == ["dense", "conv", "reshape"]
    assert "ms" in ax.get_xlabel()


def test_the_small_ones_are_one_bar():
    ax = draw(most=1)
    assert widths(ax) == [[3.0, 2.5], [2.5, 1.6]]
    assert ax.get_yticklabels()[1].get_text() == "2 others"


def test_a_foreign_frame_is_refused():
    with pytest.raises(InputError, match="no column 'calls'"):
        profile_bars(FRAME.drop(columns="calls"))
