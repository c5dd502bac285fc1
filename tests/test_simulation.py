"""Replay of recorded spaces: the table's answers, the recorded time, and no answer to anything else."""

import json
from dataclasses import replace
from math import isnan

import numpy as np
import pandas as pd
import pytest

from tvmlab.core import Candidate, InputError, RecordError
from tvmlab.descent import of_trials
from tvmlab.experiment import Ansor, AutoTVM
from tvmlab.gains import early_stops, of_replay
from tvmlab.simulation import descend, recorded_space, recorded_spaces, simulate, simulate_steps
from tvmlab.strategies import TUNERS

# 4 x 3 points with one valley, at a=4 and b=20; the last two points are a failure and not valid.
LATENCIES = [9.0, 8.0, 7.0, 8.5, 6.0, 5.0, 3.0, 4.0, 9.5, 9.0, "run_error", None]
TABLE = {
    "about": {"operator": "a test", "cpu": "Test CPU", "recorded": "2026-11-21", "apache-tvm": "0.27.0"},
    "knobs": {"a": [1, 2, 4, 8], "b": [10, 20, 40]},
    "starts": [9],
    "features": [[float(index)] for index in range(12)],
    "table": LATENCIES,
    "seconds": [None if answer is None else [0.25, 0.125] for answer in LATENCIES],
}


@pytest.fixture
def path(tmp_path):
    (tmp_path / "small.json").write_text(json.dumps(TABLE))
    return tmp_path / "small.json"


@pytest.fixture
def space(path):
    return recorded_space(path)


def test_the_frame_has_every_point(space):
    points = space.frame()
    assert points.iloc[6].to_dict() == {"a": 4, "b": 20, "status": "ok", "latency_us": 3.0}
    assert points["status"].value_counts().to_dict() == {"ok": 10, "run_error": 1, "not valid": 1}
    assert space.least_us == pytest.approx(3.0)
    assert "a test" in space.label and "Test CPU" in space.label and "2026-11-21" in space.label


def test_a_space_of_a_gpu_names_its_device(tmp_path):
    about = {**TABLE["about"], "device": "Test GPU"}
    del about["cpu"]  # benchmarks/gpu_jobs.py writes none
    (tmp_path / "gpu.json").write_text(json.dumps({**TABLE, "about": about}))
    assert "recorded 2026-11-21 on Test GPU; TVM" in recorded_space(tmp_path / "gpu.json").label


@pytest.mark.parametrize("tuner", TUNERS)
def test_a_tuner_that_may_go_on_finds_the_best_and_is_charged_the_recorded_time(space, tuner):
    found = simulate(space, tuner, trials=100)
    assert len(found) == 11 and found["trial"].tolist() == list(range(1, 12))
    assert found["best_us"].iloc[-1] == pytest.approx(3.0) and found["best_us"].is_monotonic_decreasing
    assert found["elapsed_s"].tolist() == pytest.approx([0.375 * number for number in range(1, 12)])
    failed = found[found["status"] == "run_error"]
    assert len(failed) == 1 and failed["latency_us"].isna().all()


def test_the_same_arguments_give_the_same_frame(path):
    tuners = list(TUNERS)
    first, second = (simulate(path, tuners, trials=6, seeds=range(3)) for _ in range(2))
    pd.testing.assert_frame_equal(first, second)
    assert first.groupby(["tuner", "seed"]).size().to_dict() == {
        (name, seed): 6 for name in TUNERS for seed in range(3)
    }


def test_the_templates_first_points_are_tried_first_unless_not_wanted(space):
    assert simulate(space, "random", trials=1)["point"].tolist() == [9]
    blind = simulate(space, "random", trials=1, seeds=range(20), starts=False)
    assert blind["point"].nunique() > 3
    assert list(space.space.starts()) == [9]


def test_time_that_was_not_recorded_is_not_made_up(path):
    path.write_text(json.dumps({key: value for key, value in TABLE.items() if key != "seconds"}))
    assert simulate(path, "grid", trials=3)["elapsed_s"].isna().all()


