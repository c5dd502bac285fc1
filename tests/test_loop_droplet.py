"""The Droplet step in the loop, on a real model with invented answers: where it starts, stops, resumes."""

import threading
from collections import Counter
from dataclasses import replace
from operator import ne

import pytest
from fake_measurer import FakeMeasurer, keys, stop_after
from tvm.s_tir import Schedule

from tvmlab import descent, frames, strategies
from tvmlab.compat import read_database
from tvmlab.core import InputError
from tvmlab.experiment import Ansor, AutoTVM, Droplet, Repeat
from tvmlab.search_process import search
from tvmlab.session import Session
from tvmlab.spaces.sketch import SketchSpace
from tvmlab.testing import RecordedSpace

SMALL = {"population": 16, "generations": 1, "early_stopping_threshold": 1000}


class TemplateLike(RecordedSpace):
    """Stands for the template space of the convolution: 48 points, whose programs are the unscheduled one."""

    def __init__(self, task):
        super().__init__({"a": range(6), "b": range(8)}, lambda index: 1e-3, (40, 7), task.key)
        self.module = task.module

    def realize(self, index):
        return replace(super().realize(index), payload=Schedule(self.module))


@pytest.fixture
def template(monkeypatch):
    """A template for the convolution alone."""
    monkeypatch.setattr(
        strategies,
        "template_space",
        lambda task, target: TemplateLike(task) if task.info.kernel_class == "conv2d+relu" else None,
    )


def of_step(trials, number):
    """The trials of a step, by task."""
    return {key: [t for t in trials if t.step == number and t.task_key == key] for key in {t.task_key for t in trials}}


def fastest(trials):
    return min((trial for trial in trials if trial.ok), key=lambda trial: trial.latency_s)


