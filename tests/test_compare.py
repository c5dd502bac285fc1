"""Whole models side by side, on the tiny model."""

import importlib
import itertools
import json
import math
import os
import shutil
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_nvml import H200, FakeNvml

import tvmlab
from tvmlab import Experiment, frames
from tvmlab.compare import (
    _load_all,
    _look,
    _numerics,
    _ratio,
    _subject_row,
    _take_turns,
    _turn,
    compare_runs,
    worst_error,
)
from tvmlab.core import InputError, MissingTool, RecordError, RunError
from tvmlab.measure.process import WorkerProcess
from tvmlab.measure.subjects import ask, load, recorded_target, start_worker
from tvmlab.measure.watch import NoWatch, Watch, watch_of
from tvmlab.measure.whole_model import OPTIONAL
from tvmlab.records import RunFolder
from tvmlab.report import findings
from tvmlab.stats import ratio_in_turns, turn_ratio


@pytest.fixture(scope="module")
def folder(tiny_run, tmp_path_factory):
    """A run with half a line at the end of its database, as one has that was killed: comparing must not mind."""
    copy = tmp_path_factory.mktemp("runs") / tiny_run.id
    shutil.copytree(tiny_run.folder.path, copy)
    with (copy / "database_tuning_record.json").open("ab") as file:
        file.write(b'[0, {"half')
    return RunFolder.open(copy)


@pytest.fixture(scope="module")
def comparison(folder):
    return tvmlab.compare(folder, repeats=6)


def test_subjects_and_samples(comparison):
    assert set(comparison.subjects) == {"tvmlab", "untuned", "onnxruntime"}
    for subject in comparison.subjects.values():
        assert len(subject["samples_ms"]) == 6 and subject["turns"] == list(range(6))
        assert all(0 < sample < 1000 for sample in subject["samples_ms"])
    assert comparison.repeats == 6


def test_ratios_are_of_tvmlab_over_the_baseline(comparison):
    assert [row["baseline"] for row in comparison.ratios] == ["untuned", "onnxruntime"]
    ours = comparison.subjects["tvmlab"]["samples_ms"]
    for row in comparison.ratios:
        theirs = comparison.subjects[row["baseline"]]["samples_ms"]
        assert row["ratio"] == pytest.approx(turn_ratio(ours, theirs))
        assert row["low"] <= row["ratio"] <= row["high"]
    frame = comparison.frame()
    assert math.isnan(frame.loc["tvmlab", "ratio"])
    assert frame.loc["untuned", "ratio"] == comparison.ratios[0]["ratio"]


def test_what_is_computed_is_right(comparison):
    assert comparison.numerics["ok"]
    assert 0 <= comparison.numerics["max_error_over_max_output"] <= comparison.numerics["bound"]


def test_what_the_baselines_compute_is_right_too(comparison):
    errors = comparison.numerics["baselines"]
    assert errors["onnxruntime"] == 0
    assert 0 <= errors["untuned"] <= comparison.numerics["bound"]


@pytest.mark.slow
@pytest.mark.parametrize("baseline", OPTIONAL)
def test_an_optional_runtime_as_baseline(folder, baseline):
    pytest.importorskip(OPTIONAL[baseline])
    result = tvmlab.compare(folder, [baseline], repeats=3, threads=1)
    assert len(result.subjects[baseline]["samples_ms"]) == 3
    assert 0 <= result.numerics["baselines"][baseline] <= result.numerics["bound"]


@pytest.mark.parametrize("baseline", OPTIONAL)
def test_an_optional_runtime_that_is_not_installed_is_named(make_run, monkeypatch, baseline):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    package = OPTIONAL[baseline]
    with pytest.raises(
        MissingTool, match=rf"needs the package {package}: pip install -e '\.\[{package}\]' in tvmlab's checkout"
    ):
        tvmlab.compare(make_run(), [baseline])


