"""What earlier runs leave to search: a step's plan, random trials near past records, where the allocator goes on."""

from dataclasses import replace

import numpy as np
import pytest

from tvmlab import reuse
from tvmlab.core import TrialStatus
from tvmlab.experiment import Ansor, AutoTVM
from tvmlab.past_records import Past
from tvmlab.reuse import Plan
from tvmlab.search import genetic
from tvmlab.search.allocate import Allocator
from tvmlab.search.tuner import digits_of, index_of
from tvmlab.strategies import TUNERS
from tvmlab.testing import RecordedSpace, spend

A, B = "a" * 16, "b" * 16


# How much is still to be measured


def budget(step, past, before=(), again=()):
    return reuse.planned(step, before, past, set(again))


def test_what_earlier_runs_spent_on_each_task_counts_for_ansor():
    step = Ansor(trials_per_kernel=100, early_stopping_threshold="100 %")
    past = {A: Past(trials=190, share=100.0), B: Past(trials=10, share=100.0)}
    assert budget(step, past, again={A, B}).total == 2  # B got few because A promised more: it has had its part
    assert budget(step.model_copy(update={"trials_per_kernel": 150}), past).total == 100
    assert budget(step, {A: Past(5000, 40.0), B: Past()}).total == 60 + 100  # another model's run shares A alone
    assert budget(step, past).limits is None


def test_each_task_of_autotvm_gets_what_it_lacks():
    step = AutoTVM(kernel_trials=100, early_stopping_threshold="100 %")
    found = budget(step, {A: Past(70, 999.0), B: Past()}, again={A})
    assert (found.total, found.limits) == (30 + 100 + 1, {A: 31, B: 100})
    assert found.begun == {A: (70, 0), B: (0, 0)}


def test_a_task_that_had_stopped_early_is_not_searched_further():
    past = {A: Past(300, 300.0, since=250), B: Past(300, 300.0, since=249)}
    assert budget(Ansor(), past).total == 700
    assert budget(Ansor(early_stopping_threshold=300), past).total == 1400
    assert budget(Ansor(early_stopping_threshold="100 %"), past).total == 1400


def test_exploration_is_at_least_so_many_new_trials():
    past = {A: Past(2000, since=600), B: Past(1990, since=0)}
    found = budget(AutoTVM(exploration_trials=50), past, again={A})
    assert (found.total, found.limits) == (101, {A: 51, B: 50})
    assert found.begun == {A: (2000, 0), B: (1990, 0)}  # a search of its own, which has not waited yet


def test_a_cap_counts_earlier_trials_too_and_is_never_passed():
    past = {A: Past(40, 32.0), B: Past(24, 32.0)}
    assert budget(Ansor(max_trials=64), past, again={A, B}).total == 2
    assert budget(Ansor(max_trials=80), past, again={A, B}).total == 16 + 2
    assert budget(AutoTVM(max_trials=64), past).total == 0
    assert budget(Ansor(trials_per_kernel=5, max_trials=1), {A: Past(), B: Past(0, 0.1)}, again={A, B}).total == 1


def test_two_steps_do_not_count_on_the_same_trials():
    step = AutoTVM(kernel_trials=100)
    past = {A: Past(150)}
    assert budget(step, past).total == 0
    assert budget(step, past, before=[step]).total == 50


def test_a_space_that_has_nothing_more_to_give_is_not_planned_again():
    step = AutoTVM(early_stopping_threshold="100 %", exploration_trials=50)
    past = {A: Past(380), B: Past(380)}
    found = reuse.planned(step, [], past, {A}, {A: 0, B: 20.0})
    assert (found.total, found.limits) == (1 + 20, {A: 1, B: 20})
    assert Plan.afresh(step, [A, B], {A: 400}).limits == {A: 400, B: 2000}
    assert Plan.afresh(step, [A, B], {A: 400}).total == 2400
    assert Plan.afresh(AutoTVM(max_trials=9), [A, B], {A: 4, B: 3}).total == 7
    assert Plan.afresh(AutoTVM(max_trials=5), [A, B], {A: 4, B: 3}).total == 5
    assert Plan.afresh(Ansor(), [A, B], {A: 4}) == Plan(2000)


