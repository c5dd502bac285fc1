"""Sketches that are used up: noted when a search comes to their end, and not planned again by later runs."""

import threading
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from fake_measurer import FakeMeasurer, stop_after
from onnx import parser, save_model

import tvmlab
from tvmlab import reuse
from tvmlab.environment import tvm_version
from tvmlab.experiment import Ansor, AutoTVM, Experiment
from tvmlab.past_records import SKETCHES_FILE, Past, Records
from tvmlab.records import RunFolder
from tvmlab.reuse import PAST, Reuse
from tvmlab.search.allocate import Allocator
from tvmlab.search.fallback import Fallback
from tvmlab.search_process import search
from tvmlab.session import Session

A, B = "a" * 16, "b" * 16
SMALL = {"population": 16, "generations": 1, "early_stopping_threshold": "100 %"}


@pytest.fixture
def few(tmp_path):
    """`few(step, ...)`: a run of a model whose only task has a handful of sketched programs."""
    pool = "MaxPool <kernel_shape=[2, 2], strides=[2, 2]> (x)"
    graph = f"g (float[1,2,8,8] x) => (float[1,2,4,4] z) {{ z = {pool} }}"
    save_model(parser.parse_model(f'<ir_version: 8, opset_import: ["" : 13]> {graph}'), tmp_path / "few.onnx")

    def make(*steps, **knobs):
        asked = Experiment(model=str(tmp_path / "few.onnx"), target="cpu", steps=steps, **knobs)
        return RunFolder.create(asked, tmp_path / "runs")

    return make


def searched(folder, measurer=None, stop=None):
    """The trials of a run that is carried out with invented answers."""
    search(folder, stop or threading.Event(), lambda tasks, target, where: measurer or FakeMeasurer())
    return [trial for trial in folder.trials() if trial.trial]


def noted(folder):
    return folder.read_json(SKETCHES_FILE, missing={})


def test_sketches_that_are_used_up_are_not_planned_again(few):
    step = Ansor(trials_per_kernel=1000, **SMALL)
    first = few(step)
    before = searched(first)
    assert 8 < len(before) < 100 and noted(first) == {before[0].task_key: tvm_version()}
    second = few(step, seed=1)
    expected = tvmlab.estimate_time(second.experiment, second.path.parent)
    assert (expected.trials, expected.reused) == (1, len(before))
    again = searched(second, measurer=(measurer := FakeMeasurer()))
    assert [trial.strategy for trial in again] == [PAST] and len(measurer.asked) == 1
    assert second.state.total_trials == second.state.trials == 1
    more = few(step.model_copy(update={"trials_per_kernel": 5000}))
    assert tvmlab.estimate_time(more.experiment, more.path.parent).trials == 1
    assert len(searched(few(step.model_copy(update={"reuse": False})))) == len(before)


def test_the_templates_of_such_a_task_are_searched_all_the_same(few):
    first = few(Ansor(**SMALL))
    assert noted(first) == {} and searched(first) and noted(first)
    asked = few(AutoTVM(kernel_trials=9, early_stopping_threshold="100 %"))
    assert tvmlab.estimate_time(asked.experiment, asked.path.parent).trials > 1


def test_sketches_of_another_tvm_are_searched_again(few):
    first, second = few(Ansor(**SMALL)), few(Ansor(**SMALL))
    searched(first)
    first.write_json(SKETCHES_FILE, dict.fromkeys(noted(first), "0.1"))
    assert tvmlab.estimate_time(second.experiment, second.path.parent).trials > 900
    (first.path / SKETCHES_FILE).unlink()  # as a run of before that was noted
    assert tvmlab.estimate_time(second.experiment, second.path.parent).trials > 900


@pytest.mark.parametrize(
    ("options", "knobs"),
    [
        ({"max_trials": 20}, {}),
        ({"early_stopping_threshold": 4, "batch_size": 1}, {}),
        ({}, {"time_limit_s": 1e-9}),
    ],
)
def test_a_search_that_ended_before_its_sketches_did_notes_nothing(few, options, knobs):
    folder = few(Ansor(**{**SMALL, **options}), **knobs)
    assert len(searched(folder)) <= 20  # of 27
    assert folder.status == "done" and noted(folder) == {}


def test_a_stop_notes_nothing_and_a_resumed_run_notes_the_end(few):
    folder = few(Ansor(**SMALL))
    stop, measurer = stop_after(5)
    assert len(searched(folder, measurer, stop)) < 20 and noted(folder) == {}
    searched(folder)
    assert noted(folder)


