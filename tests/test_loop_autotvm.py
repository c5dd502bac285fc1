"""The loop with template spaces: the AutoTVM step on a real model, with invented answers."""

from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pytest
from fake_measurer import FakeMeasurer, keys, stop_after
from tvm.s_tir import Schedule

from tvmlab import reuse, strategies
from tvmlab.experiment import Ansor, AutoTVM
from tvmlab.reuse import PAST
from tvmlab.search.tuner import digits_of
from tvmlab.testing import RecordedSpace


class TemplateLike(RecordedSpace):
    """Stands for the template space of a real task, whose programs are the unscheduled one: 48 points if not said."""

    def __init__(self, task, starts=(40, 7), knobs=None):
        super().__init__(knobs or {"a": range(6), "b": range(8)}, lambda index: 1e-3, starts, task.key)
        self.module = task.module

    def realize(self, index):
        return replace(super().realize(index), payload=Schedule(self.module))


@pytest.fixture
def templates(monkeypatch, tiny_tasks):
    """A template for the convolution alone; `templates(...)` gives the spaces that were made."""
    made = []

    def template_space(task, target):
        if task.info.kernel_class != "conv2d+relu":
            return None
        made.append(TemplateLike(task))
        return made[-1]

    monkeypatch.setattr(strategies, "template_space", template_space)
    return made


def autotvm(make_folder, **options):
    return make_folder(steps=[AutoTVM(**{"kernel_trials": 20, **options})])


def by_task(trials, tiny_tasks):
    return [[t for t in trials if t.task_key == tiny_tasks[name].key] for name in ("conv2d+relu", "matmul+add")]


def test_autotvm_tunes_templates_and_falls_back_on_sketches(make_folder, run, templates, tiny_tasks):
    trials = run(autotvm(make_folder, tuner="genetic"))
    conv, gemm = by_task(trials, tiny_tasks)
    assert {trial.strategy for trial in conv} == {"genetic"} and {trial.strategy for trial in gemm} == {"evolution"}
    assert [trial.decisions for trial in conv[:2]] == [[40], [7]]
    assert all(trial.sketch == 0 for trial in conv)
    assert (len(conv), len(gemm)) == (20, 20)  # kernel_trials of each
    assert len(set(keys(trials))) == 40


@pytest.mark.parametrize("tuner", AutoTVM.model_fields["tuner"].annotation.__args__)
def test_every_tuner_exhausts_a_small_template(make_folder, run, templates, tiny_tasks, tuner):
    folder = autotvm(make_folder, tuner=tuner, kernel_trials=60, max_trials=80)
    conv, _ = by_task(run(folder, FakeMeasurer({tiny_tasks["conv2d+relu"].key: 1.0})), tiny_tasks)
    assert sorted(trial.decisions[0] for trial in conv) == list(range(48))
    assert {trial.strategy for trial in conv} == {tuner}


@pytest.mark.parametrize("count", [1, 9, 25])
def test_autotvm_stops_and_resumes(make_folder, run, templates, tiny_tasks, count):
    folder = autotvm(make_folder, tuner="xgb", kernel_trials=18)
    stop, measurer = stop_after(count)
    before = run(folder, measurer, stop=stop)
    after = run(folder)
    assert after[: len(before)] == before
    assert len(set(keys(after))) == len(after) == 36
    assert [len(trials) for trials in by_task(after, tiny_tasks)] == [18, 18]


def test_a_second_step_learns_what_the_tuner_of_the_first_measured(make_folder, run, templates, tiny_tasks):
    steps = [AutoTVM(kernel_trials=20, tuner="random"), AutoTVM(kernel_trials=40, tuner="xgb")]
    conv, _ = by_task(run(make_folder(steps=steps)), tiny_tasks)
    assert Counter(trial.strategy for trial in conv) == {"random": 20, "xgb": 28}
    assert sorted(trial.decisions[0] for trial in conv) == list(range(48))


def test_autotvm_then_ansor(make_folder, run, templates, tiny_tasks):
    """The sketch search starts from the database, and the template's schedules are in it."""
    steps = [AutoTVM(kernel_trials=12), Ansor(max_trials=12, population=16, generations=1)]
    trials = run(make_folder(steps=steps))
    assert Counter(trial.step for trial in trials) == {0: 24, 1: 12}
    assert {trial.strategy for trial in trials if trial.step == 1} == {"evolution"}


def test_autotvm_warm_start_measures_the_best_of_the_other_run_first(make_folder, run, templates, tiny_tasks, cpu):
    source = autotvm(make_folder, tuner="random", kernel_trials=30)
    source.write_json("environment.json", {"target": cpu.as_record()})
    best = min(by_task(run(source), tiny_tasks)[0], key=lambda trial: trial.latency_s)
    warm = run(autotvm(make_folder, max_trials=20, warm_start=[source.id]))
    assert by_task(warm, tiny_tasks)[0][0].key == best.key


def test_the_same_autotvm_experiment_gives_the_same_run(make_folder, run, templates):
    first, second = (run(autotvm(make_folder)) for _ in range(2))
    assert keys(first) == keys(second)


# Exploration, and random trials, where past records suffice


@pytest.fixture
def explored(monkeypatch, make_folder, run, tiny_tasks, cpu):
    """`explored(...)`: the trials of a run, and of the one before it, with 262,144 points to each template."""
    space = {name: range(8) for name in "abcdef"}
    monkeypatch.setattr(strategies, "template_space", lambda task, target: TemplateLike(task, (), space))

    def go(**options):
        first = make_folder(steps=[AutoTVM(kernel_trials=24, tuner="random", reuse=False)])
        first.write_json("environment.json", {"target": cpu.as_record()})
        first.write_json("tasks.json", [asdict(task.info) for task in tiny_tasks.values()])
        before = run(first)
        second = make_folder(steps=[AutoTVM(kernel_trials=20, tuner="random", **options)], seed=1)
        reuse.begin(second, cpu)
        found = run(second)
        assert second.state.total_trials == second.state.trials == len(found)
        return by_task(found, tiny_tasks), by_task(before, tiny_tasks)

    return go


def near(trials, past):
    """Which past trial is the nearest to each of some trials, where it is at most two knobs away."""
    digits, known = (digits_of([trial.decisions[0] for trial in some], (8,) * 6) for some in (trials, past))
    apart = (digits[:, None, :] != known[None]).sum(axis=2)
    return [int(np.argmin(row)) for row in apart if row.min() <= 2]


def test_exploration_measures_so_many_new_trials_although_past_records_suffice(explored):
    without, before = explored()
    assert [[trial.strategy for trial in trials] for trials in without] == [[PAST], [PAST]]
    found, _ = explored(exploration_trials=32)
    for trials, past in zip(found, before, strict=True):
        assert [trial.strategy for trial in trials] == [PAST] + ["random"] * 32
        assert trials[0].key == min(past, key=lambda trial: trial.latency_s).key
        assert not set(keys(trials[1:])) & set(keys(past)) and len(set(keys(trials))) == 33
        assert len(near(trials[1:], past)) < 8  # anywhere


def test_of_the_exploration_so_many_trials_start_from_past_records(explored):
    found, before = explored(exploration_trials=32, random_trials=16)
    for trials, past in zip(found, before, strict=True):
        new = trials[1:]
        assert len(new) == 32 and not set(keys(new)) & set(keys(past))
        starts = near(new, past)
        assert 16 <= len(starts) < 24 and len(set(starts)) > 8  # many past records, not the best alone