# What failed in earlier runs


def failing(space, indices):
    """Trials of points that failed."""
    made = space.measure([space.realize(index) for index in indices])
    return [replace(trial, status=TrialStatus.RUN_TIMEOUT, latencies_s=()) for trial in made]


@pytest.mark.parametrize("name", TUNERS)
@pytest.mark.parametrize("ran", [range(0), range(30, 40)])
def test_what_failed_before_is_not_tried_again(name, ran):
    space = RecordedSpace({"a": range(8), "b": range(8)}, lambda index: 1e-3 + index * 1e-6)
    earlier = [*failing(space, range(20)), *space.measure([space.realize(index) for index in ran])]
    tuner = TUNERS[name](space, seed=0, earlier=earlier)
    trials = spend(tuner, 100, space.measure)
    asked = [trial.decisions[0] for trial in trials]
    assert sorted(asked) == sorted({*range(20, 64)} - {*ran[1:]})  # the best of those that ran is measured again
    assert tuner.exhausted == 64
    assert len([latency for _, latency in tuner._known if latency is None]) == 20  # and they are learned


def test_failures_of_a_template_that_has_changed_since_are_forgotten():
    space = RecordedSpace({"a": range(4)}, lambda index: 1e-3)
    earlier = [replace(trial, key="0" * 16) for trial in failing(space, range(4))]
    tuner = TUNERS["random"](space, seed=0, earlier=earlier)
    assert tuner.exhausted == 0 and len(spend(tuner, 9, space.measure)) == 4


# Random trials


def far_space():
    """Six knobs of eight values; the latency grows with the number of a point."""
    return RecordedSpace({name: range(8) for name in "abcdef"}, lambda index: 1e-3 + index * 1e-9)


