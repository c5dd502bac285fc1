"""The loop on a real model, with invented answers: budget, spread, stop, resume, determinism."""

import shutil
import threading
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import onnx
import pytest
from fake_measurer import DEFAULT_S, FakeMeasurer, keys, stop_after

from tvmlab import rates
from tvmlab.compat import load_meta_schedule
from tvmlab.core import InputError, RecordError, TaskInfo, TrialStatus
from tvmlab.experiment import Ansor, Experiment, Measure, Selective, TransferTuning
from tvmlab.loop import _batch_sizes, _Stage
from tvmlab.measure.replay import ReplayMeasurer
from tvmlab.records import RunFolder
from tvmlab.run_model import model_of
from tvmlab.search.allocate import Allocator, fit_batch_size
from tvmlab.search_process import _outcome as outcome
from tvmlab.search_process import check_experiment, search
from tvmlab.session import estimate_s
from tvmlab.strategies import warm_records


def test_the_budget_is_spent_to_the_last_trial(make_folder, run):
    for total in (1, 13, 16):
        trials = run(make_folder(max_trials=total))
        assert [trial.trial for trial in trials] == list(range(1, total + 1))


def test_each_tunable_task_has_one_default_first(make_folder, run, tiny_tasks):
    folder = make_folder(max_trials=2)
    run(folder)
    tunable = [task.key for task in tiny_tasks.values() if task.info.tunable]
    recorded = list(folder.trials())
    assert [trial.task_key for trial in recorded[: len(tunable)]] == tunable
    assert all(trial.trial == 0 and trial.strategy == "default" for trial in recorded[: len(tunable)])
    assert all(trial.trial > 0 and trial.strategy == "evolution" for trial in recorded[len(tunable) :])


def test_the_larger_task_gets_more_and_a_reshape_gets_nothing(make_folder, run, tiny_tasks):
    conv, gemm, reshape = (tiny_tasks[name].key for name in ("conv2d+relu", "matmul+add", "reshape"))
    for large, small in ((conv, gemm), (gemm, conv)):
        measurer = FakeMeasurer({large: 1e-2, small: 1e-4})
        trials = run(make_folder(max_trials=40), measurer)
        spent = Counter(trial.task_key for trial in trials)
        assert trials[0].task_key == large
        assert spent[large] > 2 * spent[small]
        assert reshape not in spent and reshape not in measurer.defaults


def test_trials_are_recorded_as_they_were_answered(make_folder, run):
    for trial in run(make_folder()):
        assert trial.ok and len(trial.latencies_s) == 3
        assert sorted(trial.latencies_s)[1] == trial.latency_s
        assert (trial.step, trial.build_s, trial.run_s) == (0, 0.1, 0.01)


def test_early_stopping_ends_the_run(make_folder, run, tiny_tasks):
    """Every candidate is as fast as the first one: nothing ever improves on it."""
    folder = make_folder(max_trials=400, early_stopping_threshold=10, batch_size=4)

    class Flat(FakeMeasurer):
        def measure(self, candidates):
            for measured in super().measure(candidates):
                yield replace(measured, latencies_s=(DEFAULT_S,))

    spent = Counter(trial.task_key for trial in run(folder, Flat()))
    assert len(spent) == 2
    # One batch is always under way when the last of ten in vain is recorded.
    assert all(11 <= count <= 20 for count in spent.values())


def test_failures_are_recorded_and_counted(make_folder, run):
    broken = [TrialStatus.BUILD_ERROR, TrialStatus.CRASHED, TrialStatus.WRONG_RESULT, TrialStatus.RUN_TIMEOUT]

    def fails(candidate):
        number = int(candidate.key[-1], 16)
        return broken[number % 4] if number < 8 else None

    folder = make_folder(max_trials=32)
    trials = run(folder, FakeMeasurer(fails=fails))
    assert len(trials) == 32
    for trial in trials:
        expected = fails(trial)
        assert trial.status is (expected or TrialStatus.OK)
        assert (trial.latency_s is None) == (expected is not None)
        assert trial.message == (f"{expected} as asked" if expected else "")
    assert len({trial.status for trial in trials}) >= 3
    ok = [trial.latency_s for trial in trials if trial.ok]
    best = {trial.task_key for trial in trials if trial.ok and trial.latency_s == min(ok)}
    assert len(best) == 1