def test_an_error_of_tvmlab_in_the_process_of_a_runtime_is_raised_here(folder):
    """The worker opens the run by path: one that is not there is a RecordError there, and must be one here."""
    worker = start_worker(folder, recorded_target(folder), 1)
    try:
        with pytest.raises(RecordError, match="no run"):
            ask("tvmlab", worker, ("load", "tvmlab", "/nowhere", 1), 60)
        with pytest.raises(RunError, match="tvmlab could not be run"):
            ask("tvmlab", worker, ("time", 1), 60)
    finally:
        worker.kill()


def test_a_baseline_that_computes_something_else_is_told(comparison):
    wrong = replace(comparison, numerics={**comparison.numerics, "baselines": {"onnxruntime": 0.0, "torch": 0.5}})
    assert "torch 0.5, OUTSIDE it" in str(wrong)
    assert "torch" not in str(comparison)


@pytest.mark.slow
def test_another_number_of_threads_is_not_kept_for_the_plots(folder, comparison):
    kept = folder.comparison
    other = tvmlab.compare(folder, ["onnxruntime"], repeats=3, threads=comparison.threads + 1)
    assert other.threads == comparison.threads + 1 and folder.comparison == kept


def test_it_is_written_to_the_run(folder, comparison):
    kept = folder.comparison
    assert kept["subjects"] == comparison.subjects
    assert kept["ratios"] == comparison.ratios
    assert kept["numerics"] == comparison.numerics


@pytest.mark.slow
def test_several_runs_are_timed_in_the_same_turns(folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder.path, other)
    runs = {"first": folder, "second": RunFolder(other)}
    found = compare_runs(runs, ["onnxruntime"], repeats=3)
    assert found["subjects"].keys() == found["numerics"].keys() == {"first", "second", "onnxruntime"}
    assert all(len(subject["samples_ms"]) == 3 for subject in found["subjects"].values())
    assert found["numerics"]["onnxruntime"] == 0 and found["numerics"]["first"] < 1e-4
    for name, run in runs.items():
        kept = run.comparison
        assert kept["subjects"]["tvmlab"] == found["subjects"][name] and kept["run"] == run.id
        assert kept["subjects"]["onnxruntime"] == found["subjects"]["onnxruntime"] and kept["numerics"]["ok"]


def test_more_models_than_fit_the_memory_are_refused(folder, monkeypatch):
    free = SimpleNamespace(available=1e9)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    with pytest.raises(MissingTool, match=r"4 models of 0 MB need about 1 GB, 1 are free: compare fewer at once"):
        tvmlab.compare(folder)
    monkeypatch.setenv("TVMLAB_CHECK_MEMORY", "0")
    module = importlib.import_module("tvmlab.compare")  # tvmlab.compare is the function of that name
    monkeypatch.setattr(module, "start_worker", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # it goes on
        tvmlab.compare(folder)


def test_it_shows_itself(comparison):
    assert "onnxruntime" in str(comparison) and "within the bound" in str(comparison)
    assert "onnxruntime" in comparison._repr_html_()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"baselines": ["onnxruntime", "tensorrt"]}, "unknown baseline 'tensorrt'.*onnxruntime"),
        ({"repeats": 1}, "repeats=1"),
    ],
)
def test_bad_requests_are_refused(make_run, options, words):
    with pytest.raises(InputError, match=words):
        tvmlab.compare(make_run(), **options)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"seed": 1}, "another seed"),
        ({"dims": {"n": 2}}, "another dims"),
        ({"batch": 2, "model": "alexnet"}, "another model and batch"),
    ],
)
def test_runs_whose_weights_or_inputs_differ_are_not_compared(make_run, knobs, words):
    """Only onnxruntime of the first run is asked what is right."""
    first, other = make_run(), make_run(**knobs)
    with pytest.raises(InputError, match=f"run {other.id} has {words} than {first.id}: compare runs of the same"):
        tvmlab.compare(first, [str(other.path)])
    with pytest.raises(InputError, match=words):
        compare_runs({"a": first, "b": other})


def test_a_run_that_has_not_begun_is_refused(tmp_path):
    folder = RunFolder.create(Experiment(model="squeezenet"), tmp_path)
    with pytest.raises(RunError, match="has not begun"):
        tvmlab.compare(folder)