def test_it_starts_from_the_best_of_each_task(make_folder, run):
    """Up to an eighth of its trials are the next fastest, timed beside the best; then come twins, and neighbours."""
    folder = make_folder(steps=[Ansor(max_trials=60, **SMALL), Droplet(trials=12)])
    trials = run(folder)
    ansor, droplet = of_step(trials, 0), of_step(trials, 1)
    assert folder.state.steps_done == 2 and max(map(len, ansor.values())) >= 24
    for key in (key for key, found in ansor.items() if found):
        best, found = fastest(ansor[key]), droplet[key]
        assert 1 <= len(found) <= 12 and {trial.strategy for trial in found} == {"droplet"}
        ran = sorted((trial for trial in ansor[key] if trial.ok), key=lambda trial: trial.latency_s)
        count = min(12 // 8, len(ran) // 10)
        contenders = found[:count]
        others = [trial for trial in found[count:] if trial.decisions != best.decisions]
        twins, neighbour = found[count : found.index(others[0])], others[0]
        assert {trial.sketch for trial in twins}.isdisjoint({best.sketch}) and len(twins) <= 2
        assert [trial.key for trial in contenders] == [trial.key for trial in ran[1 : 1 + count]]
        assert {trial.rival for trial in found[: count + 1]} == {best.key}
        assert neighbour.rival_latencies_s == best.latencies_s
        assert sum(a != b for a, b in zip(neighbour.decisions, best.decisions, strict=True)) == 1
        assert best.key not in {trial.key for trial in found}


def test_the_incumbent_is_always_the_fastest_of_those_told(make_folder, run):
    """Each rival after the first is a trial that was faster than the rival before it."""
    folder = make_folder(steps=[Ansor(max_trials=8, **SMALL), Droplet(trials=60)])
    trials = run(folder)
    latency = {trial.key: trial.latency_s for trial in trials}
    for found in of_step(trials, 1).values():
        rivals = list(dict.fromkeys(trial.rival for trial in found if trial.rival))
        assert [latency[rival] for rival in rivals] == sorted((latency[rival] for rival in rivals), reverse=True)
    assert any(len({t.rival for t in found if t.rival}) > 1 for found in of_step(trials, 1).values())


class Drifting(FakeMeasurer):
    """Every batch is measured on a machine half as fast as for the batch before: a pair keeps its ratio."""

    def measure(self, candidates):
        self.slower = 2 * getattr(self, "slower", 0.5)
        for measured in super().measure(candidates):
            yield replace(
                measured,
                latencies_s=[self.slower * second for second in measured.latencies_s],
                rival_latencies_s=[self.slower * second for second in measured.rival_latencies_s],
            )


def test_a_machine_that_slows_down_hides_no_gain(make_folder, run):
    """Latencies of a descent are on the clock of its start, in the frame and in TVM's database too."""
    folder = make_folder(steps=[Ansor(max_trials=60, **SMALL), Droplet(trials=12)])
    trials = run(folder, Drifting())
    shown = frames.trials(folder).set_index("trial")["latency_us"]
    in_database = [
        min(map(float, record.run_secs)) for record in read_database(folder.path, "llvm").get_all_tuning_records()
    ]
    moved = 0
    for found in of_step(trials, 1).values():
        for trial in (trial for trial in found if trial.ok and trial.rival):
            assert trial.reference_s > 0
            known = [t for t in trials[: trials.index(trial)] if t.key == trial.rival and t.task_key == trial.task_key]
            first = known[-1]  # the second time, as a contender, it was on the clock of the start
            ratio = trial.latencies_s[0] / trial.rival_latencies_s[0]
            assert trial.latency_s == pytest.approx(first.latency_s * ratio)
            assert shown[trial.trial] == pytest.approx(trial.latency_s * 1e6)
            assert any(second == pytest.approx(trial.latency_s) for second in in_database)
            moved += trial.latency_s < first.latency_s < trial.latencies_s[0]
    assert moved  # some gain would not have been seen


def test_without_records_it_starts_from_the_plainest_point(make_folder, run, tiny_tasks, cpu):
    trials = run(make_folder(steps=[Droplet(trials=6)]))
    for kernel_class in ("conv2d+relu", "matmul+add"):
        task = tiny_tasks[kernel_class]
        plain = SketchSpace(task.key, task.module, cpu.to_tvm()).plainest()
        (first, *rest) = [trial for trial in trials if trial.task_key == task.key]
        assert (first.key, first.rival) == (plain.key, "")
        assert rest and rest[0].rival == plain.key


def test_with_more_starts_it_walks_down_from_other_schedules_too(make_folder, run):
    """Of another sketch, or far from the best: everything is still timed beside the incumbent."""
    steps = [Ansor(max_trials=24, **SMALL), Droplet(trials=400, starts=2)]
    trials = run(make_folder(steps=steps))
    for key, found in of_step(trials, 1).items():
        if not found:
            continue
        best = fastest(of_step(trials, 0)[key])
        before = {trial.key for trial in of_step(trials, 0)[key]}
        decisions = {trial.key: trial.decisions for trial in trials}
        new = [t for t in found if t.key not in before and t.decisions != decisions[t.rival]]  # twins come first
        elsewhere = [t for t in new if t.sketch != best.sketch or sum(map(ne, t.decisions, best.decisions)) > 3]
        assert elsewhere and all(t.rival for t in found)
        near = [t for t in new if t.rival == best.key and t.sketch == best.sketch]
        assert near and near[0].trial < elsewhere[0].trial


def test_start_default_leaves_the_records_alone(make_folder, run):
    steps = [Ansor(max_trials=8, **SMALL), Droplet(trials=4, start="default")]
    trials = run(make_folder(steps=steps))
    alone = run(make_folder(steps=[Droplet(trials=4)]))
    for key, found in of_step(trials, 1).items():
        assert found[0].key == of_step(alone, 0)[key][0].key


def test_it_descends_in_the_template_where_the_best_is_one_of_its_points(make_folder, run, template, tiny_tasks):
    folder = make_folder(steps=[AutoTVM(kernel_trials=10, tuner="random"), Droplet(trials=20)])
    trials = run(folder)
    tuned, droplet = (of_step(trials, number)[tiny_tasks["conv2d+relu"].key] for number in (0, 1))
    best = fastest(tuned)
    a, b = best.decisions[0] % 6, best.decisions[0] // 6
    before = {trial.key for trial in tuned}
    first = {trial.decisions[0] for trial in droplet if trial.rival == best.key and trial.key not in before}
    assert len(first) >= 2 and all(abs(i % 6 - a) + abs(i // 6 - b) <= 2 for i in first)
    gemm = of_step(trials, 1)[tiny_tasks["matmul+add"].key]
    assert all(len(trial.decisions) > 1 for trial in gemm)  # in the sketch space


def test_the_first_point_of_a_template(make_folder, run, template, tiny_tasks):
    trials = run(make_folder(steps=[Droplet(trials=5)]))
    conv = of_step(trials, 0)[tiny_tasks["conv2d+relu"].key]
    assert conv[0].decisions == [40]


def test_a_sketch_point_faster_than_the_templates_is_where_it_starts(make_folder, run, template, tiny_tasks):
    key = tiny_tasks["conv2d+relu"].key
    steps = [AutoTVM(kernel_trials=6, tuner="random"), Ansor(max_trials=16, **SMALL), Droplet(trials=8)]
    trials = run(make_folder(steps=steps))
    both = [trial for number in (0, 1) for trial in of_step(trials, number)[key]]
    assert of_step(trials, 2)[key][0].rival == fastest(both).key


@pytest.mark.parametrize("count", [1, 14, 25])
def test_stop_and_resume_reach_the_same_total_and_repeat_nothing(make_folder, run, count):
    folder = make_folder(steps=[Ansor(max_trials=8, **SMALL), Droplet(trials=12)])
    stop, measurer = stop_after(count)
    before = run(folder, measurer, stop=stop)
    assert folder.state.steps_done == (count > 8)
    after = run(folder)
    assert after[: len(before)] == before
    timed = [(trial.key, trial.rival) for trial in after]  # of three pairs nothing is doubtful
    assert len(set(timed)) == len(timed) <= 8 + 24
    if count > 8:
        own = [trial for trial in before if trial.step == 1]
        later = [trial for trial in after[len(before) :] if trial.task_key == own[-1].task_key]
        assert not later or later[0].rival  # it goes on where it stood, and does not measure its start again


@pytest.mark.slow
def test_resuming_a_finished_descent_adds_nothing(make_folder, run):
    folder = make_folder(steps=[Ansor(max_trials=8, **SMALL), Droplet(trials=500)])
    before = run(folder)
    measurer = FakeMeasurer()
    assert run(folder, measurer) == before and measurer.asked == []


def test_bursts(make_folder, run):
    """Each descent starts from the best of everything before it."""
    folder = make_folder(steps=[Repeat(2, [Ansor(max_trials=8, **SMALL), Droplet(trials=6)])])
    trials = run(folder)
    assert [trial.step for trial in trials] == sorted(trial.step for trial in trials)
    assert Counter(t.step for t in trials)[0] == 8 and {t.step for t in trials} == {0, 1, 2, 3}
    for number in (1, 3):
        for key, found in of_step(trials, number).items():
            before = [trial for trial in trials if trial.step < number and trial.task_key == key]
            if found and before:
                assert found[0].rival == fastest(before).key


def test_it_starts_from_the_best_of_another_run(make_folder, run, cpu):
    source = make_folder(max_trials=16)
    source.write_json("environment.json", {"target": cpu.as_record()})
    before = of_step(run(source), 0)
    trials = run(make_folder(steps=[Droplet(trials=6, warm_start=[source.id])]))
    for key, found in of_step(trials, 0).items():
        assert found[0].key == fastest(before[key]).key  # measured again: its latency is of another day
        assert found[1].rival == found[0].key
    source.write_json("environment.json", {"target": {**cpu.as_record(), "attrs": {"kind": "llvm", "mcpu": "znver4"}}})
    with pytest.raises(InputError, match="leave it out of warm_start"):
        run(make_folder(steps=[Droplet(warm_start=[source.id])]))


def test_a_tuner_learns_what_a_descent_measured(make_folder, run, template, tiny_tasks):
    steps = [Droplet(trials=10), AutoTVM(kernel_trials=48, tuner="grid")]
    trials = run(make_folder(steps=steps), FakeMeasurer({tiny_tasks["conv2d+relu"].key: 1.0}))
    key = tiny_tasks["conv2d+relu"].key
    points = [trial.decisions[0] for number in (0, 1) for trial in of_step(trials, number)[key]]
    assert len(points) == len(set(points)) == 48


def test_the_run_says_which_tasks_ended_at_a_local_minimum(make_folder, capfd):
    folder = make_folder(steps=[Droplet(trials=400)])
    search(folder, threading.Event(), lambda tasks, target, where: FakeMeasurer())
    assert folder.status == "done" and folder.state.trials < 800
    assert "the descent of 2 of 2 tasks ended at a local minimum" in folder.state.message
    log = capfd.readouterr().out
    assert log.count("a local minimum at") == 2 and "step 1: droplet, task " in log
    endings = descent.summary(folder)["ending"]
    assert len(endings) == 2 and endings.str.startswith("a local minimum at").all()


def test_a_time_limit_does_not_hide_how_the_descents_ended(make_folder, monkeypatch):
    """Of two steps the first ends at minima, the second is cut off."""
    monkeypatch.setattr(Session, "is_over", property(lambda session: session.steps_done > 0))
    folder = make_folder(steps=[Droplet(trials=400), Ansor(trials_per_kernel=100)])
    search(folder, threading.Event(), lambda tasks, target, where: FakeMeasurer())
    assert "the time limit was reached" in folder.state.message
    assert "the descent of 2 of 2 tasks ended at a local minimum" in folder.state.message


def test_the_task_that_costs_most_now_comes_first(make_folder, run, tiny_tasks):
    """By what the first step reached, not by the unscheduled kernels: they all take the same."""
    conv, gemm = (tiny_tasks[name].key for name in ("conv2d+relu", "matmul+add"))
    for large, small in ((conv, gemm), (gemm, conv)):

        class Uneven(FakeMeasurer):
            def measure(self, candidates, small=small):
                for candidate, measured in zip(candidates, super().measure(candidates), strict=True):
                    factor = 1e-3 if candidate.task_key == small else 1.0
                    latencies = [factor * seconds for seconds in measured.latencies_s]
                    yield replace(measured, latencies_s=tuple(latencies), rival_latencies_s=())

        steps = [AutoTVM(kernel_trials=5), Droplet(max_trials=16, batch_size=4)]
        trials = [trial for trial in run(make_folder(steps=steps), Uneven()) if trial.step == 1]
        assert [trial.task_key for trial in trials[:4]] == [large] * 4


def test_the_same_experiment_gives_the_same_run(make_folder, run):
    steps = [Ansor(max_trials=8, **SMALL), Droplet(trials=10)]
    first, second = (run(make_folder(steps=steps)) for _ in range(2))
    assert keys(first) == keys(second)
