"""What is drawn: numbers read back from the Axes, labels, and that pyplot's state stays as it is."""

from __future__ import annotations

import importlib
import io
import pkgutil
import sys
import threading

import numpy as np
import pandas as pd
import pytest
from conftest import ENVIRONMENT
from matplotlib import pyplot
from matplotlib.figure import Figure
from PIL import Image

import tvmlab
from tvmlab import frames, plots
from tvmlab.core import InputError, TrialStatus
from tvmlab.experiment import Ansor

TRIALS = [
    ("conv2d_relu", 500.0),
    ("dense", TrialStatus.RUN_ERROR),
    ("dense", 100.0),
    ("conv2d_relu", 250.0),
    ("conv2d_relu", 300.0),
]
ESTIMATES_MS = [2.4, 1.4, 1.1, 0.6]  # where the estimate changes: trials 0, 1, 3 and 4
COMPARISON = {
    "subjects": {"tvmlab": {"samples_ms": [0.7]}, "onnxruntime": {"samples_ms": [0.5, 0.6, 0.7]}},
    "ratios": [],
}


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    pyplot.close("all")


def test_the_figures_of_all_modules_are_in_plots():
    names = [module.name for module in pkgutil.iter_modules(tvmlab.__path__, "tvmlab.")]
    others = {name for name in names if name.startswith("tvmlab.plots_")} - {"tvmlab.plots_style"}
    figures = {figure for name in others for figure in importlib.import_module(name).__all__}
    assert "arm_costs" in figures and figures <= set(plots.__all__)
    assert all(callable(getattr(plots, figure)) for figure in plots.__all__)


def an_axes():
    return Figure(figsize=(7, 4)).add_subplot()


def texts(ax):
    return [text.get_text() for text in ax.texts]


def test_one_run_is_its_curve(make_run):
    ax = plots.latency_vs_trials(make_run(TRIALS), ax=an_axes())
    line = ax.lines[0]
    assert line.get_xdata().tolist() == [0, 1, 3, 4, 5]
    assert line.get_ydata().tolist() == pytest.approx([*ESTIMATES_MS, 0.6])
    assert line.get_drawstyle() == "steps-post"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("trials", "model estimate (ms)")


def test_seeds_become_a_median_with_a_band_from_least_to_largest(make_run):
    runs = [make_run([("conv2d_relu", latency)], seed=seed) for seed, latency in enumerate([500.0, 300.0, 100.0])]
    bands = plots.latency_bands(runs)
    assert bands["line"].nunique() == 1 and (bands["runs"] == 3).all()
    assert bands["x"].tolist() == [0, 1]
    assert bands["median"].tolist() == pytest.approx([2.4, 1.0])
    assert bands["low"].tolist() == pytest.approx([2.4, 0.6])
    assert bands["high"].tolist() == pytest.approx([2.4, 1.4])
    ax = plots.latency_vs_trials(runs, ax=an_axes())
    assert len(ax.collections) >= 1
    assert "median of 3 seeds, band from least to largest" in ax.get_legend().get_texts()[0].get_text()


def test_runs_that_differ_in_more_than_the_seed_are_lines_of_their_own(make_run):
    runs = [
        make_run(TRIALS),
        make_run(TRIALS, steps=[Ansor(max_trials=8)]),
        make_run(TRIALS, model="alexnet"),
    ]
    lines = plots.latency_bands(runs)["line"].unique().tolist()
    assert lines == [
        "squeezenet, Ansor(max_trials=16)",
        "squeezenet, Ansor(max_trials=8)",
        "alexnet, Ansor(max_trials=16)",
    ]
    limited = plots.latency_bands([runs[0], make_run(TRIALS, time_limit_s=60.0)])["line"].unique()
    assert len(limited) == 2 and "time_limit_s=60.0" in limited[1]


def test_no_line_is_lost_where_neither_target_nor_experiment_tells_the_lines_apart(make_run):
    other = {**ENVIRONMENT, "target": {**ENVIRONMENT["target"], "label": "other-cpu"}}
    runs = [make_run(TRIALS), make_run(TRIALS, environment=other), make_run(TRIALS, time_limit_s=60.0)]
    lines = plots.latency_bands(runs)["line"].unique()
    assert len(lines) == 3
    assert [line.endswith(", other-cpu") for line in lines] == [False, True, False] and "time_limit_s=60.0" in lines[2]


