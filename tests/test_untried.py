"""A task whose space has nothing to measure: it keeps its default schedule, the run ends, and says which it is."""

import threading

import pytest
from fake_measurer import FakeMeasurer

from tvmlab.experiment import Ansor, AutoTVM
from tvmlab.records import RunFolder
from tvmlab.search_process import search
from tvmlab.spaces.sketch import SketchSpace
from tvmlab.spaces.template import TemplateSpace


@pytest.fixture
def run(tiny_experiment, tmp_path):
    """Carries out a step over the tiny model, with made-up latencies."""

    def go(step):
        folder = RunFolder.create(tiny_experiment(steps=[step]), tmp_path / "runs")
        search(folder, threading.Event(), lambda *_: FakeMeasurer())
        return folder

    return go


def nothing_for(kernel_class, monkeypatch, tiny_tasks):
    """Neither a sketch nor a template gives a candidate of this task."""
    key = tiny_tasks[kernel_class].key
    sketches, templates = SketchSpace.replay, TemplateSpace.realize
    monkeypatch.setattr(
        SketchSpace, "replay", lambda self, *a, **k: None if self.task_key == key else sketches(self, *a, **k)
    )
    monkeypatch.setattr(
        TemplateSpace, "realize", lambda self, index: None if self.task_key == key else templates(self, index)
    )
    return key


def test_it_keeps_its_default_and_is_named(run, monkeypatch, tiny_tasks, capsys):
    key = nothing_for("matmul+add", monkeypatch, tiny_tasks)
    folder = run(Ansor(max_trials=6, population=16, generations=1))
    own = [trial for trial in folder.trials() if trial.task_key == key]
    assert [trial.trial for trial in own] == [0]
    assert sum(trial.trial > 0 for trial in folder.trials()) == 6  # all of them for the other task
    name = tiny_tasks["matmul+add"].info.name
    assert folder.state.status == "done" and f"nothing could be tried for {name}" in folder.state.message
    assert f"{name}: nothing in its space can be made, it keeps its default schedule" in capsys.readouterr().out
    assert folder.state.estimate_s is not None


def test_a_run_with_nothing_to_try_at_all_ends(run, monkeypatch):
    monkeypatch.setattr(SketchSpace, "replay", lambda self, *a, **k: None)
    monkeypatch.setattr(TemplateSpace, "realize", lambda self, index: None)
    folder = run(AutoTVM(kernel_trials=4))
    assert not any(trial.trial for trial in folder.trials())
    assert folder.state.status == "done" and "nothing could be tried for" in folder.state.message


def test_no_sketches_at_all_are_no_candidates(tiny_tasks, cpu):
    from tvmlab.search.costmodel import CostModel
    from tvmlab.search.evolution import Evolution

    task = tiny_tasks["matmul+add"]
    space = SketchSpace(task.key, task.module, cpu.to_tvm())
    space.sketches = []
    search = Evolution(space, seed=0, population=16, generations=1, cost_model=CostModel(0))
    assert search.ask(4) == []
