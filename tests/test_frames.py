"""Frames of small runs whose numbers are worked out by hand, and properties that hold for any run."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tvmlab import frames
from tvmlab.core import InputError, RecordError, TrialStatus
from tvmlab.records import RunFolder

COMPARISON = {
    "threads": 2,
    "repeats": 3,
    "subjects": {
        "tvmlab": {"samples_ms": [2.0, 1.0, 3.0]},
        "untuned": {"samples_ms": [9.0, 8.0, 7.0]},
        "onnxruntime": {"samples_ms": [1.0, 1.5, 4.0]},
    },
    "ratios": [
        {"subject": "tvmlab", "baseline": "untuned", "ratio": 0.25, "low": 0.2, "high": 0.3},
        {"subject": "tvmlab", "baseline": "onnxruntime", "ratio": 4 / 3, "low": 0.5, "high": 2.0},
    ],
    "numerics": {"max_error_over_max_output": 1e-6, "bound": 1e-4, "ok": True},
}
# Untuned: 2 x 1000 + 1 x 400 us = 2.4 ms. The trials, in order:
TRIALS = [
    ("conv2d_relu", [490.0, 510.0, 500.0]),  # 2 x 500 + 400 = 1.4 ms
    ("dense", 600.0),  # worse than untuned: no change
    ("conv2d_relu", TrialStatus.BUILD_ERROR),
    ("dense", 100.0),  # 1000 + 100 = 1.1 ms
    ("conv2d_relu", 250.0),  # 500 + 100 = 0.6 ms
    ("conv2d_relu", 300.0),
]
ESTIMATES_MS = [2.4, 1.4, 1.4, 1.4, 1.1, 0.6, 0.6]


def test_trials_hold_each_number_of_the_file(make_run):
    folder = make_run(TRIALS, seed=7)
    frame = frames.trials(folder)
    assert list(frame.columns) == list(frames.COLUMNS)
    assert len(frame) == 8
    row = frame[frame["trial"] == 1].iloc[0]
    assert (row.run, row.model, row.target, row.seed) == (folder.id, "squeezenet", "test-cpu", 7)
    assert (row.task, row.task_key, row.kernel_class) == ("conv2d_relu", "a" * 16, "conv2d+relu")
    assert (row.status, row.strategy, row.step, row.repeats, row.sketch) == ("ok", "evolution", 0, 3, 0)
    assert row.latency_us == pytest.approx(500.0)
    assert row.latency_min_us == pytest.approx(490.0)
    assert row.latency_std_us == pytest.approx(10.0)
    assert row.gflops == pytest.approx(4e6 / 500e-6 / 1e9)
    assert (row.build_s, row.run_s, row.elapsed_s) == (0.2, 0.1, 2.0)
    assert frame["key"].is_unique
    assert (frame.loc[frame["trial"] == 0, "strategy"] == "default").all()


def test_a_failed_trial_has_no_latency_not_a_made_up_one(make_run):
    frame = frames.trials(make_run(TRIALS))
    failed = frame[frame["status"] == "build_error"].iloc[0]
    assert failed[["latency_us", "latency_min_us", "latency_std_us", "gflops"]].isna().all()
    assert failed.repeats == 0


def test_repeated_strings_are_categories_that_agree_between_runs(make_run):
    one, two = make_run(TRIALS), make_run([("dense", 1.0)], strategy="droplet")
    frame = frames.trials([two, one])
    for name in ("run", "model", "target", "strategy", "task", "task_key", "kernel_class", "status"):
        assert isinstance(frame[name].dtype, pd.CategoricalDtype), name
    alone = pd.concat([frames.trials(two).astype({"run": str}), frames.trials(one).astype({"run": str})])
    assert frame["task"].astype(str).tolist() == alone["task"].astype(str).tolist()
    assert frame["strategy"].value_counts()["droplet"] == 1


def test_details_come_only_when_asked_for(make_run):
    folder = make_run(TRIALS)
    assert "decisions" not in frames.trials(folder)
    detailed = frames.trials(folder, details=True)
    assert detailed["decisions"].tolist()[2] == [[1, 2, 4], 1]
    picked = frames.trials(folder, columns=["message", "trial"])
    assert list(picked.columns) == ["message", "trial"]
    assert picked.set_index("trial").loc[3, "message"] == "build_error happened"
    with pytest.raises(InputError, match=r"no column 'latency'.*latency_us"):
        frames.trials(folder, columns=["latency"])


def test_the_numbers_do_not_depend_on_how_the_file_is_cut_into_chunks(make_run, monkeypatch):
    folder = make_run(TRIALS * 20)
    whole = frames.trials(folder)
    monkeypatch.setattr("tvmlab.columns._PARSE_BYTES", 100)
    monkeypatch.setattr("tvmlab.columns._BLOCK_ROWS", 7)
    pd.testing.assert_frame_equal(frames.trials(folder), whole)


@pytest.mark.parametrize("whole", [False, True])
def test_a_line_that_is_written_while_it_is_read_is_left_out(make_run, whole):
    from tvmlab.columns import _parsed

    path = make_run(TRIALS).path / "trials.jsonl"
    *lines, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines) + last[:50])
    reading = _parsed(RunFolder(path.parent), whole=whole)
    assert len(next(reading)) == len(lines)
    path.write_bytes(b"".join([*lines, last, last]))
    assert list(reading) == []


def test_a_torn_last_line_is_left_out_and_a_damaged_one_named(make_run):
    folder = make_run(TRIALS)
    path = folder.path / "trials.jsonl"
    written = path.read_bytes()
    path.write_bytes(written[:-20])
    assert frames.trials(folder)["trial"].max() == len(TRIALS) - 1
    lines = written.splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:4], lines[4][:30] + b"\n", *lines[5:]]))
    with pytest.raises(RecordError, match=r"line 5 of .*trials\.jsonl is damaged"):
        frames.trials(folder)
    path.write_bytes(b'{"task_key":"a","status":"ok"}\n')
    with pytest.raises(RecordError, match="a trial without 'build_s'"):
        frames.trials(folder)


def test_decisions_with_any_keys_are_skipped_without_harm(make_run):
    folder = make_run([("dense", 100.0)])
    path = folder.path / "trials.jsonl"
    odd = b'"decisions":[{"a":1,"status":"odd"},"x,\\"status\\":"]'
    path.write_bytes(path.read_bytes().replace(b'"decisions":[[1,2,4],1]', odd))
    assert odd in path.read_bytes()
    frame = frames.trials(folder, columns=["trial", "status", "latency_us"])
    assert (frame["status"] == "ok").all()
    assert frames.trials(folder, columns=["decisions"])["decisions"].iloc[-1][0] == {"a": 1, "status": "odd"}


def test_runs_are_named_by_folder_id_path_glob_or_run(make_run, monkeypatch):
    one, two = make_run(TRIALS), make_run(TRIALS)
    monkeypatch.setenv("TVMLAB_RUNS", str(one.path.parent))

    class Run:
        folder = one

    for name in (one, one.path, str(one.path), one.id, Run()):
        assert [folder.path for folder in frames.folders(name)] == [one.path]
    both = sorted([one.path, two.path])
    assert [folder.path for folder in frames.folders(str(one.path.parent / "*squeezenet*"))] == both
    assert [folder.path for folder in frames.folders("*squeezenet*")] == both
    assert [folder.path for folder in frames.folders([two, one, two.path])] == [two.path, one.path]
    with pytest.raises(RecordError, match=r"no run matches '\*resnet\*'"):
        frames.folders("*resnet*")
    with pytest.raises(InputError, match="no runs"):
        frames.folders([])
    with pytest.raises(InputError, match="3 is not a run"):
        frames.folders(3)


def test_two_folders_of_one_id_are_refused(make_run, tmp_path):
    folder = make_run(TRIALS)
    copy = tmp_path / "elsewhere" / folder.id
    copy.mkdir(parents=True)
    (copy / "experiment.json").write_bytes((folder.path / "experiment.json").read_bytes())
    with pytest.raises(InputError, match="the same id"):
        frames.trials([folder, copy])


def test_the_model_curve_is_the_weighted_sum_of_bests(make_run):
    frame = frames.curve(make_run(TRIALS))
    assert list(frame.columns) == ["run", "model", "target", "seed", "trial", "elapsed_s", "estimate_ms"]
    assert frame["trial"].tolist() == list(range(7))
    assert frame["estimate_ms"].tolist() == pytest.approx(ESTIMATES_MS)
    assert frame["elapsed_s"].tolist() == pytest.approx([1, 2, 3, 4, 5, 6, 7])


def test_by_time_the_estimate_begins_when_every_task_is_known(make_run):
    frame = frames.curve(make_run(TRIALS), by="elapsed_s")
    assert frame["trial"].tolist() == [0, 0, 1, 2, 3, 4, 5, 6]
    assert frame["estimate_ms"].isna().tolist() == [True] + [False] * 7
    assert frame["estimate_ms"].dropna().tolist() == pytest.approx(ESTIMATES_MS)
    with pytest.raises(InputError, match="by 'hours'"):
        frames.curve(make_run(TRIALS), by="hours")


def test_without_a_default_the_estimate_waits_for_the_first_valid_trial(make_run):
    defaults = {"conv2d_relu": 1000.0, "dense": TrialStatus.RUN_TIMEOUT}
    estimate = frames.curve(make_run(TRIALS, defaults=defaults))["estimate_ms"]
    assert estimate.isna().tolist() == [True, True, False, False, False, False, False]
    assert estimate.dropna().tolist() == pytest.approx([1.6, 1.6, 1.1, 0.6, 0.6])
    never = make_run([("conv2d_relu", 500.0)], defaults={"conv2d_relu": 1000.0})
    assert frames.curve(never)["estimate_ms"].isna().all()


def test_the_curve_of_a_task_counts_its_own_trials(make_run):
    folder = make_run(TRIALS)
    frame = frames.curve(folder, task="dense")
    assert frame["trial"].tolist() == [0, 2, 4]
    assert frame["best_us"].tolist() == pytest.approx([400, 400, 100])
    pd.testing.assert_frame_equal(frame, frames.curve(folder, task="b" * 16))
    every = frames.curve(folder, task="all")
    assert len(every) == 8
    assert every[every["task"] == "dense"]["best_us"].tolist() == pytest.approx([400, 400, 100])
    with pytest.raises(InputError, match=r"no task 'conv'.*conv2d_relu, dense, reshape"):
        frames.curve(folder, task="conv")


def test_tasks_by_hand(make_run):
    frame = frames.tasks(make_run(TRIALS)).set_index("task")
    conv, dense, reshape = (frame.loc[name] for name in ("conv2d_relu", "dense", "reshape"))
    assert (conv.weight, conv.trials, conv.failed, conv.best_trial) == (2, 4, 1, 5)
    assert (dense.trials, dense.failed, dense.best_trial) == (2, 0, 4)
    assert (reshape.trials, reshape.share, reshape.tunable) == (0, 0, False)
    assert pd.isna(reshape.best_trial) and pd.isna(reshape.default_us)
    assert conv.default_us == pytest.approx(1000) and conv.best_us == pytest.approx(250)
    assert conv.speedup == pytest.approx(4)
    assert conv.share == pytest.approx(500 / 600) and conv.default_share == pytest.approx(2000 / 2400)
    assert conv.gflops == pytest.approx(4e6 / 250e-6 / 1e9)
    assert conv.intensity == pytest.approx(40)
    assert conv.roofline_us == pytest.approx(4e6 / 100e9 * 1e6)  # bound by 100 GFLOP/s
    assert dense.roofline_us == pytest.approx(8e5 / 10e9 * 1e6)  # bound by 10 GB/s


def test_tasks_without_a_latency_or_a_roofline_say_so(make_run):
    frame = frames.tasks(make_run([], defaults={"dense": 5.0}, environment={"target": {"label": "x"}}))
    frame = frame.set_index("task")
    assert frame["roofline_us"].isna().all()
    assert math.isnan(frame.loc["conv2d_relu", "best_us"])
    assert frame.loc["conv2d_relu", "best_trial"] is pd.NA
    assert frame["share"].isna().all()  # shares of an unknown whole


def test_a_summary_by_hand(make_run):
    row = frames.summary(make_run(TRIALS, comparison=COMPARISON, seed=3)).iloc[0]
    assert (row.model, row.target, row.seed, row.steps, row.status) == (
        "squeezenet", "test-cpu", 3, "ansor", "done",
    )  # fmt: skip
    assert (row.trials, row.failed, row.build_error, row.crashed) == (6, 1, 1, 0)
    assert row.elapsed_s == pytest.approx(7) and row.trials_per_s == pytest.approx(6 / 7)
    assert row.untuned_estimate_ms == pytest.approx(2.4)
    assert row.best_estimate_ms == pytest.approx(0.6)
    assert row.roofline_ms == pytest.approx((2 * 40 + 80) / 1e3)
    assert (row.end_to_end_ms, row.onnxruntime_ms) == (2.0, 1.5)
    assert (row.ratio, row.ratio_low, row.ratio_high) == (4 / 3, 0.5, 2.0)


def test_a_summary_without_comparison_has_nan_never_the_estimate(make_run):
    row = frames.summary(make_run(TRIALS)).iloc[0]
    assert row[["end_to_end_ms", "onnxruntime_ms", "ratio", "ratio_low", "ratio_high"]].isna().all()


def test_failures_are_grouped_and_carry_their_remedy(make_run):
    trials = [
        ("dense", TrialStatus.RUN_TIMEOUT), ("dense", TrialStatus.RUN_TIMEOUT), ("dense", 5.0),
        ("conv2d_relu", TrialStatus.CRASHED),
    ]  # fmt: skip
    frame = frames.failures(make_run(trials))
    assert frame[["status", "task", "trials"]].values.tolist() == [
        ["run_timeout", "dense", 2], ["crashed", "conv2d_relu", 1],
    ]  # fmt: skip
    assert frame["share"].tolist() == pytest.approx([2 / 4, 1 / 2])
    assert frame["message"].tolist() == ["run_timeout happened", "crashed happened"]
    assert frame["remedy"][0] == TrialStatus.RUN_TIMEOUT.remedy
    assert frames.failures(make_run([("dense", 1.0)])).empty


def test_references_say_what_they_measure(make_run):
    frame = frames.references(make_run(TRIALS, comparison=COMPARISON)).set_index("kind")
    assert frame["value_ms"].to_dict() == pytest.approx(
        {"untuned": 2.4, "end-to-end": 2.0, "onnxruntime": 1.5, "roofline": 0.16}
    )
    assert frame["measure"].to_dict() == {
        "untuned": "model estimate", "roofline": "model estimate",
        "end-to-end": "end-to-end", "onnxruntime": "end-to-end",
    }  # fmt: skip
    assert frames.references(make_run([], environment=None, defaults={})).empty


def test_a_run_that_has_just_begun_gives_empty_frames_with_columns(make_run):
    folder = make_run([], tasks=(), environment=None, status="running")
    assert list(frames.trials(folder).columns) == list(frames.COLUMNS)
    for frame in (frames.trials(folder), frames.curve(folder), frames.tasks(folder), frames.failures(folder)):
        assert frame.empty
    assert "estimate_ms" in frames.curve(folder) and "best_us" in frames.tasks(folder)
    assert "best_us" in frames.curve(folder, task="dense")
    row = frames.summary(folder).iloc[0]
    assert (row.trials, row.target) == (0, "cpu") and math.isnan(row.best_estimate_ms)


def test_a_run_that_has_begun_beside_one_that_has_not(make_run):
    both = [make_run(TRIALS), make_run([], tasks=(), environment=None)]
    assert len(frames.summary(both)) == 2
    assert frames.curve(both)["run"].nunique() == 1
    assert frames.tasks(both)["run"].nunique() == 1


RESULTS = st.one_of(st.floats(1.0, 1e6), st.sampled_from([TrialStatus.CRASHED, TrialStatus.WRONG_RESULT]))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(
    trials=st.lists(st.tuples(st.sampled_from(["conv2d_relu", "dense"]), RESULTS), max_size=30),
    defaults=st.fixed_dictionaries(dict.fromkeys(["conv2d_relu", "dense"], RESULTS)),
    by=st.sampled_from(["trial", "elapsed_s"]),
)
def test_any_curve_falls_and_ends_at_the_sum_of_the_bests(make_run, trials, defaults, by):
    folder = make_run(trials, defaults=defaults)
    estimate = frames.curve(folder, by=by)["estimate_ms"]
    tasks = frames.tasks(folder).query("tunable")
    known = estimate.dropna()
    assert estimate.isna().tolist() == sorted(estimate.isna(), reverse=True)  # NaN only at the start
    assert (np.diff(known) <= 0).all()
    expected_ms = (tasks["weight"] * tasks["best_us"]).sum(skipna=False) / 1e3
    assert estimate.iloc[-1] == pytest.approx(expected_ms, rel=1e-9, nan_ok=True)
    assert frames.summary(folder)["best_estimate_ms"][0] == pytest.approx(expected_ms, nan_ok=True)
    if len(known):
        assert tasks["share"].sum() == pytest.approx(1)


def test_reading_leaves_the_folder_as_it_is(make_run):
    folder = make_run(TRIALS, comparison=COMPARISON)
    before = {path.name: path.read_bytes() for path in folder.path.iterdir() if path.name != "lock"}
    frames.summary(folder), frames.curve(folder), frames.tasks(folder), frames.failures(folder)
    assert {path.name: path.read_bytes() for path in folder.path.iterdir() if path.name != "lock"} == before


def test_a_folder_that_is_not_a_run_is_refused():
    with pytest.raises(RecordError, match="not a tvmlab run folder"):
        frames.trials(Path(tempfile.mkdtemp()))
    with pytest.raises(RecordError, match="no run"):
        frames.trials("no-such-run")


def test_trials_are_read_from_a_folder_opened_elsewhere(make_run):
    folder = make_run(TRIALS)
    assert len(frames.trials(RunFolder.open(folder.path))) == 8