def test_a_task_without_any_program_is_not_planned_again_and_still_named(few, monkeypatch):
    monkeypatch.setattr("tvmlab.spaces.sketch.SketchSpace.sample", lambda space, sketch, rng: None)
    first, second = few(Ansor(**SMALL)), few(Ansor(**SMALL))
    said = "nothing could be tried for max_pool2d, which keep the default schedule"
    for folder in (first, second):
        assert searched(folder) == [] and said in folder.state.message
    assert second.state.total_trials == 0 and "reused" not in second.state.message
    assert tvmlab.reused(second).empty


# What is left to measure


@pytest.mark.parametrize("step", [Ansor(), AutoTVM(exploration_trials=50), AutoTVM(max_trials=500)])
def test_neither_missing_nor_exploration_trials_are_planned_of_used_up_sketches(make_folder, cpu, step):
    known = Reuse.of(make_folder(steps=[step]))
    task = {"best": {"run": "r"}, "runs": ["r"], step.kind: {"trials": 3, "share": 3.0, "since": 0}}
    tasks = {A: {**task, "exhausted_sketches": tvm_version()}, B: task}
    known._file = {"runs": {"r": 5}, "layouts": "", "tasks": tasks}
    both, alone = known.plan(0, [A, B]), known.plan(0, [A])
    assert (alone.total, alone.limits) == (1, {A: 1})
    assert both.limits[A] == 1 and both.total > 200


def test_only_what_is_used_up_is_limited_where_tasks_share_a_budget(tiny_tasks):
    infos = [tiny_tasks[name].info for name in ("conv2d+relu", "matmul+add")]
    conv, gemm = (info.key for info in infos)
    found = reuse.planned(Ansor(), [], {conv: Past(3, 3.0), gemm: Past(3, 3.0)}, {conv}, {conv: 0, gemm: float("inf")})
    assert found.limits == {conv: 1} and found.total == 1 + 2 * 997  # what one has no use for goes to the other
    allocator = Allocator(infos, {conv: 9.0, gemm: 1e-6}, None, 250, found.limits)
    allocator.again(conv, 9.0)
    assert allocator.next_task() == gemm and allocator.room(gemm) == float("inf")


def test_the_best_is_measured_again_although_a_task_before_it_has_none(make_folder, tiny_tasks, cpu, run):
    first = make_folder(max_trials=8)
    first.write_json("environment.json", {"target": cpu.as_record()})
    first.write_json("tasks.json", [asdict(task.info) for task in tiny_tasks.values()])
    run(first)
    nothing, best = (task.key for task in tiny_tasks.values() if task.info.tunable)
    kept = [line for line in (first.path / "trials.jsonl").read_text().splitlines() if nothing not in line]
    (first.path / "trials.jsonl").write_text("\n".join(kept) + "\n")
    first.write_json(SKETCHES_FILE, dict.fromkeys((nothing, best), tvm_version()))
    second = make_folder(max_trials=8)
    reuse.begin(second, cpu)
    assert [(trial.task_key, trial.strategy) for trial in run(second)] == [(best, PAST)]


# Whose end it is


def test_a_fallback_is_used_up_when_what_it_asks_is(make_folder, run, tiny_tasks, cpu):
    nothing = SimpleNamespace(name="evolution", ask=lambda count: [], sketches_exhausted=True)
    template = SimpleNamespace(name="xgb", ask=lambda count: [1], exhausted=0)
    both = Fallback(nothing, lambda: template)
    assert both.sketches_exhausted and both.ask(1) == [1]
    assert not both.sketches_exhausted and both.exhausted == 0
    template.exhausted = 8
    assert both.sketches_exhausted and both.exhausted == 8


def test_the_end_of_another_strategy_is_not_that_of_the_sketches(make_folder, tiny_tasks, cpu):
    folder = make_folder()
    session = Session(folder, list(tiny_tasks.values()), cpu, FakeMeasurer())
    key = next(task.key for task in tiny_tasks.values() if task.info.tunable)
    session.ended(key, SimpleNamespace(ending="a local minimum", local_minimum=True))
    session.close()
    assert noted(folder) == {}


def test_runs_are_counted_as_known_for_what_they_used_up_alone():
    records = Records()
    assert not records.known
    records.exhausted_sketches = "0.27"
    assert records.known and records.noted() == {"exhausted_sketches": "0.27", "runs": [], "best": None}
