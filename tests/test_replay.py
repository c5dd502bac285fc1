"""The replay measurer: recorded answers, recorded time, and no answer to what was never measured."""

from dataclasses import replace

import pytest

from tvmlab.core import Candidate, RecordError, TrialStatus
from tvmlab.measure.replay import ReplayMeasurer


@pytest.fixture
def folder(make_run):
    return make_run(
        [("conv2d_relu", [500.0, 510.0, 490.0]), ("dense", TrialStatus.CRASHED), ("dense", 200.0)],
        defaults={"conv2d_relu": 1000.0, "dense": TrialStatus.RUN_TIMEOUT},
    )


def candidates(folder, of=lambda trial: trial.trial > 0):
    return [Candidate(t.task_key, t.key, t.sketch, t.decisions) for t in folder.trials() if of(t)]


def test_it_answers_what_was_recorded_whatever_the_order(folder):
    recorded = {t.key: t for t in folder.trials()}
    asked = candidates(folder)[::-1]
    for candidate, found in zip(asked, ReplayMeasurer(folder.trials()).measure(asked), strict=True):
        trial = recorded[candidate.key]
        assert (found.status, found.latencies_s) == (trial.status, tuple(trial.latencies_s))
        assert (found.build_s, found.run_s, found.message) == (trial.build_s, trial.run_s, trial.message)


def test_it_charges_the_recorded_time(folder):
    measurer = ReplayMeasurer(folder.trials())
    asked = candidates(folder)
    for number, _ in enumerate(measurer.measure(asked), start=1):
        assert measurer.build_wait_s == pytest.approx(0.2 * number)
        assert measurer.run_s == pytest.approx(0.1 * number)
    assert number == 3


def test_the_defaults(folder):
    measurer = ReplayMeasurer(folder.trials())
    conv, dense = (task.key for task in folder.tasks[:2])
    first, second = measurer.measure_defaults([conv, dense])
    assert first.latencies_s == (1e-3,)
    assert second.status is TrialStatus.RUN_TIMEOUT and second.latencies_s == ()


def test_a_candidate_never_measured_is_refused(folder):
    measurer = ReplayMeasurer(folder.trials())
    known = candidates(folder)[0]
    strange = Candidate(known.task_key, "0" * 16, 0, [])
    other_task = Candidate("f" * 16, known.key, 0, [])
    for candidate in (strange, other_task):
        with pytest.raises(RecordError, match=f"candidate {candidate.key} of task {candidate.task_key}"):
            list(measurer.measure([candidate]))
    with pytest.raises(RecordError, match="task ffffffffffffffff is not in the records"):
        list(measurer.measure_defaults(["f" * 16]))


def test_a_default_kernel_is_no_candidate(folder):
    default = candidates(folder, of=lambda trial: trial.trial == 0)
    with pytest.raises(RecordError, match="never measured"):
        list(ReplayMeasurer(folder.trials()).measure(default))


def test_the_answers_before_the_unknown_one_are_given(folder):
    asked = [*candidates(folder)[:1], Candidate("f" * 16, "0" * 16, 0, [])]
    measuring = ReplayMeasurer(folder.trials()).measure(asked)
    assert next(measuring).status is TrialStatus.OK
    with pytest.raises(RecordError):
        next(measuring)


def paired(folder):
    """A candidate that was recorded beside a rival; the trials, and the two as candidates."""
    trials = list(folder.trials())
    rival, ours = (trial for trial in trials if trial.trial > 0 and trial.ok)
    trials[trials.index(ours)] = ours = replace(
        ours, task_key=rival.task_key, latencies_s=[1e-4, 2e-4], rival=rival.key, rival_latencies_s=[3e-4, 4e-4]
    )
    first, second = (Candidate(t.task_key, t.key, t.sketch, t.decisions) for t in (ours, rival))
    return trials, first, second


def test_turns_with_a_rival_are_answered_as_recorded(folder):
    trials, ours, rival = paired(folder)
    alone, beside = ReplayMeasurer(trials).measure([ours, replace(ours, rival=rival)])
    assert (alone.latencies_s, alone.rival_latencies_s) == ((1e-4, 2e-4), ())
    assert (beside.latencies_s, beside.rival_latencies_s) == ((1e-4, 2e-4), (3e-4, 4e-4))


def test_two_that_never_met_are_answered_with_what_each_was_recorded_with(folder):
    trials, ours, rival = paired(folder)
    (found,) = ReplayMeasurer(trials).measure([replace(rival, rival=ours)])
    assert found.latencies_s == pytest.approx((500e-6, 510e-6))  # as many as both have
    assert found.rival_latencies_s == (1e-4, 2e-4)


def test_the_default_kernel_may_be_a_rival(folder):
    trials, ours, _ = paired(folder)
    default = next(t for t in trials if t.trial == 0 and t.task_key == ours.task_key)
    start = Candidate(default.task_key, default.key, -1, ())
    (found,) = ReplayMeasurer(trials).measure([replace(ours, rival=start)])
    assert (found.latencies_s, found.rival_latencies_s) == ((1e-4,), (1e-3,))


def test_a_rival_that_failed_leaves_the_measurement_alone(folder):
    trials, ours, _ = paired(folder)
    crashed = next(t for t in trials if t.status is TrialStatus.CRASHED)
    rival = Candidate(crashed.task_key, crashed.key, 0, [])
    trials = [replace(t, task_key=crashed.task_key) if t.key == ours.key else t for t in trials]
    (found,) = ReplayMeasurer(trials).measure([replace(ours, task_key=crashed.task_key, rival=rival)])
    assert (found.latencies_s, found.rival_latencies_s) == ((1e-4, 2e-4), ())
    (found,) = ReplayMeasurer(trials).measure([replace(rival, rival=ours)])
    assert found.status is TrialStatus.CRASHED and found.rival_latencies_s == ()


def test_a_rival_never_measured_is_refused(folder):
    trials, ours, _ = paired(folder)
    strange = Candidate(ours.task_key, "0" * 16, 0, [])
    with pytest.raises(RecordError, match=f"candidate {strange.key} of task {ours.task_key} was never measured"):
        list(ReplayMeasurer(trials).measure([replace(ours, rival=strange)]))
