"""What further trials gain, early stopping and time-outs after the fact, and the figures."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from tvmlab import frames, gains
from tvmlab.core import InputError, TrialStatus
from tvmlab.plots_knobs import arm_ends, doubling_shares, stopping_costs
from tvmlab.search.allocate import Allocator


@pytest.fixture
def ax():
    return Figure().subplots()


def searches(*curves, exhausted=False):
    parts = [
        pd.DataFrame({"search": f"s{n}", "trial": range(1, len(best) + 1), "best_us": best, "exhausted": exhausted})
        for n, best in enumerate(curves)
    ]
    return pd.concat(parts, ignore_index=True)


def falling(trials, *falls):
    """A curve that begins at 100 us and is at a value from a trial on."""
    best = np.full(trials, 100.0)
    for trial, value in falls:
        best[trial - 1 :] = value
    return best


def test_doubling_counts_the_searches_that_gain():
    found = gains.doublings(searches(falling(32, (12, 90.0)), falling(32, (9, 99.5), (20, 50.0)), falling(32)))
    assert found["trials"].tolist() == [8, 16]
    assert found["gaining"].tolist() == [1, 1] and found["searches"].tolist() == [3, 3]
    assert found["largest_gain"].tolist() == pytest.approx([0.1, 1 - 50 / 99.5])
    assert found["median_gain"].tolist() == pytest.approx([0.005, 0.0])


def test_a_search_that_ended_by_its_budget_says_nothing_beyond():
    found = gains.doublings(searches(falling(40, (35, 50.0)), falling(20)))
    assert found[["trials", "searches", "gaining"]].values.tolist() == [[8, 2, 0], [16, 1, 0]]


def test_a_search_that_used_up_its_space_cannot_gain():
    ended = searches(falling(10, (10, 50.0)), exhausted=True)
    long = searches(falling(64)).assign(search="long")
    found = gains.doublings(pd.concat([ended, long]))
    assert found[["trials", "searches", "gaining"]].values.tolist() == [[8, 2, 1], [16, 2, 0], [32, 2, 0]]


def test_a_search_without_a_latency_does_not_count():
    found = gains.doublings(searches(np.full(40, np.nan), falling(40)))
    assert found["searches"].tolist() == [1, 1]
    assert gains.doublings(searches(falling(4))).empty


def test_budgets_count_only_the_searches_that_went_so_far():
    runs = {"a": [8.0, 6.0, 5.0, 4.0], "b": [10.0, 4.0]}
    curve = pd.concat(
        pd.DataFrame({"run": name, "trial": range(1, len(found) + 1), "estimate_ms": found})
        for name, found in runs.items()
    )
    found = gains.budgets(curve, [1, 2, 4, 8])
    assert found["seeds"].tolist() == [2, 2, 1, 0]
    assert found["estimate_ms"].tolist()[:3] == [9.0, 5.0, 4.0] and np.isnan(found["estimate_ms"].iloc[3])
    assert found["least_ms"].tolist()[:2] == [8.0, 4.0] and found["largest_ms"].tolist()[:2] == [10.0, 6.0]
    assert found["gain"].tolist()[1:3] == pytest.approx([1 - 5 / 9, 0.2])


@pytest.mark.parametrize("threshold", [1, 3, 7, 50])
def test_early_stopping_ends_a_search_where_the_allocator_does(make_run, threshold):
    rng = np.random.default_rng(threshold)
    latencies = (100 - np.arange(60) // 6 + rng.uniform(0, 8, 60)).tolist()
    best = np.minimum.accumulate(latencies)
    (row,) = gains.early_stops(searches(best), [threshold]).to_dict("records")
    info = make_run().tasks[0]
    allocator = Allocator([info], {}, None, threshold)
    trials = 0
    while trials < len(latencies) and allocator.next_task():
        allocator.record(info.key, [latencies[trials]])
        trials += 1
    assert row["trials"] == trials and row["share"] == trials / 60
    assert row["loss"] == pytest.approx(best[trials - 1] / best[-1] - 1)


def test_thresholds_below_one_are_refused():
    with pytest.raises(InputError, match="cannot stop after 0 trials"):
        gains.early_stops(searches(falling(8)), [4, 0])


def test_the_searches_of_a_run_are_numbered_task_by_task(make_run):
    failed = ("dense", TrialStatus.RUN_ERROR)
    run = make_run([("dense", 300.0), ("conv2d_relu", 500.0), failed, ("dense", 350.0), ("dense", 200.0)])
    found = gains.of_runs(run)
    dense = found[found["search"] == f"{run.id} dense"]
    assert dense["trial"].tolist() == [1, 2, 3, 4] and dense["best_us"].tolist() == pytest.approx(
        [300.0, 300.0, 300.0, 200.0]
    )
    assert found["search"].nunique() == 2 and not found["exhausted"].any()


def test_one_long_search_of_a_model_is_cut_into_its_tasks(make_run):
    """As benchmarks/record_runs.py budgets makes it: thousands of trials of some tasks, few of others."""
    rng = np.random.default_rng(0)
    names = rng.choice(["conv2d_relu", "dense"], 10_000, p=[0.9, 0.1]).tolist()
    latencies = dict(zip(["conv2d_relu", "dense"], (900.0, 300.0), strict=True))
    falls = 1 - np.arange(10_000) / 12_000
    run = make_run([(name, latencies[name] * fall) for name, fall in zip(names, falls, strict=True)])
    found = gains.of_runs([run])
    assert found.groupby("search")["trial"].max().tolist() == [names.count("conv2d_relu"), names.count("dense")]
    doubled = gains.doublings(found).set_index("trials")
    assert doubled.index.tolist() == [2**power for power in range(3, 13)]  # up to 4,096, which 8,192 follow
    assert doubled.loc[[256, 1024, 2048, 4096], "searches"].tolist() == [2, 1, 1, 1]
    assert doubled.loc[4096, "largest_gain"] == pytest.approx(0.6, abs=0.05)


def timed(*trials, run="a"):
    """A frame of trials: (task, trial, latency in us, seconds of building, seconds of running)."""
    found = pd.DataFrame(trials, columns=["task", "trial", "latency_us", "build_s", "run_s"])
    return found.assign(run=run, step=0, key=[f"k{number}" for number in range(len(found))])


def costs(trials, knob, *limits_s):
    found = gains.timeouts(trials, limits_s).query("knob == @knob")
    assert found["limit_s"].tolist() == list(limits_s)
    return found[["lost", "changed", "loss"]].values.tolist()


def test_a_timeout_loses_what_took_longer_and_the_best_with_it():
    trials = timed(
        ("conv", 0, 90.0, 0.1, 0.1), ("conv", 1, 50.0, 3.0, 0.1), ("conv", 2, 60.0, 0.4, 2.0),
        ("dense", 0, 9.0, 0.1, 0.1), ("dense", 1, 20.0, 3.0, 0.1), ("dense", 2, np.nan, 30.0, 0.0),
    )  # fmt: skip
    assert costs(trials, "build_timeout_s", 0.5, 3, 30) == [[2, 1, pytest.approx(0.2)], [0, 0, 0.0], [0, 0, 0.0]]
    assert costs(trials, "run_timeout_s", 1.0) == [[1, 0, 0.0]]
    found = gains.timeouts(pd.concat([trials, trials.assign(run="b")]), [0.5]).iloc[0]
    assert (found["trials"], found["lost"], found["tasks"], found["changed"]) == (6, 4, 4, 2)
    assert found["share"] == pytest.approx(4 / 6)


def test_a_default_kernel_that_is_late_takes_its_task_with_it():
    trials = timed(("conv", 0, 90.0, 2.0, 10.0), ("conv", 1, 50.0, 0.1, 0.1), ("dense", 1, 20.0, 0.1, 0.1))
    assert costs(trials, "build_timeout_s", 1.0, 2.0) == [[1, 1, np.inf], [0, 0, 0.0]]
    assert costs(trials, "run_timeout_s", 0.5, 1.0) == [[1, 1, np.inf], [0, 0, 0.0]]  # it has 15 times as long


def test_a_reading_that_was_refuted_was_nobodys_best():
    trials = timed(("conv", 1, 10.0, 5.0, 0.1), ("conv", 2, 50.0, 0.1, 0.1), ("conv", 3, 55.0, 0.1, 0.1))
    trials["key"] = ["x", "y", "x"]
    assert costs(trials, "build_timeout_s", 1.0) == [[0, 0, 0.0]]


def test_timeouts_are_of_the_frame_of_trials(make_run):
    found = gains.timeouts(frames.trials(make_run()), [0.05, 0.15, 1.0])
    assert found["trials"].unique().tolist() == [3] and found["tasks"].unique().tolist() == [2]
    assert found.groupby("knob")["lost"].apply(list).to_dict() == {
        "build_timeout_s": [3, 3, 0],
        "run_timeout_s": [3, 0, 0],
    }
    with pytest.raises(InputError, match="no trial ends within 0 s: give time-outs above 0 s"):
        gains.timeouts(frames.trials(make_run()), [1.0, 0])
    assert (gains.timeouts(timed(), [1.0])[["trials", "lost", "changed", "loss"]] == 0).all(axis=None)


def test_the_searches_of_the_report():
    found = gains.of_report()
    ends = found.groupby("search").agg(trials=("trial", "max"), best_us=("best_us", "last"))
    assert len(ends) == 78 and (ends["trials"] >= 64).all()
    assert ends.loc[ends["trials"] > 64, "best_us"].isna().all()  # every trial of the long ones failed
    one = found[found["search"] == "ansor resnet50 0"]["best_us"]
    assert one.is_monotonic_decreasing and one.iloc[0] == pytest.approx(4026.666)


def test_the_searches_of_a_replay():
    frame = pd.DataFrame({"arm": ["a", "a", "b"], "seed": [0, 1, 0], "trial": [1, 1, 1], "best_us": [3.0, 2.0, 1.0]})
    found = gains.of_replay(frame, exhausted=True)
    assert found["search"].tolist() == ["a 0", "a 1", "b 0"] and found["exhausted"].all()
    assert gains.of_replay(frame.rename(columns={"arm": "tuner"}))["search"].tolist() == ["a 0", "a 1", "b 0"]


def test_the_figure_of_doublings_says_how_many_searches(ax):
    found = gains.doublings(searches(falling(32, (12, 90.0)), falling(32)))
    doubling_shares({"some": found, "none": found.iloc[:0]}, ax=ax)
    (line,) = ax.lines
    assert line.get_xdata().tolist() == [8, 16] and line.get_ydata().tolist() == [0.5, 0.0]
    assert [text.get_text() for text in ax.texts] == ["2", "2"]
    with pytest.raises(InputError, match="long enough"):
        doubling_shares({"none": found.iloc[:0]})


def test_the_figure_of_early_stopping_has_a_dot_a_threshold(ax):
    found = gains.early_stops(searches(falling(20, (10, 50.0)), falling(20)), [4, 12])
    stopping_costs({"some": found}, ax=ax)
    (line,) = ax.lines
    assert line.get_xdata().tolist() == pytest.approx([0.25, (20 + 13) / 40])
    assert line.get_ydata().tolist() == pytest.approx([0.5, 0.0])
    assert [text.get_text() for text in ax.texts] == ["4", "12"]
    stopping_costs({"flat": gains.early_stops(searches(falling(3)), [4, 12])}, ax=Figure().subplots())


def test_thresholds_that_change_nothing_share_a_dot(ax):
    stopping_costs({"some": gains.early_stops(searches(falling(20, (10, 50.0))), [30, 40])}, ax=ax)
    assert [text.get_text() for text in ax.texts] == ["30, 40"]


def test_dots_that_nearly_touch_share_their_text(ax):
    stopping_costs({"a": gains.early_stops(searches(falling(100, (2, 50.0))), [40, 93, 95, 200])}, ax=ax)
    assert [text.get_text() for text in ax.texts] == ["40", "93, 95, 200"]


def test_the_figure_of_ends_has_a_dot_a_seed_and_a_median(ax):
    rows = [("a", 0, 1, 9.0), ("a", 0, 2, 6.0), ("a", 1, 1, 4.0), ("b", 0, 1, 2.0)]
    arm_ends(pd.DataFrame(rows, columns=["arm", "seed", "trial", "best_us"]), 2.0, ax=ax)
    dots, bar, only, _ = (line.get_xdata().tolist() for line in ax.lines[:4])
    assert dots == [2.0, 3.0] and bar == [2.5, 2.5] and only == [1.0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    assert [text.get_text() for text in ax.texts] == ["2 trials", "1 trial"]