def test_a_run_in_which_everything_fails_spends_its_budget(make_folder, run):
    folder = make_folder(max_trials=24)
    trials = run(folder, FakeMeasurer(fails=lambda candidate: TrialStatus.BUILD_ERROR))
    assert len(trials) == 24 == len(set(keys(trials)))
    assert folder.state.estimate_s == pytest.approx(2 * DEFAULT_S)  # what is unscheduled still runs


def test_the_database_is_tvms_own_and_its_best_is_the_best_trial(make_folder, run, tiny_tasks):
    folder = make_folder(max_trials=24)
    trials = run(folder)
    database = load_meta_schedule().database.JSONDatabase(work_dir=str(folder.path))
    assert len(database) == 24 + 2  # the defaults are offered too
    for task in (task for task in tiny_tasks.values() if task.info.tunable):
        mine = [trial for trial in trials if trial.task_key == task.key]
        (best,) = database.get_top_k(database.commit_workload(task.module), 1)
        fastest = min(mine, key=lambda trial: trial.latency_s)
        assert [float(best.run_secs[0])] == pytest.approx([fastest.latency_s])
        records = warm_records(database, task)
        assert [latency for _, latency in records] == pytest.approx(sorted(trial.latency_s for trial in mine))


class Interrupted(FakeMeasurer):
    """One repeat of everything that is faster than the default kernel takes a hundred times as long."""

    def latencies(self, candidate):
        slow, middle, fast = super().latencies(candidate)
        return (100 * slow if middle < DEFAULT_S else slow), middle, fast


def test_an_interrupted_repeat_does_not_hide_the_best(make_folder, run, tiny_tasks):
    """TVM ranks by the mean: with all repeats, its best would be the slowest of them."""
    folder = make_folder(max_trials=24)
    trials = run(folder, Interrupted())
    database = load_meta_schedule().database.JSONDatabase(work_dir=str(folder.path))
    for task in (task for task in tiny_tasks.values() if task.info.tunable):
        fastest = min(trial.latency_s for trial in trials if trial.task_key == task.key)
        (best,) = database.get_top_k(database.commit_workload(task.module), 1)
        assert [float(second) for second in best.run_secs] == pytest.approx([fastest])
        assert fastest < DEFAULT_S


def test_estimates(make_folder, run, tiny_tasks):
    folder = make_folder()
    trials = run(folder)
    infos = [task.info for task in tiny_tasks.values() if task.info.tunable]
    best = {info.key: min(t.latency_s for t in [*folder.trials()] if t.task_key == info.key) for info in infos}
    assert folder.state.estimate_s == pytest.approx(sum(info.weight * best[info.key] for info in infos))
    assert folder.state.untuned_s == pytest.approx(2 * DEFAULT_S)
    assert folder.state.trials == len(trials) == folder.state.total_trials
    assert estimate_s(infos, {infos[0].key: 1.0}) is None


@pytest.mark.parametrize("count", [1, 5, 17])
def test_stop_and_resume_reach_the_total_and_repeat_nothing(make_folder, run, count):
    folder = make_folder(max_trials=24)
    stop, measurer = stop_after(count)
    before = run(folder, measurer, stop=stop)
    assert count <= len(before) <= count + 1  # the trial under way is finished
    assert [trial.trial for trial in before] == list(range(1, len(before) + 1))
    assert folder.state.trials == len(before) and folder.state.total_trials == 24
    second = FakeMeasurer()
    after = run(folder, second)
    assert after[: len(before)] == before
    assert [trial.trial for trial in after] == list(range(1, 25))
    assert len(set(keys(after))) == 24
    assert second.defaults == []
    assert [trial.elapsed_s for trial in after] == sorted(trial.elapsed_s for trial in after)