@pytest.mark.parametrize("name", TUNERS)
def test_random_trials_start_from_past_records_however_slow(name):
    """Nearly all of the past is slow; half of the new trials are to start there, the others from the fastest."""
    space = far_space()
    slow = np.random.default_rng(0).integers(len(space) // 2, len(space), 30)
    earlier = space.measure([space.realize(int(index)) for index in [*range(3), *slow]])

    def near(random):
        tuner = TUNERS[name](space, seed=0, earlier=earlier)
        if random:
            tuner.start_at_random(20, of=40)
        asked = [candidate.decisions[0] for candidate in tuner.ask(1)]
        assert asked == [0]  # the best of the past
        for _ in range(10):
            found = tuner.ask(4)
            tuner.tell(found, space.measure(found))
            asked += [candidate.decisions[0] for candidate in found]
        assert len(set(asked)) == 41
        digits, starts = (digits_of(indices, space.radices) for indices in (asked, slow))
        return int(((digits[:, None, :] != starts[None]).sum(axis=2).min(axis=1) <= 2).sum())

    assert near(random=True) >= max(17, near(random=False) + 4)


@pytest.mark.parametrize("name", TUNERS)
def test_random_starts_that_were_hard_to_find_are_made_up_for_within_a_batch(name):
    """Nearly every point beside the past ones is invalid, so batches fall short; a later one must not be overdrawn."""
    space = far_space()
    past = space.measure([space.realize(index) for index in range(12)])

    class Scarce(RecordedSpace):
        def realize(self, index):
            return super().realize(index) if index < 12 or index % 61 == 0 else None

    scarce = Scarce({name: range(8) for name in "abcdef"}, lambda index: 1e-3 + index * 1e-9)
    tuner = TUNERS[name](scarce, seed=0, earlier=past)
    tuner.start_at_random(200, of=200)
    for size in [8] * 6 + [2] * 12:
        found = tuner.ask(size)
        assert len(found) <= size
        tuner.tell(found, scarce.measure(found))


@pytest.fixture
def drawn():
    """`drawn(name)`: a tuner that knows 40 fast points whose first knobs are 0, and was sent afar twice; the space."""

    def make(name):
        space = far_space()
        high = index_of(np.random.default_rng(0).integers(5, 8, (30, 6)), space.radices)
        low = index_of([(0, 0, 0, 0, b, a) for a in range(2) for b in range(8)], space.radices)
        tuner = TUNERS[name](space, seed=0, earlier=space.measure([space.realize(index) for index in [*low, *high]]))
        tuner.start_at_random(2, of=2)
        while len(tuner._drawn) < 2:
            asked = tuner.ask(2)
            tuner.tell(asked, space.measure(asked))
        assert max(digits_of(tuner._ranked()[:16], space.radices)[:, 0]) == 0
        return tuner, space

    return make


def test_chains_of_annealing_begin_at_random_starts_too(drawn):
    tuner, space = drawn("xgb")
    assert {*tuner._drawn, *tuner._ranked()[:30]} <= set(index_of(tuner._begin()[0], space.radices))


def test_random_starts_have_children(drawn, monkeypatch):
    monkeypatch.setattr(genetic, "_MUTATION", 0.0)
    tuner, space = drawn("genetic")
    children = digits_of(tuner._propose(16), space.radices)
    assert 0 < (children[:, 0] > 0).mean() < 0.5  # none of the fastest has that


def test_a_descent_takes_a_step_from_the_last_random_start_after_those_from_the_fastest(drawn):
    tuner, space = drawn("droplet")
    asked, fastest = digits_of(list(tuner._propose(1)), space.radices), tuner._ranked()[0]
    near = [(asked != digits_of([index], space.radices)).sum(axis=1) == 1 for index in (fastest, tuner._drawn[-1])]
    assert fastest == 0 and near[0][:6].all()  # all of its neighbours: there is none below it
    assert near[1][6:10].all() and not near[1][:6].any()


def test_without_past_records_random_trials_change_nothing():
    space = far_space()
    plain, asked = (TUNERS["xgb"](space, seed=3) for _ in range(2))
    asked.start_at_random(20, of=40)
    assert [trial.key for trial in spend(plain, 40, space.measure)] == [
        trial.key for trial in spend(asked, 40, space.measure)
    ]


def test_a_point_measured_again_is_learned_with_the_others():
    """The best of the past is known already: it is not asked for, and the rest are learned all the same."""
    space = far_space()
    earlier = space.measure([space.realize(index) for index in range(10, 40)])
    tuner = TUNERS["genetic"](space, seed=0, earlier=earlier, known=earlier[:1])
    assert len(tuner._known) == 30 and not {10, 11} & {c.decisions[0] for c in tuner.ask(16)}


# The allocator


def test_the_allocator_goes_on_where_earlier_runs_ended(tiny_tasks):
    infos = [tiny_tasks[name].info for name in ("conv2d+relu", "matmul+add")]
    conv, gemm = (info.key for info in infos)
    allocator = Allocator(infos, dict.fromkeys((conv, gemm), 1e-3), None, 10, {conv: 5, gemm: 5})
    allocator.begun(conv, 400, 10)
    allocator.begun(gemm, 400, 8)
    allocator.again(gemm, 5e-4)
    assert not allocator.is_fresh(gemm) and allocator.room(gemm) == 4
    assert allocator.next_task() == gemm  # the other had stopped early
    allocator.record(gemm, [6e-4, None])
    assert allocator.next_task() is None
    again = Allocator(infos, dict.fromkeys((conv, gemm), 1e-3), None, 10)
    again.begun(gemm, 400, 8)
    again.again(gemm, 5e-4)
    again.record(gemm, [4e-4, 6e-4])  # an improvement, so it goes on
    assert again.next_task() is not None and not again._tasks[gemm].finished
