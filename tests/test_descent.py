"""A droplet search told from its trials, and drawn."""

import pandas as pd
import pytest
from matplotlib.figure import Figure

from tvmlab import descent
from tvmlab.core import InputError, Trial, TrialStatus
from tvmlab.plots_descent import descent_figure, descent_knobs, descent_latency, descent_map
from tvmlab.records import TrialWriter

KEY = "a" * 16
START = [[8, 1], 0]


def trial(number, key, decisions, us, rival="", rival_us=(), strategy="droplet"):
    failed = isinstance(us, TrialStatus)
    return Trial(
        task_key=KEY, step=1, strategy=strategy, trial=number, key=key, sketch=0, decisions=decisions,
        status=us if failed else TrialStatus.OK, latencies_s=() if failed else [value * 1e-6 for value in us],
        rival=rival, rival_latencies_s=[value * 1e-6 for value in rival_us],
    )  # fmt: skip


# From `start`, b is tried twice: beside start, and again beside a, after which it is moved to.
TRIALS = [
    trial(1, "start", START, [100.0, 101.0, 99.0], strategy="evolution"),
    trial(2, "a", [[4, 2], 0], [80.0, 82.0, 81.0], "start", [100.0, 100.0, 102.0]),
    trial(3, "b", [[8, 1], 1], [79.0, 81.0, 83.0], "start", [100.0, 101.0, 99.0]),
    trial(4, "c", [[8, 1], 2], TrialStatus.BUILD_ERROR, "start"),
    trial(5, "d", [[2, 4], 0], [90.0, 91.0, 89.0], "a", [81.0, 80.0, 82.0]),
    trial(6, "b", [[8, 1], 1], [70.0, 71.0, 72.0], "a", [80.0, 80.0, 80.0]),
    trial(7, "e", [[4, 2], 1], [90.0, 60.0, 70.0], "b", [70.0, 71.0, 72.0]),
    trial(8, "f", [[8, 1], 3], [200.0, 201.0, 202.0], "b", [70.0, 70.0, 70.0]),
]


@pytest.fixture
def steps():
    return descent.of_trials(TRIALS)


def test_what_became_of_each_neighbour(steps):
    assert steps["outcome"].tolist() == ["moved", "faster", "failed", "rejected", "moved", "rejected", "rejected"]
    assert steps["incumbent"].tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert steps["order"].tolist() == [1, 2, 3, 4, 5, 6, 7] and steps["trial"].tolist() == [2, 3, 4, 5, 6, 7, 8]


def test_what_it_changed(steps):
    assert steps["change"].tolist()[:3] == ["tile 0: 8·1 → 4·2", "choice 1: 0 → 1", "choice 1: 0 → 2"]
    assert steps["change"][4] == "tile 0: 4·2 → 8·1; choice 1: 0 → 1"


def test_the_ratio_is_that_of_the_pairs(steps):
    assert steps["ratio"][5] == pytest.approx(70 / 72)  # of 90/70, 60/71 and 70/72
    assert steps["pairs"].tolist() == [3, 3, 0, 3, 3, 3, 3]
    assert steps["rival_us"][0] == pytest.approx(100.0) and steps["latency_us"].isna().tolist()[2]


def test_the_way_down_in_words(steps):
    said = descent.moves(steps)
    assert said[0] == "1. tile 0: 8·1 → 4·2: 20.0 % faster over 3 pairs."
    assert said[-1] == "After that 2 neighbours more, none of which was taken."


def test_a_start_that_is_not_known_and_one_measured_first():
    (alone,) = descent.of_trials(TRIALS[1:2]).itertuples()
    assert alone.changed == () and alone.outcome == "moved"
    (first,) = descent.of_trials([trial(1, "start", START, [100.0])]).itertuples()
    assert first.outcome == "start" and first.pairs == 0


def beside_start(number, key, ratios):
    return trial(number, key, [[4, 2], number], [100.0 * ratio for ratio in ratios], "start", [100.0] * len(ratios))


@pytest.mark.parametrize(
    ("neighbours", "outcomes"),
    [
        ([[0.9] * 8, [0.8] * 8, [1.1] * 8], ["faster", "moved", "rejected"]),
        ([[0.9] * 8 + [1.2], [1.1] * 9, [1.1] * 9], ["rejected", "rejected", "rejected"]),
        ([[0.9] * 4], ["moved"]),
        ([[0.9] * 3 + [1.1]], ["rejected"]),
    ],
    ids=["fastest", "not at 0.05 of three", "few pairs, all", "few pairs, not all"],
)
def test_a_move_at_the_very_end_is_found_by_the_test(neighbours, outcomes):
    tried = [beside_start(number, f"n{number}", ratios) for number, ratios in enumerate(neighbours, start=2)]
    steps = descent.of_trials([TRIALS[0], *tried])
    assert steps["outcome"].tolist() == outcomes
    if "moved" in outcomes:
        assert descent.moves(steps)[-1] == "There the search ended."