def test_what_was_never_measured_is_refused(space):
    (known,) = [space.space.realize(6)]
    assert space.measure([known])[0].latency_s == pytest.approx(3e-6)
    strangers = [
        replace(known, task_key="f" * 16),
        replace(known, decisions=[12]),
        replace(known, decisions=[-1]),
        replace(known, decisions=[11]),
        replace(known, decisions=[[1, 2], 3]),
        replace(known, rival=Candidate("f" * 16, "0" * 16, 0, [0])),
    ]
    for stranger in strangers:
        with pytest.raises(RecordError, match="is not in the recorded space small"):
            space.measure([stranger])


def test_a_rival_is_answered_beside_its_candidate(space):
    first, second = (space.space.realize(point) for point in (6, 0))
    (trial,) = space.measure([replace(first, rival=second)])
    assert (trial.rival, *trial.rival_latencies_s) == (second.key, pytest.approx(9e-6))


@pytest.mark.parametrize("start", [0, 3, 8])
def test_a_descent_ends_in_the_valley(space, start):
    trials = descend(space, start)
    steps = of_trials(trials, space.space)
    assert min(trial.latency_s for trial in trials if trial.ok) == pytest.approx(3e-6)
    assert trials[0].decisions == [start] and len(trials) < len(space.space)
    moved = steps[steps["outcome"] == "moved"]
    assert moved["latency_us"].iloc[-1] == pytest.approx(3.0)
    assert (moved["ratio"] < 1).all() and set("".join(moved["changed"].sum())) <= {"a", "b"}


def test_a_descent_starts_where_the_seed_says(space):
    starts = {descend(space, seed=seed, trials=1)[0].decisions[0] for seed in range(30)}
    assert len(starts) > 4 and 10 not in starts and 11 not in starts
    for point in (10, 11):
        with pytest.raises(InputError, match=f"point {point} of small did not run"):
            descend(space, point)
    with pytest.raises(InputError, match="cannot have 0 starts"):
        descend(space, starts=0)


def test_more_starts_end_lower_on_a_real_table():
    found = {1: [], 4: []}
    table = recorded_space("resnet50_conv28")
    for starts, ends in found.items():
        for seed in range(12):
            trials = descend(table, seed=seed, starts=starts)
            assert len({trial.key for trial in trials}) == len(trials) <= 200
            ends.append(min(trial.latency_s for trial in trials if trial.ok) * 1e6 / table.least_us)
    change = np.sign(np.subtract(found[4], found[1]))  # the other starts are in the model too: another order of trials
    assert (change < 0).sum() > 2 * (change > 0).sum()
    assert np.mean(found[4]) < np.mean(found[1]) - 0.03


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("smal", "grid"), "no recorded space 'smal': there are .*conv3x3_64x28"),
        (("conv3x3_64x28", "gird"), "no tuner 'gird': there are .*grid"),
        (("conv3x3_64x28", ["grid", "x"]), "no tuner 'x'"),
        (("conv3x3_64x28", "grid", 0), "0 trials"),
    ],
)
def test_wrong_names(arguments, problem):
    with pytest.raises(InputError, match=problem):
        simulate(*arguments)


def test_the_spaces_that_came_with_the_project():
    table = recorded_spaces()
    assert "conv3x3_64x28" in table.index
    for name, row in table.iterrows():
        found = recorded_space(name)
        assert len(found.space) == row["points"] >= row["valid"] > 30
        assert row["times"] == (not np.isnan(found.run_s).all())
        assert isnan(found.run_s[0]) or found.run_s[0] > 0
        assert found.about["unit"] == "us"


# Steps as a run carries them out


def steps(path, past=None, seeds=0, **knobs):
    return simulate_steps(path, {"step": AutoTVM(**knobs)}, seeds, past)