class FakeSubject:
    """Stands for the worker of a runtime that always takes as long."""

    def __init__(self, name, seconds, order):
        self.name, self.seconds, self.order = name, seconds, order

    def request(self, message, timeout_s, *, anew):
        assert not anew  # it would have no model
        self.order.append(self.name)
        assert not self.frozen
        return "ok", [self.seconds] * message[1]

    frozen = False

    def pause(self):
        self.frozen = True

    def proceed(self):
        self.frozen = False


def test_a_subject_that_died_while_it_was_frozen_is_not_started_anew_without_its_model(tmp_path):
    here = {"PYTHONPATH": str(Path(__file__).parent)}
    worker = WorkerProcess("fake_worker", [], tmp_path / "log.txt", here)
    try:
        worker.request(("echo", "loaded"), 60)
        worker.pause()
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(RunError, match="mine could not be run: its process killed by SIGKILL"):
            _turn("mine", worker, 1, 0.0)
        assert worker.pid is None and worker.generation == 1
    finally:
        worker.kill()


def test_the_order_rotates_and_a_slow_one_takes_fewer_turns():
    order = []
    workers = {name: FakeSubject(name, s, order) for name, s in (("a", 0.01), ("b", 0.02), ("slow", 1.0))}
    samples = _take_turns(workers, 12)
    assert {name: len(values) for name, values in samples.items()} == {"a": 12, "b": 12, "slow": 6}
    assert all(worker.frozen for worker in workers.values())
    rounds = order[3:]  # the first three were to see who is slow
    assert rounds[:3] != rounds[3:5] and {rounds[0], rounds[3]} == {"a", "b"}


@pytest.mark.parametrize("repeats", [30, 60, 100])
def test_turns_of_slow_subjects_are_among_those_of_faster_ones(repeats):
    seconds = {"fast": 0.01, "halves": 0.4, "one": 1.5, "other": 1.75, "slowest": 5.0}
    samples = _take_turns({name: FakeSubject(name, s, []) for name, s in seconds.items()}, repeats)
    turns = [list(taken) for taken in samples.values()]
    assert turns[0] == list(range(repeats)) and len(turns[2]) < repeats / 2
    assert all(set(slower) <= set(faster) for faster, slower in itertools.pairwise(turns))
    assert turns[2] == turns[3]  # as many turns are the same turns


def test_a_gpu_that_holds_its_clocks_back_during_a_comparison_is_told(monkeypatch, folder, tmp_path):
    """It is read after every turn, and what it told is in the run's folder, apart from the batches of trials."""
    nvml = FakeNvml(H200, looks=[(1980, 300, 40, 0)] * 3 + [(1500, 650, 70, 0x04), (1980, 300, 40, 0)])
    watch = Watch("GPU-0abc", tmp_path / "device.jsonl", nvml)
    throttled = []
    _take_turns({name: FakeSubject(name, 0.01, []) for name in ("a", "b")}, 6, (1, 0.0), _look(watch, throttled))
    watch.note({"compared": ["a", "b"]})
    watch.close()
    (row,) = map(json.loads, (tmp_path / "device.jsonl").read_text().splitlines())
    assert throttled == ["power cap"] and row["looks"] == 12 and row["throttled"] == ["power cap"]
    assert RunFolder(tmp_path).batches() == []
    assert type(watch_of(tvmlab.target("cpu"), tmp_path)) is NoWatch


class Scattered(FakeSubject):
    """Every turn takes another time: `by` is the standard deviation of its logarithm."""

    def __init__(self, seconds, by):
        super().__init__("a", seconds, [])
        self._random, self._by, self._seconds = np.random.default_rng(0), by, seconds

    def request(self, message, timeout_s, *, anew):
        super().request(message, timeout_s, anew=anew)
        return "ok", [self._seconds * self._random.lognormal(sigma=self._by)]