def test_stop_during_the_defaults_and_resume(make_folder, run):
    folder = make_folder(max_trials=4)
    stop = threading.Event()

    class StopsAtOnce(FakeMeasurer):
        def measure_defaults(self, task_keys):
            for measured in super().measure_defaults(task_keys):
                stop.set()
                yield measured

    assert run(folder, StopsAtOnce(), stop=stop) == []
    assert len(list(folder.trials())) == 1
    second = FakeMeasurer()
    assert len(run(folder, second)) == 4
    assert len(second.defaults) == 1


def test_a_default_kernel_that_failed_is_measured_again_by_the_next_session(make_folder, run):
    """A build worker that was killed, or a build on a busy machine, would else leave the model without an estimate."""
    folder = make_folder(max_trials=8)
    stop, first = stop_after(2)

    class Fails(FakeMeasurer):
        def measure_defaults(self, task_keys):
            for number, measured in enumerate(super().measure_defaults(task_keys)):
                yield measured if number else replace(measured, status=TrialStatus.BUILD_TIMEOUT, latencies_s=())

    failing = Fails(on_measure=first.on_measure)
    run(folder, failing, stop=stop)
    assert folder.state.untuned_s is None and len(failing.defaults) == 2
    second = FakeMeasurer()
    run(folder, second)
    assert second.defaults == failing.defaults[:1] and folder.state.untuned_s == pytest.approx(2 * DEFAULT_S)
    third = FakeMeasurer()
    run(folder, third)
    assert third.defaults == []


def test_resuming_a_finished_run_adds_nothing(make_folder, run):
    folder = make_folder(max_trials=6)
    before = run(folder)
    measurer = FakeMeasurer()
    assert run(folder, measurer) == before
    assert measurer.asked == [] and measurer.defaults == []


def test_resume_after_many_failures_goes_on(make_folder, run):
    """A resumed search has no records then; its own earlier samples are not the end of the space."""
    folder = make_folder(max_trials=60, batch_size=20)
    stop, measurer = stop_after(30)
    measurer.fails = lambda candidate: TrialStatus.BUILD_ERROR
    before = run(folder, measurer, stop=stop)
    assert 30 <= len(before) <= 31
    after = run(folder)
    assert len(set(keys(after))) == 60
    spent = Counter(trial.task_key for trial in after[len(before) :])
    assert set(spent) == {trial.task_key for trial in before} and len(spent) == 2


def test_the_time_limit_ends_the_run(make_folder, run):
    folder = make_folder(max_trials=100_000, trials_per_kernel=100_000, time_limit_s=1.5)
    trials = run(folder)
    assert 1 <= len(trials) < 100_000
    assert 1.5 <= folder.state.elapsed_s < 60.0
    # The limit counts the tuning time of all sessions: nothing is left of it.
    assert len(run(folder)) == len(trials)


def test_same_seed_and_same_answers_give_the_same_run(make_folder, run):
    first, second = (run(make_folder(max_trials=32)) for _ in range(2))
    assert keys(first) == keys(second)
    assert [t.decisions for t in first] == [t.decisions for t in second]
    other = run(make_folder(max_trials=32, seed=1))
    assert keys(other) != keys(first)
    assert len(set(keys(other)) - set(keys(first))) > 16


def test_replaying_a_recorded_run_gives_the_same_candidates(make_folder, run):
    recorded = make_folder(max_trials=24)
    first = run(recorded)
    measurer = ReplayMeasurer(recorded.trials())
    second = run(make_folder(max_trials=24), measurer)
    assert keys(second) == keys(first)
    assert [t.latencies_s for t in second] == [t.latencies_s for t in first]
    assert measurer.run_s == pytest.approx(sum(t.run_s for t in recorded.trials()))
    with pytest.raises(RecordError, match="never measured"):
        run(make_folder(max_trials=24, seed=1), ReplayMeasurer(recorded.trials()))