def test_another_sketch_is_said_to_be_one():
    from dataclasses import replace

    other = replace(TRIALS[1], sketch=1)
    assert descent.of_trials([TRIALS[0], other])["change"].tolist() == ["sketch: 0 → 1"]


def test_a_task_without_a_descent():
    with pytest.raises(InputError, match="droplet measured nothing"):
        descent.of_trials(TRIALS[:1])


@pytest.fixture
def run(make_run):
    folder = make_run([("dense", 200.0)])
    writer = TrialWriter(folder)
    for each in TRIALS:
        writer.append(each)
    writer.close()
    return folder


def test_the_descents_of_a_run(run):
    (row,) = descent.summary(run).itertuples()
    assert (row.task, row.tried, row.moves) == ("conv2d_relu", 7, 2)
    assert row.start_us == pytest.approx(100.0) and row.end_us == pytest.approx(71.0)
    assert row.gain == pytest.approx(1 - 0.8 * 71 / 80)
    assert descent.of(run, "conv2d_relu").equals(descent.of(run, KEY))


def test_each_step_has_a_descent_of_its_own(run):
    from dataclasses import replace

    again = [replace(each, step=3, trial=each.trial + 20, key=f"{each.key}2") for each in TRIALS[1:5]]
    again[3] = replace(again[3], rival="a2")
    writer = TrialWriter(run)
    for each in again:
        writer.append(each)
    writer.close()
    table = descent.summary(run)
    assert table[["step", "tried", "moves"]].values.tolist() == [[1, 7, 2], [3, 4, 1]]
    assert descent.of(run, KEY, step=3)["trial"].tolist() == [22, 23, 24, 25]
    assert descent.of(run, KEY)["trial"].tolist() == [2, 3, 4, 5, 6, 7, 8]


def test_a_descent_is_of_one_task_of_one_run(run, make_run):
    with pytest.raises(InputError, match="no task 'x': the tasks are conv2d_relu"):
        descent.of(run, "x")
    with pytest.raises(InputError, match="of one run"):
        descent.of([run, make_run()], KEY)
    with pytest.raises(InputError, match="measured nothing"):
        descent.of(run, "dense")


def drawn(ax, marker):
    return sorted(
        (float(x), float(y))
        for line in ax.lines
        if line.get_marker() == marker and line.get_transform() == ax.transData
        for x, y in zip(*line.get_data(), strict=True)
    )


def test_what_is_drawn(steps):
    ax = descent_latency(steps, ax=Figure().subplots())
    assert [x for x, _ in drawn(ax, "o")] == [1, 2, 4, 5, 6]  # the far one is an arrow, the failed one a mark
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert {"rejected (3)", "faster, not taken (1)", "moved to (2)", "failed (1)"} <= set(labels)
    assert any("tile 0: 8·1 → 4·2" in text.get_text() for text in ax.texts)


def test_the_knobs_that_were_changed(steps):
    ax = descent_knobs(steps, ax=Figure().subplots())
    assert [label.get_text() for label in ax.get_yticklabels()] == ["tile 0", "choice 1"]
    assert drawn(ax, "o").count((5.0, 0.0)) == 1 and drawn(ax, "|") == [(3.0, 1.0)]


def test_both_in_one_figure(steps):
    above, below = descent_figure(steps)
    assert above.figure is below.figure and above.get_xlim() == below.get_xlim()


def test_the_map_shows_the_best_over_the_other_knobs_and_the_way():
    rows = [
        (a, b, c, "ok" if a + b < 4 else "run_error", 10.0 * a + b + c) for a in (1, 2) for b in (1, 2) for c in (0, 5)
    ]
    points = pd.DataFrame(rows, columns=["a", "b", "c", "status", "latency_us"])
    points.loc[points["status"] != "ok", "latency_us"] = float("nan")
    ax = descent_map(points, [5, 4, 0], "a", "b", ax=Figure().subplots())
    assert sorted(text.get_text() for text in ax.texts) == ["1.00", "1.09", "1.91"]
    assert [tuple(point) for point in ax.lines[0].get_xydata()] == [(1, 0), (1, 0), (0, 0)]
    with pytest.raises(InputError, match="no knob 'd': it has a, b, c"):
        descent_map(points, [0], "a", "d")