@pytest.mark.parametrize(("by", "least", "most"), [(0.002, 15, 15), (0.02, 16, 59), (0.5, 60, 60)])
def test_how_many_turns_are_enough_is_computed_from_the_first(by, least, most):
    samples = _take_turns({"a": Scattered(0.01, by), "b": FakeSubject("b", 0.01, [])}, None)
    taken = len(samples["a"])
    assert least <= taken <= most and list(samples["b"]) == list(range(taken))
    if taken < 60:
        _, low, high = ratio_in_turns(list(samples["a"].values()), list(samples["b"].values()))
        assert high - low < 0.03


def test_who_is_much_slower_is_not_timed_more_often():
    slow = FakeSubject("slow", 5.0, [])
    samples = _take_turns({"a": Scattered(0.01, 0.5), "slow": slow, "b": FakeSubject("b", 0.01, [])}, None)
    assert len(samples["a"]) == len(samples["b"]) == 60 and 6 <= len(samples["slow"]) <= 8
    near = _take_turns({"a": Scattered(0.2, 0.5), "b": FakeSubject("b", 0.39, [])}, None)  # b has fewer turns
    assert len(near["a"]) == 60 and len(near["b"]) == 30
    equals = _take_turns({"slow": slow, "other": FakeSubject("other", 5.0, [])}, None)
    assert len(equals["slow"]) == len(equals["other"]) == 8
    alone = _take_turns({"a": Scattered(0.01, 0.5), "slow": slow}, None)
    assert len(alone["a"]) == 15


def test_the_ratio_is_of_the_turns_that_both_took():
    """The machine becomes slower with each round: of 1.5 s beside 0.01 s the n-th turns are of different rounds."""
    slow = {number: 1.5 * (1 + number) for number in range(0, 60, 4)}
    fast = {number: 0.01 * (1 + number) for number in range(60)}
    subjects = {name: _subject_row(taken) for name, taken in (("tvmlab", slow), ("fast", fast), ("same", slow))}
    found = _ratio(subjects, "fast")
    assert [found[name] for name in ("ratio", "low", "high")] == [pytest.approx(150)] * 3
    assert _ratio(subjects, "same")["ratio"] == 1
    subjects["tvmlab"].pop("turns")  # as files of before have it: of the medians
    assert _ratio(subjects, "fast")["ratio"] == pytest.approx(150 * 29 / 30.5)


@pytest.mark.parametrize("repeats", [6, 15, 30, 60])
def test_the_slowest_take_enough_turns_for_an_interval(repeats):
    samples = _take_turns({name: FakeSubject(name, s, []) for name, s in (("a", 0.01), ("slow", 9.0))}, repeats)
    assert 6 <= len(samples["slow"]) <= 10 and len(samples["a"]) == repeats


def test_few_turns_give_a_ratio_without_interval_that_claims_nothing(comparison, make_run):
    """The least and the largest of three pairs hold the true ratio in 75 % of cases, not in 95 %."""
    subjects = {"tvmlab": _subject_row(dict.fromkeys(range(3), 1.0)), "a": _subject_row(dict.fromkeys(range(3), 2.0))}
    found = _ratio(subjects, "a")
    assert found["ratio"] == 0.5 and math.isnan(found["low"]) and math.isnan(found["high"])
    few = replace(comparison, subjects=subjects, ratios=[found])
    assert "tvmlab takes 0.5 of a's time (too few turns for an interval)" in str(few) and "nan" not in few._repr_html_()
    assert math.isnan(few.frame().loc["a", "ratio_low"])
    folder = make_run(comparison=asdict(few))
    assert json.loads((folder.path / "compare.json").read_bytes())["ratios"][0]["low"] is None
    said = " ".join(findings(folder))
    assert (
        "tvmlab takes 0.5 times a's end-to-end latency (too few turns for an interval): no difference is shown." in said
    )
    kept = frames.comparison(folder)
    assert kept["ratio_low"].dtype == float and kept["ratio_low"].isna().all() and kept["ratio"].tolist()[1] == 0.5
    assert frames.summary(folder)["ratio_high"].isna().all()