def test_warm_start_measures_the_best_of_the_other_run_first(make_folder, run, cpu):
    source = make_folder(max_trials=24)
    source.write_json("environment.json", {"target": cpu.as_record()})
    before = run(source)
    for step in ({"warm_start": [source.id]}, {"warm_start": [str(source.path)]}):
        warm = run(make_folder(max_trials=8, batch_size=2, seed=1, **step))
        for task_key in {trial.task_key for trial in warm}:
            best = min((t for t in before if t.task_key == task_key), key=lambda t: t.latency_s)
            first = next(t for t in warm if t.task_key == task_key)
            assert first.key == best.key
    assert run(source) == before  # the other run was only read


def test_warm_start_for_another_target_is_refused(make_folder, run, cpu):
    source = make_folder(max_trials=4)
    run(source)
    source.write_json("environment.json", {"target": {**cpu.as_record(), "attrs": {"kind": "llvm", "mcpu": "znver4"}}})
    with pytest.raises(InputError, match=r"znver4.*leave it out of warm_start"):
        run(make_folder(warm_start=[source.id]))


def test_two_steps_add_up(make_folder, run):
    small = {"population": 16, "generations": 1}
    folder = make_folder(steps=[Ansor(max_trials=8, **small), Ansor(max_trials=6, **small)])
    trials = run(folder)
    assert Counter(trial.step for trial in trials) == {0: 8, 1: 6}
    assert folder.state.total_trials == 14
    assert folder.state.steps_done == 2


@pytest.mark.slow
def test_a_resumed_run_passes_over_the_steps_that_are_done(make_folder, run):
    """The first step ended early. Its budget is not spent afterwards, though with other answers it would go on."""
    small = {"population": 16, "generations": 1}
    steps = [Ansor(max_trials=400, early_stopping_threshold=2, **small), Ansor(max_trials=12, **small)]
    folder = make_folder(steps=steps)
    stop = threading.Event()

    class StopsInTheSecond(FakeMeasurer):
        def measure(self, candidates):
            for measured in super().measure(candidates):
                yield measured
                if folder_steps(folder) == {0, 1}:
                    stop.set()

    before = run(folder, StopsInTheSecond(), stop=stop)
    first = [trial for trial in before if trial.step == 0]
    assert folder.state.steps_done == 1 and len(first) < 400 and len(before) < len(first) + 12
    after = run(folder)
    assert [trial for trial in after if trial.step == 0] == first
    assert len(after) == len(first) + 12 == folder.state.total_trials
    assert folder.state.steps_done == 2


def folder_steps(folder):
    return {trial.step for trial in folder.trials() if trial.trial > 0}


def test_search_writes_the_folder_and_closes_the_measurer(make_folder):
    """The whole search process but for the process: import, environment, loop, outcome."""
    folder, measurer = make_folder(max_trials=4), FakeMeasurer()
    search(folder, threading.Event(), lambda tasks, target, where: measurer)
    assert measurer.closed
    assert (folder.status, folder.state.trials, folder.state.message) == ("done", 4, "")
    assert folder.environment["target"]["name"] == "cpu"
    assert folder.environment["versions"]["apache-tvm"]
    assert folder.environment["model"]["name"] == "tiny"
    assert {info.kernel_class for info in folder.tasks} == {"conv2d+relu", "matmul+add", "reshape"}
    assert folder.roofline.peak_gflops > 0


def test_search_says_why_it_stopped_short(make_folder):
    folder = make_folder(max_trials=400, early_stopping_threshold=2)
    search(folder, threading.Event(), lambda tasks, target, where: FakeMeasurer())
    assert folder.status == "done" and folder.state.trials < 400
    assert "stopped early" in folder.state.message
    stop = threading.Event()
    stop.set()
    folder = make_folder(max_trials=4)
    search(folder, stop, lambda tasks, target, where: FakeMeasurer())
    assert folder.status == "stopped" and "resume" in folder.state.message