def test_a_step_measures_what_it_was_asked_and_no_more_than_there_is(path):
    assert len(steps(path, kernel_trials=7)) == 7
    whole = steps(path, kernel_trials=500, early_stopping_threshold="100 %", seeds=range(2))
    assert whole.groupby("seed").size().tolist() == [11, 11] and whole["point"].nunique() == 11
    assert whole.columns.tolist() == [
        "arm", "seed", "trial", "strategy", "point", "status", "latency_us", "best_us", "elapsed_s"
    ]  # fmt: skip
    assert steps(path, kernel_trials=7, max_trials=3)["trial"].tolist() == [1, 2, 3]


def test_the_batch_under_way_is_not_known_when_the_next_is_chosen(path, monkeypatch):
    asked, told = [], []
    tuner = TUNERS["random"]
    monkeypatch.setattr(tuner, "ask", lambda self, count, ask=tuner.ask: asked.append(count) or ask(self, count))
    monkeypatch.setattr(
        tuner, "tell", lambda self, given, trials, tell=tuner.tell: told.append(len(asked)) or tell(self, given, trials)
    )
    steps(path, kernel_trials=8, tuner="random", batch_size=4)
    assert asked == [4, 4, 3]  # the template's first point comes alone
    assert told == [2, 3, 3]  # each batch is asked for before the one before it is told


@pytest.mark.parametrize("threshold", [3, 20, "10 %"])
def test_early_stopping_ends_a_step_within_two_batches(threshold):
    found = simulate_steps(
        "conv3x3_64x28",
        {"step": AutoTVM(kernel_trials=200, tuner="random", batch_size=8, early_stopping_threshold=threshold)},
        seeds=range(3),
    )
    wanted = 20 if threshold == "10 %" else threshold
    for _, part in found.groupby("seed"):
        (stop,) = early_stops(of_replay(part), [wanted])["trials"]
        assert len(part) < 200 and stop <= len(part) <= stop + 2 * 8


def test_what_an_earlier_search_measured_counts_and_its_best_is_measured_again(path):
    first = steps(path, kernel_trials=5, tuner="random", early_stopping_threshold="100 %", seeds=range(3))
    second = steps(path, first, kernel_trials=8, early_stopping_threshold="100 %", seeds=range(3))
    for seed in range(3):
        before, after = (found[found["seed"] == seed] for found in (first, second))
        assert len(after) == 1 + 8 - 5
        assert after["strategy"].iloc[0] == "past" and after["latency_us"].iloc[0] == before["latency_us"].min()
        assert set(before["point"]).isdisjoint(after["point"].iloc[1:])
    enough = steps(path, first, kernel_trials=5, early_stopping_threshold="100 %")
    assert enough["strategy"].tolist() == ["past"]
    afresh = steps(path, first, kernel_trials=5, reuse=False)
    assert len(afresh) == 5 and "past" not in set(afresh["strategy"])


@pytest.mark.parametrize("arms", [{}, {"a": Ansor()}, {"a": AutoTVM(warm_start=["a run"])}])
def test_what_cannot_be_replayed_is_refused(space, arms):
    with pytest.raises(InputError, match=r"arms .* cannot be replayed: pass a name and an AutoTVM step each"):
        simulate_steps(space, arms)


def test_exploration_is_at_least_so_many_new_trials_of_which_some_start_at_random(space):
    first = steps(space, kernel_trials=4, tuner="random")
    arms = {name: AutoTVM(kernel_trials=4, exploration_trials=6, random_trials=count, tuner="grid")
            for name, count in (("grid", 0), ("random", 6))}  # fmt: skip
    found = simulate_steps(space, arms, past=first)
    assert found.groupby("arm").size().tolist() == [7, 7]  # the best again, and six
    points = {name: part["point"].tolist()[1:] for name, part in found.groupby("arm")}
    assert points["grid"] == sorted(points["grid"]) != points["random"]


def test_the_past_of_two_arms_is_refused(path):
    first = steps(path, kernel_trials=2)
    with pytest.raises(InputError, match="several arms"):
        steps(path, pd.concat([first, first.assign(arm="other")]))
