"""The figures of a study, of transfer, of the published table and of tuners: what is drawn, and what is refused."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from tvmlab import published
from tvmlab.core import InputError
from tvmlab.plots_published import published_bars, published_beside
from tvmlab.plots_study import arm_costs, arm_curves, budget_curve
from tvmlab.plots_style import caption
from tvmlab.plots_transfer import transfer_heat
from tvmlab.plots_tuners import tuner_bands, tuner_curves


@pytest.fixture
def ax():
    return Figure().subplots()


def texts(ax):
    return [text.get_text() for text in ax.texts]


PAIRS = pd.DataFrame(
    [("a", "b", 0.5, 0.4, 0.6), ("b", "a", 2.0, 1.9, np.nan), ("b", "b", 1.0, 0.9, 1.1)],
    columns=["model", "source", "ratio", "low", "high"],
)


def test_the_heat_map_says_every_cell(ax):
    transfer_heat(PAIRS, diagonal="own", ax=ax)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "b"]
    assert {"0.50×", "0.40 to 0.60", "2.00×", "1.00×", "own"} <= set(texts(ax))
    colors = {tuple(patch.get_xy()): patch.get_facecolor() for patch in ax.patches}
    faster, slower, even = colors[0.52, -0.47], colors[-0.48, 0.53], colors[0.52, 0.53]
    assert faster[2] > faster[0] and slower[0] > slower[2] and min(even[:3]) > 0.95


def test_a_pair_that_was_not_run_is_hatched(ax):
    transfer_heat(PAIRS.iloc[1:2].assign(low=1.9, high=2.1), ax=ax)
    hatched = [patch for patch in ax.patches if patch.get_hatch()]
    assert len(hatched) == 1 and texts(ax).count("not run") == 1 and texts(ax).count("itself") == 2


def test_the_heat_map_refuses_two_rows_for_a_pair(ax):
    with pytest.raises(InputError, match="two rows for a pair"):
        transfer_heat(pd.concat([PAIRS, PAIRS]), ax=ax)
    with pytest.raises(InputError, match="no column 'ratio'"):
        transfer_heat(PAIRS.drop(columns="ratio"), ax=ax)


def test_the_published_bars(ax):
    cells = published.cells()
    published_bars(cells, ax=ax)
    assert sorted(bar.get_height() for bar in ax.patches) == sorted(cells["transferred_ms"])
    levels = {round(path.vertices[0][1], 6) for lines in ax.collections for path in lines.get_paths()}
    assert levels == {round(value, 6) for value in cells.groupby("model")["untuned_ms"].mean()}


def test_the_published_figure_has_one_model_and_nothing_else(ax):
    published_bars(published.cells(), target="googlenet", untuned=False, ax=ax)
    assert len(ax.patches) == 4 and not ax.collections
    with pytest.raises(InputError, match="no target model 'vgg'"):
        published_bars(published.cells(), target="vgg")


def test_the_published_pairs_beside_ours(ax):
    cells = published.cells()
    ours = pd.DataFrame(
        {"model": ["alexnet", "vgg19"], "source": ["resnet50", "alexnet"], "ratio": 0.5, "low": 0.4, "high": 0.6}
    )
    published_beside(cells, ours, ax=ax)
    dots = [x for line in ax.lines if line.get_marker() == "o" for x in line.get_xdata()]
    assert sorted(dots) == sorted(cells["ratio"])
    (bars,) = ax.containers
    assert bars.lines[0].get_xdata().tolist() == [0.5]  # a pair that the report lacks is not drawn


CELLS = pd.DataFrame(
    [
        ("a", "", "ansor", 0, 30.0, 10.0, 500.0, 100.0, 0.0),
        ("a", "", "ansor", 1, 20.0, 10.0, 500.0, 110.0, 0.0),
        ("a", "", "ansor", 2, 40.0, 10.0, 500.0, 90.0, 0.0),
        ("a", "b", "transfer", 0, 50.0, 10.0, 500.0, 20.0, 100.0),
        ("b", "", "ansor", 0, np.nan, np.nan, np.nan, 20.0, 0.0),
    ],
    columns=["model", "source", "arm", "seed", "end_to_end_ms", "onnxruntime_ms", "untuned_ms", "search_s",
             "source_search_s"],
)  # fmt: skip
# As of inferences timed in turns: not what the medians give.
CELLS["vs_onnxruntime"] = [3.5, 2.5, 4.5, 5.5, np.nan]
CELLS["speedup"] = [20.0, 25.0, 10.0, 8.0, np.nan]


def test_what_an_arm_costs_and_gives(ax):
    arm_costs(CELLS, ax=ax)
    dots = [tuple(map(float, *line.get_xydata())) for line in ax.lines if len(line.get_xdata()) == 1]
    assert dots == [(100.0, 3.5), (20.0, 5.5)]
    spans = [path.vertices.tolist() for lines in ax.collections for path in lines.get_paths()]
    assert [[100.0, 2.5], [100.0, 4.5]] in spans and [[20.0, 5.5], [120.0, 5.5]] in spans
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["ansor", "transfer", "a"]


def test_the_dots_of_an_arm_do_not_hide_each_other(ax):
    arm_costs(pd.concat([CELLS, CELLS.iloc[3:4].assign(source="c")]), ax=ax)
    xs = [float(line.get_xdata()[0]) for line in ax.lines if len(line.get_xdata()) == 1]
    assert xs[0] == 100.0 and xs[1] < 20.0 < xs[2] and xs[1] + xs[2] == pytest.approx(40.0)


def test_arms_against_the_untuned_model(ax):
    arm_costs(CELLS, versus="untuned", ax=ax)
    assert ax.get_ylabel() == "end to end / untuned"
    assert [float(line.get_ydata()[0]) for line in ax.lines if len(line.get_xdata()) == 1] == [0.05, 0.125]
    with pytest.raises(InputError, match="nothing was timed against 'torch'"):
        arm_costs(CELLS, versus="torch")
    with pytest.raises(InputError, match="no whole model"):
        arm_costs(CELLS.iloc[4:])


def curves(arm, seed, points, source="", model="a"):
    rows = [(model, source, arm, seed, trial, elapsed, ms) for trial, (elapsed, ms) in enumerate(points)]
    return pd.DataFrame(rows, columns=["model", "source", "arm", "seed", "trial", "elapsed_s", "estimate_ms"])


def test_the_curve_of_an_arm_is_its_seeds_median(ax):
    table = pd.concat(
        [
            curves("ansor", 0, [(1, np.nan), (2, 10.0), (6, 4.0)]),
            curves("ansor", 1, [(3, 20.0), (5, 6.0)]),
            curves("ansor", 2, [(1, 30.0), (6, 8.0)]),
            curves("transfer", 0, [(1, 5.0)], source="b"),
        ]
    )
    arm_curves(table, "a", ax=ax)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["ansor", "transfer from b"]
    xs, ys = ax.lines[0].get_data()
    assert (xs[0], ys[0]) == (3, 20.0) and (xs[-1], ys[-1]) == (6, 6.0)
    with pytest.raises(InputError, match="no curve of 'c': there are a"):
        arm_curves(table, "c")


def test_budgets_that_were_not_run_are_crosses(ax):
    curve = pd.DataFrame({"run": ["x"] * 4, "trial": [0, 1, 2, 3], "estimate_ms": [9.0, 8.0, 7.0, 6.0]})
    budget_curve(curve, [2, 3, 4, 1000], ax=ax)
    reached = next(line for line in ax.lines if line.get_label() == "budget, reached")
    assert [tuple(point) for point in reached.get_xydata()] == [(2, 7.0), (3, 6.0)]
    missing = next(line for line in ax.lines if line.get_label() == "not run")
    assert missing.get_xdata().tolist() == [4, 1000]
    with pytest.raises(InputError, match="no estimate yet"):
        budget_curve(curve.assign(estimate_ms=np.nan), [2])


def searches():
    rows = [("t", seed, trial, 10.0 - trial - seed, 2.0 * trial) for seed in (0, 1, 2) for trial in (1, 2, 3)]
    rows += [("u", 0, 1, np.nan, 1.0), ("u", 0, 2, 5.0, 2.0)]
    return pd.DataFrame(rows, columns=["tuner", "seed", "trial", "best_us", "elapsed_s"])


def test_tuner_bands_are_quartiles_over_the_seeds():
    bands = tuner_bands(searches()).set_index(["tuner", "x"])
    assert bands.loc[("t", 2)].tolist() == [7.0, 6.5, 7.5]
    assert bands.loc["u"].index.tolist() == [2]


def test_tuner_curves_against_time_and_as_multiples(ax):
    tuner_curves(searches(), x="elapsed_s", least_us=5.0, ax=ax)
    line = next(line for line in ax.lines if line.get_label() == "t")
    assert line.get_ydata()[-1] == pytest.approx(6.0 / 5.0) and line.get_xdata()[-1] == 6.0


def test_tuner_curves_of_arms(ax):
    tuner_curves(searches().rename(columns={"tuner": "arm"}), ax=ax)
    assert [line.get_label() for line in ax.lines] == ["t", "u"]


def test_tuner_curves_refuse_what_they_cannot_draw():
    with pytest.raises(InputError, match="cannot run by 'seconds'"):
        tuner_curves(searches(), x="seconds")
    with pytest.raises(InputError, match="times of this space were not recorded"):
        tuner_curves(searches().assign(elapsed_s=np.nan), x="elapsed_s")


def test_a_caption_stands_above_everything(ax):
    assert caption(ax, "recorded somewhere") is ax
    assert ax.figure.get_suptitle() == "recorded somewhere"