def test_a_run_that_ended_early_keeps_its_best_in_the_band(make_run):
    runs = [make_run([("dense", 200.0)]), make_run([("dense", 300.0), ("dense", 100.0)], seed=1)]
    bands = plots.latency_bands(runs)
    assert bands["x"].tolist() == [0, 1, 2]
    assert bands["low"].tolist() == pytest.approx([2.4, 2.2, 2.1])
    assert bands["high"].tolist() == pytest.approx([2.4, 2.3, 2.2])


def test_against_time_a_line_begins_when_the_estimate_does(make_run):
    bands = plots.latency_bands(make_run(TRIALS, seconds_per_trial=2.0), x="elapsed_s")
    assert bands["x"].tolist() == pytest.approx([1, 3, 7, 9, 11])
    assert bands["median"].tolist() == pytest.approx([*ESTIMATES_MS, 0.6])


def test_long_runs_are_thinned_and_keep_their_ends(make_run, monkeypatch):
    monkeypatch.setattr(plots, "_POINTS", 10)
    folder = make_run([("dense", 400.0 - number) for number in range(200)])
    bands = plots.latency_bands(folder)
    assert len(bands) <= 10
    assert bands["x"].iloc[[0, -1]].tolist() == [0, 200]
    assert bands["median"].iloc[-1] == pytest.approx(frames.curve(folder)["estimate_ms"].iloc[-1])


def test_references_are_labelled_lines_that_say_what_they_measure(make_run):
    folder = make_run(TRIALS, comparison=COMPARISON)
    ax = plots.latency_vs_trials(folder, ax=an_axes())
    assert set(texts(ax)) == {
        "untuned 2.4 ms\nmodel estimate", "tuned 0.7 ms\nend-to-end", "onnxruntime 0.6 ms\nend-to-end",
        "roofline 0.16 ms\nmodel estimate", "best 0.6 ms\nmodel estimate",
    }  # fmt: skip
    levels = sorted(line.get_ydata()[0] for line in ax.lines if len(set(line.get_ydata())) == 1)
    assert levels == pytest.approx([0.16, 0.6, 0.7, 2.4])
    bare = plots.latency_vs_trials(folder, references=False, ax=an_axes())
    assert texts(bare) == ["best 0.6 ms\nmodel estimate"] and len(bare.lines) == 1
    mixed = plots.latency_vs_trials([folder, make_run(TRIALS, model="alexnet")], ax=an_axes())
    assert texts(mixed) == []  # references of two models would not say whose they are