@pytest.mark.parametrize("step", [Selective(2, trials_per_kernel=4), TransferTuning("source", refine=3)])
def test_a_stop_with_the_trials_spent_and_more_to_do_is_a_stop(make_folder, step):
    """Whole models are timed, or poorly served tasks looked for, when no trial is left."""
    folder = make_folder(steps=[step])
    session = SimpleNamespace(
        experiment=folder.experiment, plan=None, steps_done=0, trials=8, total_trials=8, stop=threading.Event()
    )
    session.stop.set()
    assert outcome(session) == ("stopped", "stopped on request; tvmlab resume continues to the total that was asked")


def test_search_refuses_to_continue_with_another_model(tiny_onnx, tmp_path):
    path = shutil.copy(tiny_onnx, tmp_path / "net.onnx")
    folder = RunFolder.create(Experiment(model=str(path), target="cpu", steps=[Ansor(max_trials=2)]), tmp_path / "runs")
    search(folder, threading.Event(), lambda tasks, target, where: FakeMeasurer())
    assert model_of(folder).sha256 == folder.environment["model"]["sha256"]
    changed = onnx.load(path)
    changed.graph.name = "exported again"
    onnx.save(changed, path)
    with pytest.raises(InputError, match=r"net\.onnx is another model now than the one that run .* began with"):
        search(folder, threading.Event(), lambda tasks, target, where: FakeMeasurer())
    with pytest.raises(InputError, match="start a new run"):
        check_experiment(folder.experiment, folder)


def test_search_refuses_to_continue_another_machines_run(make_folder):
    folder = make_folder()
    other = {"target": {"attrs": {"kind": "llvm", "mcpu": "znver1"}, "label": "Another CPU"}}
    folder.write_json("environment.json", other)
    with pytest.raises(InputError, match="made on Another CPU"):
        search(folder, threading.Event(), lambda tasks, target, where: FakeMeasurer())
    assert folder.environment == other


@pytest.mark.parametrize(("limit_s", "cores", "counted"), [(100, 2, 300), (100, 16, 720), (None, 16, 5000)])
def test_batches_fit_the_trials_that_time_and_cores_allow(monkeypatch, limit_s, cores, counted):
    monkeypatch.setattr(rates, "read_cpu", lambda: SimpleNamespace(cores=cores))
    session = SimpleNamespace(experiment=SimpleNamespace(time_limit_s=limit_s, measure=Measure()))
    assert _batch_sizes(session, Ansor(), 5000, 10) == fit_batch_size(counted, 10)
    assert fit_batch_size(300, 10) != fit_batch_size(720, 10)
    assert _batch_sizes(session, Ansor(batch_size=7), 5000, 10) == (7, 7)


@pytest.mark.parametrize(
    ("at_once", "busy", "chosen"), [(2, "a", "a"), (2, "aab", "b"), (2, "aabb", None), (None, "aabb", "a")]
)
def test_of_a_descent_no_more_than_two_batches_of_a_task_are_under_way(at_once, busy, chosen):
    """It goes on from where the answers led it; a search that a model guides may run further ahead."""
    infos = [TaskInfo(key, key, "conv2d", 1, flops, 1.0, True) for key, flops in (("a", 1e6), ("b", 1e3))]
    allocator = Allocator(infos, {"a": 1.0, "b": 1e-3}, None, 1000)
    strategies = {key: SimpleNamespace(ask=lambda count: ["candidate"] * count) for key in "ab"}
    stage = _Stage(SimpleNamespace(search_s=0.0), 0, allocator, strategies, (4, 4), 100, at_once)
    assert (stage.search(list(busy)) or (None,))[0] == chosen