def test_a_turn_of_several_inferences_is_one_value():
    """They share what the machine does in the turn, so they are no independent samples."""

    class Varying(FakeSubject):
        def request(self, message, timeout_s, *, anew):
            super().request(message, timeout_s, anew=anew)
            return "ok", [0.01 * factor for factor in (3, 1, 9, 2, 1)][: message[1]]

    samples = _take_turns({"a": Varying("a", 0.0, []), "b": FakeSubject("b", 0.02, [])}, 6, turn=(5, 0.0))
    assert samples == {"a": dict.fromkeys(range(6), 0.02), "b": dict.fromkeys(range(6), 0.02)}


@pytest.mark.parametrize(
    ("found", "ok"),
    [
        ([1.0, 2.0], True),
        ([1.0, 2.0001], True),
        ([1.0, 2.001], False),
        ([1.0, math.nan], False),
        ([1.0, math.inf], False),
    ],
)
def test_numerics(found, ok):
    result = _numerics(worst_error([np.array(found, "float32")], [np.array([1.0, 2.0], "float32")]))
    assert result["ok"] is ok or result["ok"] == ok
    right, true = np.ones(2), np.array([1.0, 2.0])
    for outputs, expected in (([right, np.array(found)], [right, true]), ([np.array(found), right], [true, right])):
        assert bool(_numerics(worst_error(outputs, expected))["ok"]) == ok


class Sleeper(WorkerProcess):
    """A process that takes ten minutes to load a model."""

    def request(self, message, timeout_s, *, anew=True):
        return super().request(("sleep", 600), timeout_s, anew=anew)


class Interrupted(BaseException):
    """As KeyboardInterrupt."""


@pytest.mark.parametrize("at_once", [1, 2])
def test_an_interrupt_does_not_wait_for_the_models_that_load(folder, tmp_path, at_once):
    def interrupt(*_):
        raise Interrupted

    here = {"PYTHONPATH": str(Path(__file__).parent)}
    workers = {name: Sleeper("fake_worker", [], tmp_path / "log.txt", here) for name in "abc"}
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 1.5)
    started = time.monotonic()
    try:
        with pytest.raises(Interrupted):
            _load_all(workers, dict.fromkeys(workers, ("tvmlab", folder)), 1, at_once)
        assert time.monotonic() - started < 20
    finally:
        signal.signal(signal.SIGALRM, before)
        for worker in workers.values():
            worker.kill()


class Graphless:
    """Stands for the process of a compiled model whose CUDA graph cannot be captured."""

    def __init__(self, fails=("graph",)):
        self.fails, self.kills = fails, 0

    def request(self, message, timeout_s, *, anew=True):
        kind, _, _, _, *graph = message
        assert kind == "load"
        failed = ("none" if graph == [False] else "graph") in self.fails
        return ("error", "RuntimeError: capture failed") if failed else ("ok", ["outputs"])

    def kill(self):
        self.kills += 1


def on_gpu(make_run):
    made = tvmlab.target("sm_90a")
    record = {"name": made.name, "label": made.label, "kind": made.kind, "attrs": made.attrs, "device": "cuda:0"}
    return make_run(environment={"target": {**record, "details": made.details, "roofline": None}})


@pytest.mark.parametrize("runtime", ["tvmlab", "untuned"])
def test_a_model_whose_cuda_graph_fails_is_timed_without_one_and_that_is_said(make_run, comparison, runtime):
    worker = Graphless()
    outputs, note = load("mine", worker, runtime, on_gpu(make_run), 1)
    assert outputs == ["outputs"] and worker.kills == 1
    assert note.startswith("mine ran without a CUDA graph") and "capture failed" in note
    noted = replace(comparison, notes=[note])
    assert note in str(noted) and "capture failed" in noted._repr_html_() and "capture" not in str(comparison)
    with pytest.raises(RunError, match="could not be run"):
        load("mine", Graphless(["graph", "none"]), runtime, on_gpu(make_run), 1)


def test_what_is_no_cuda_graph_is_loaded_once(make_run, folder):
    for runtime, run in (("torch", on_gpu(make_run)), ("tvmlab", folder)):
        worker = Graphless()
        with pytest.raises(RunError, match="capture failed"):
            load("mine", worker, runtime, run, 1)
        assert worker.kills == 0