def test_labels_never_overlap():
    for wanted in ([0.0, 0.01, 0.02], [0.5, 0.5, 0.5, 0.5], [0.9, 0.99, 1.0], [0.2, 0.21, 0.8]):
        moved = plots._apart(wanted, 0.1)
        assert (np.diff(moved) >= 0.1 - 1e-9).all()
        assert max(moved) <= 1.0
        assert min(moved) >= 0.0
    assert plots._apart([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
    assert plots._apart([0.2, 0.5, 0.9], 0.1) == pytest.approx([0.2, 0.5, 0.9])


@pytest.mark.parametrize(("latency", "scale"), [(5.0, "log"), (990.0, "linear")])
def test_the_axis_is_logarithmic_where_it_spans_more_than_tenfold(make_run, latency, scale):
    folder = make_run([("conv2d_relu", latency)], environment=None, defaults={"conv2d_relu": 1000.0})
    ax = plots.latency_vs_trials(folder, task="conv2d_relu", ax=an_axes())
    assert ax.get_yscale() == scale
    low, high = ax.get_ylim()
    assert low < latency and high > 1000.0


def test_a_task_shows_its_valid_trials_as_dots(make_run):
    ax = plots.latency_vs_trials(make_run(TRIALS), task="dense", ax=an_axes())
    assert ax.get_ylabel() == "dense: best latency (µs)"
    dots = ax.collections[-1].get_offsets()
    assert dots.tolist() == [[3, pytest.approx(100.0)]]  # not the failed one, not the untuned one
    assert set(texts(ax)) == {"untuned 400 µs", "roofline 80 µs", "best 100 µs"}
    with pytest.raises(InputError, match="one task"):
        plots.latency_vs_trials(make_run(TRIALS), task="all")


def test_an_empty_run_says_what_it_waits_for(make_run):
    begun = make_run([], tasks=(), environment=None, status="running")
    assert texts(plots.latency_vs_trials(begun, ax=an_axes())) == ["waiting for the first trial"]
    assert texts(plots.task_shares(begun, ax=an_axes())) == ["waiting for the first trial"]
    failing = make_run([("dense", TrialStatus.CRASHED)], defaults={"dense": TrialStatus.CRASHED})
    assert texts(plots.latency_vs_trials(failing, ax=an_axes()))[0].startswith("no estimate yet")


def test_shares_are_of_each_whole_and_the_small_ones_are_lumped(make_run):
    folder = make_run(TRIALS)
    ax = plots.task_shares(folder, ax=an_axes())
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "conv2d_relu (x2)",
        "dense (x1)",
    ]
    untuned, best = ([bar.get_width() for bar in bars] for bars in ax.containers)
    assert untuned == pytest.approx([100 * part / 2400 for part in (2000, 400)])
    assert best == pytest.approx([100 * part / 600 for part in (500, 100)])
    lumped = plots.lump(frames.tasks(folder), top=0)
    assert lumped["task"].tolist() == ["2 other tasks"]
    assert lumped["best_ms"].tolist() == pytest.approx([0.6])
    assert lumped["default_ms"].tolist() == pytest.approx([2.4])
    with pytest.raises(InputError, match="one run"):
        plots.task_shares([folder, make_run(TRIALS)])


def test_the_scatter_puts_failures_at_the_bottom_and_never_at_a_latency(make_run):
    ax = plots.trial_scatter(make_run(TRIALS), "dense", ax=an_axes())
    assert ax.collections[0].get_offsets().tolist() == [[3, pytest.approx(100.0)]]
    rug = next(line for line in ax.lines if line.get_marker() == "|")
    assert rug.get_xdata().tolist() == [2] and rug.get_transform() == ax.get_xaxis_transform()
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["evolution (1)", "best so far", "run_error (1)"]
    with pytest.raises(InputError, match="no task 'pool'"):
        plots.trial_scatter(make_run(TRIALS), "pool")


def test_pyplot_is_left_alone_when_axes_are_given(make_run):
    folder = make_run(TRIALS)
    mine = pyplot.figure()
    for draw in (
        plots.latency_vs_trials,
        plots.task_shares,
        lambda run, ax: plots.trial_scatter(run, "dense", ax=ax),
    ):
        ax = an_axes()
        assert draw(folder, ax=ax) is ax
    plots.latency_png(folder)
    assert pyplot.get_fignums() == [mine.number] and pyplot.gcf() is mine
    assert plots.latency_vs_trials(folder).figure.number in pyplot.get_fignums()


def test_the_live_png_has_its_size_and_draws_from_any_thread(make_run):
    folder, empty = make_run(TRIALS), make_run([], tasks=(), environment=None)
    found: dict[int, bytes] = {}

    def draw(number):
        found[number] = plots.latency_png(folder if number % 2 else empty, width=6, height=3, dpi=50)

    threads = [threading.Thread(target=draw, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Image.open(io.BytesIO(found[1])).size == (300, 150)
    assert len({found[1], found[3], found[5]}) == 1 and len({found[0], found[2], found[4]}) == 1
    assert found[0] != found[1]


def test_the_work_of_the_live_png_hardly_grows_with_the_trials(make_run):
    """In calls, not in seconds: what else the machine does must not decide."""
    latencies = np.random.default_rng(0).lognormal(6, 1, 3000)
    few, many = (make_run([("conv2d_relu", latency) for latency in latencies[:count]]) for count in (300, 3000))
    plots.latency_png(few)  # fonts are found once
    assert _calls(lambda: plots.latency_png(many)) < 1.5 * _calls(lambda: plots.latency_png(few))


def _calls(work):
    count = 0

    def seen(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def test_bands_are_empty_before_the_first_trial(make_run):
    bands = plots.latency_bands(make_run([], tasks=(), environment=None))
    assert isinstance(bands, pd.DataFrame) and bands.empty and "median" in bands
