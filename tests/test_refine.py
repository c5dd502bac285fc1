"""Refinement in the whole model: which swaps are tried, what is kept, and that compiling honours it."""

import json
import threading

import pytest
from fake_measurer import FakeMeasurer

from tvmlab.compat import DATABASE_FILES, read_database
from tvmlab.experiment import Ansor, Experiment
from tvmlab.measure import refine as module
from tvmlab.measure.refine import refine, set_slow_aside, swaps_of
from tvmlab.records import RunFolder
from tvmlab.search_process import search
from tvmlab.strategies import warm_records


@pytest.fixture
def tuned(tiny_onnx, tmp_path):
    """A run of the tiny model with invented latencies."""
    steps = [Ansor(max_trials=24, population=16, generations=1)]
    folder = RunFolder.create(Experiment(model=tiny_onnx, target="cpu", steps=steps), tmp_path)
    search(folder, threading.Event(), lambda *_: FakeMeasurer())
    return folder


@pytest.fixture
def any_distance(monkeypatch):
    monkeypatch.setattr(module, "_CLOSE", 1e9)


def ranked(folder, key):
    return sorted(trial.latency_s for trial in folder.trials() if trial.task_key == key)


def test_swaps_are_of_close_schedules_the_largest_share_first(tuned, cpu, monkeypatch):
    tunable = [info for info in tuned.tasks if info.tunable]
    monkeypatch.setattr(module, "_CLOSE", 1e9)
    found = swaps_of(tuned, cpu, [])
    assert {swap.task.key for swap in found} == {info.key for info in tunable}
    shares = [swap.task.weight * swap.best_s for swap in found]
    assert shares == sorted(shares, reverse=True)
    for swap in found:
        best, second = ranked(tuned, swap.task.key)[:2]
        assert (swap.best_s, swap.ratio) == (pytest.approx(best), pytest.approx(second / best))
    monkeypatch.setattr(module, "_CLOSE", 1.0)
    assert swaps_of(tuned, cpu, []) == []


class Worker:
    """A whole model whose speed follows from the schedules it does without."""

    alive = 0

    def __init__(self, set_aside):
        self.set_aside = tuple(set_aside)
        Worker.alive += 1

    def kill(self):
        Worker.alive -= 1


@pytest.mark.parametrize("gain", [0.9, 1.1, 1.0])
def test_a_swap_stays_only_if_it_wins(tuned, cpu, monkeypatch, any_distance, gain):
    loads = []

    def load(folder, target, set_aside):
        loads.append(tuple(set_aside))
        return Worker(set_aside)

    def turns(one, other):
        noise = [1 + 0.01 * (number % 5) for number in range(20)]
        return noise, [gain ** (len(other.set_aside) - len(one.set_aside)) * each for each in noise]

    monkeypatch.setattr(module, "_load", load)
    monkeypatch.setattr(module, "_take_turns", turns)
    refine(tuned, cpu, 5, lambda: False)
    noted = tuned.read_json("refine.json")
    assert Worker.alive == 0
    assert len(noted["swaps"]) == 2 and all(row["kept"] == (gain < 1) for row in noted["swaps"])
    assert noted["set_aside"] == ([row["line"] for row in noted["swaps"]] if gain < 1 else [])
    assert len(loads) == 3  # the incumbent is compiled once: a swap that stays takes its place
    refine(tuned, cpu, 5, lambda: False)
    assert tuned.read_json("refine.json") == noted and len(loads) == 3  # nothing is tried twice


@pytest.mark.parametrize("most", [1, 5])
def test_what_may_win_by_chance_among_several_does_not_stay(tuned, cpu, monkeypatch, any_distance, most):
    """Faster by 1 % in ten pairs of twenty, slower by half of that in the others: p is 0.028."""
    monkeypatch.setattr(module, "_load", lambda folder, target, set_aside: Worker(set_aside))
    monkeypatch.setattr(module, "_take_turns", lambda *_: ([1.0] * 20, [0.99] * 10 + [1.005] * 10))
    refine(tuned, cpu, most, lambda: False)
    assert {row["kept"] for row in tuned.read_json("refine.json")["swaps"]} == {most == 1}


def test_a_stop_ends_it_between_two_swaps(tuned, cpu, monkeypatch, any_distance):
    monkeypatch.setattr(module, "_load", lambda *_: pytest.fail("must not load"))
    refine(tuned, cpu, 5, lambda: True)
    assert not (tuned.path / "refine.json").exists()


def test_what_is_set_aside_is_not_compiled(tuned, cpu, tiny_tasks, any_distance):
    swap = swaps_of(tuned, cpu, [])[0]
    task = next(task for task in tiny_tasks.values() if task.key == swap.task.key)
    everything = {latency for _, latency in warm_records(read_database(tuned.path, "llvm"), task)}
    tuned.write_json("refine.json", {"set_aside": [swap.line], "swaps": []})
    rest = {latency for _, latency in warm_records(read_database(tuned.path, "llvm"), task)}
    assert min(everything) == pytest.approx(swap.best_s) and rest == everything - {min(everything)}


def test_a_default_schedule_that_no_database_has_beats_slower_records(tuned, cpu, tiny_tasks):
    """As on a GPU: candidates of the invented measurer are 0.1 to 1.1 times the default's latency."""
    set_slow_aside(tuned, cpu)
    database = read_database(tuned.path, "llvm")
    default_s = {trial.task_key: trial.latency_s for trial in tuned.trials() if trial.trial == 0}
    slower = [t for t in tuned.trials() if t.trial > 0 and t.latency_s > default_s[t.task_key]]
    assert len(tuned.read_json("refine.json")["set_aside"]) == len(slower) > 0
    for task in tiny_tasks.values():
        left = [latency for _, latency in warm_records(database, task)]
        assert all(latency <= default_s[task.key] for latency in left)


def test_of_a_schedule_the_last_line_counts(tuned, cpu, tiny_tasks, any_distance):
    """What was measured again: setting that line aside does not bring the earlier one back, nor is it its own rival."""
    path = tuned.path / DATABASE_FILES[-1]
    best = swaps_of(tuned, cpu, [])[0]
    workload, (trace, seconds, *rest) = json.loads(path.read_bytes().splitlines()[best.line])
    with path.open("a") as file:
        file.write(json.dumps([workload, [trace, [second * 1.001 for second in seconds], *rest]]) + "\n")
    again = next(swap for swap in swaps_of(tuned, cpu, []) if swap.task.key == best.task.key)
    assert again.line == len(path.read_bytes().splitlines()) - 1
    assert again.ratio == pytest.approx(best.ratio / 1.001)
    tuned.write_json("refine.json", {"set_aside": [again.line], "swaps": []})
    task = next(task for task in tiny_tasks.values() if task.key == best.task.key)
    left = {latency for _, latency in warm_records(read_database(tuned.path, "llvm"), task)}
    assert min(left) == pytest.approx(best.best_s * best.ratio)


@pytest.mark.slow
def test_real_models_are_compiled_and_timed(tiny_run, cpu, tmp_path, any_distance):
    import shutil

    folder = RunFolder(tmp_path / tiny_run.id)
    shutil.copytree(tiny_run.folder.path, folder.path)
    refine(folder, cpu, 1, lambda: False)
    (row,) = folder.read_json("refine.json")["swaps"]
    assert len(row["swapped_s"]) == len(row["unswapped_s"]) == 20 and min(row["swapped_s"]) > 0
    assert row["kept"] == (row["p_value"] <= 0.05)
