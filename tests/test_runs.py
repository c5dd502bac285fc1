"""Whole runs on a tiny model: real processes, real kernels; stopped, killed and resumed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import tvmlab
from tvmlab import Ansor, LayoutTuning
from tvmlab.core import InputError, MissingTool, RecordError, RunError
from tvmlab.experiment import afresh
from tvmlab.records import RunFolder
from tvmlab.run import Run

ENDED_S = 10.0


@pytest.fixture
def started():
    """Runs that a test starts end with it."""
    runs = []
    yield lambda run: runs.append(run) or run
    for run in runs:
        pid = run.folder.read_json("state.json", missing={}).get("pid")
        if pid and run.folder.is_locked():
            os.kill(pid, signal.SIGKILL)


def wait_until(condition, within_s=60.0):
    deadline = time.monotonic() + within_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
    return found


def after_trials(run, count):
    """Wait until a run has so many trials."""
    wait_until(lambda: sum(row["trial"] > 0 for row in run.folder.rows()) >= count or run.status != "running")
    assert run.status == "running", run.folder.log_tail()


def processes_of(run):
    """The search process of a run and its workers."""
    search = psutil.Process(wait_until(lambda: run.folder.state.pid))
    return search, search.children()


def worker_named(processes, module):
    return next(process for process in processes if module in process.cmdline())


def assert_gone(processes):
    """Every process ends within seconds (a zombie has ended)."""
    wait_until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes), ENDED_S)


def assert_complete(run, total, earlier=()):
    """A run that is done has each trial once, the earlier ones as they were."""
    trials = [trial for trial in run.folder.trials() if trial.trial > 0]
    assert run.status == "done"
    assert [trial.trial for trial in trials] == list(range(1, total + 1))
    assert trials[: len(earlier)] == list(earlier)
    assert len({(trial.task_key, trial.key) for trial in trials}) == total


def trials_of(run):
    return [trial for trial in run.folder.trials() if trial.trial > 0]


def test_a_run_from_start_to_end(tiny_run):
    assert tiny_run.status == "done"
    progress = tiny_run.progress
    assert (progress.trials, progress.total_trials) == (8, 8)
    assert 0 < progress.estimate_ms <= progress.untuned_ms
    assert progress.trials_per_s > 0
    frame = tiny_run.frame()
    measured = frame[frame["trial"] > 0]
    assert len(measured) == 8
    assert (measured["status"] == "ok").sum() >= 4
    assert_complete(tiny_run, 8)
    assert all(len(trial.latencies_s) in (1, 2) for trial in trials_of(tiny_run) if trial.ok)


def test_a_run_folder_tells_where_it_was_made(tiny_run):
    environment = tiny_run.folder.environment
    assert environment["target"]["attrs"]["kind"] == "llvm"
    assert environment["target"]["roofline"]["peak_gflops"] > 0
    assert environment["model"]["name"] == "tiny" and len(environment["model"]["sha256"]) == 64
    assert set(environment["versions"]) >= {"tvmlab", "apache-tvm", "apache-tvm-ffi"}
    assert {task.kernel_class for task in tiny_run.folder.tasks} == {"conv2d+relu", "matmul+add", "reshape"}
    state = tiny_run.folder.state
    assert 0 < sum(state.phases.values()) < state.elapsed_s + 1


def test_a_finished_run_leaves_no_process_and_no_scratch_folder(tiny_run):
    wait_until(lambda: tiny_run.status == "done" and not psutil.pid_exists(tiny_run.folder.state.pid), ENDED_S)
    assert {path.name for path in tiny_run.folder.path.iterdir()} <= {
        "experiment.json", "environment.json", "tasks.json", "trials.jsonl", "state.json", "lock", "log.txt",
        "compare.json", "database_workload.json", "database_tuning_record.json",
    }  # fmt: skip


def test_attach_resume_stop_and_list_a_finished_run(tiny_run):
    runs_dir = tiny_run.folder.path.parent
    assert tvmlab.attach(tiny_run.id, runs_dir).progress == tiny_run.progress
    before = trials_of(tiny_run)
    assert tvmlab.resume(tiny_run.id, runs_dir).status == "done"
    assert tiny_run.stop().status == "done"
    assert trials_of(tiny_run) == before
    listed = tvmlab.runs(runs_dir)
    assert listed.loc[tiny_run.id, "status"] == "done" and listed.loc[tiny_run.id, "trials"] == 8


def test_a_run_shows_itself(tiny_run):
    assert tiny_run.id in repr(tiny_run) and "8/8 trials" in repr(tiny_run)
    assert "8/8 trials" in tiny_run._repr_html_()


@pytest.mark.slow
def test_stop_and_resume(tiny_experiment, started, tmp_path):
    run = started(tvmlab.tune(tiny_experiment(max_trials=8), tmp_path))
    after_trials(run, 2)
    search, workers = processes_of(run)
    with pytest.raises(RunError, match=r"is running.*attach"):
        tvmlab.resume(run)
    run.stop()
    assert run.status == "stopped"
    earlier, stopped = trials_of(run), run.folder.state
    assert 2 <= len(earlier) < 8 and stopped.wall_s > stopped.elapsed_s  # the process and the import began before
    assert_gone([search, *workers])
    # What a crash leaves behind at worst: half a line in each file that is appended to.
    for name in ("trials.jsonl", "database_tuning_record.json"):
        with (run.folder.path / name).open("ab") as file:
            file.write(b'[0, {"half')
    again = started(tvmlab.resume(run))
    with pytest.raises(RunError, match="is running"):
        tvmlab.resume(run.folder.path)
    assert_complete(again.wait(), 8, earlier)
    ended = again.folder.state
    assert ended.wall_s - stopped.wall_s > ended.elapsed_s - stopped.elapsed_s > 0


@pytest.mark.slow
def test_a_killed_device_worker_costs_one_trial_at_most(tiny_experiment, started, tmp_path):
    run = started(tvmlab.tune(tiny_experiment(max_trials=12), tmp_path))
    after_trials(run, 1)
    worker_named(processes_of(run)[1], "tvmlab.measure.device").kill()
    assert_complete(run.wait(), 12)
    assert sum(trial.ok for trial in trials_of(run)) >= 8


@pytest.mark.slow
def test_a_killed_search_process(tiny_experiment, started, tmp_path):
    run = started(tvmlab.tune(tiny_experiment(max_trials=10), tmp_path))
    after_trials(run, 1)
    search, workers = processes_of(run)
    assert len(workers) == 2
    search.kill()
    wait_until(lambda: run.status == "failed", ENDED_S)
    assert "died" in run.progress.message
    assert_gone(workers)
    with pytest.raises(RunError, match="resume continues"):
        run.wait()
    earlier = trials_of(run)
    assert_complete(started(tvmlab.resume(run)).wait(), 10, earlier)


def test_a_fork_goes_on_from_a_finished_run_and_leaves_it_alone(tiny_run, started, tmp_path):
    origin = tmp_path / tiny_run.id
    shutil.copytree(tiny_run.folder.path, origin)
    before = {path.name: path.read_bytes() for path in origin.iterdir()}
    step = Ansor(max_trials=3, population=16, generations=1)
    run = started(tvmlab.fork(origin, [step], time_limit_s=60, name="branch")).wait()
    assert run.folder.path == tmp_path / "branch" and run.experiment.steps == (
        *tiny_run.experiment.steps,
        *afresh([step]),
    )
    assert_complete(run, 11, trials_of(tiny_run))
    assert [trial.step for trial in trials_of(run)] == [0] * 8 + [1] * 3
    assert len([trial for trial in run.folder.trials() if trial.trial == 0]) == 2  # the defaults are not measured again
    parent = tiny_run.progress
    assert run.progress.elapsed_s > parent.elapsed_s and run.progress.estimate_ms <= parent.estimate_ms
    assert run.experiment.time_limit_s == pytest.approx(parent.elapsed_s + 60)
    told = run.folder.read_json("fork.json")
    assert told == {"run": tiny_run.id, "trials": 8, "elapsed_s": parent.elapsed_s}
    assert {path.name: path.read_bytes() for path in origin.iterdir()} == before
    with pytest.raises(RunError, match="run branch exists"):
        tvmlab.fork(origin, [step], name="branch")


KILLED = """
import os, signal, sys, types, tvmlab
from tvmlab import run
run.subprocess = types.SimpleNamespace(DEVNULL=None, Popen=lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
tvmlab.fork(sys.argv[1], [tvmlab.Ansor(max_trials=2, population=16, generations=1)], name="branch")
"""


def test_a_fork_whose_caller_is_killed_before_it_starts_the_search_goes_on_at_once(tiny_run, started, tmp_path):
    shutil.copytree(tiny_run.folder.path, tmp_path / tiny_run.id)
    caller = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / tiny_run.id)], check=False)
    assert caller.returncode == -signal.SIGKILL
    assert tvmlab.attach("branch", tmp_path).status == "failed"
    assert_complete(started(tvmlab.resume("branch", tmp_path)).wait(), 10, trials_of(tiny_run))


def test_what_cannot_be_forked_is_refused(tiny_run, tiny_experiment, tmp_path):
    with pytest.raises(InputError, match="needs a step"):
        tvmlab.fork(tiny_run, [])
    with pytest.raises(InputError, match="LayoutTuning is not the first step"):
        tvmlab.fork(tiny_run, [LayoutTuning()])
    folder = RunFolder.create(tiny_experiment(), tmp_path)
    folder.write_json("state.json", {**folder.read_json("state.json"), "status": "stopped"})
    with pytest.raises(RunError, match=r"is stopped: fork it when it is done"):
        tvmlab.fork(folder, [Ansor()])
    assert [path.name for path in tmp_path.iterdir()] == [folder.id]


def test_a_search_process_that_is_killed_before_it_begins_is_failed_too(tiny_experiment, started, tmp_path):
    run = started(tvmlab.tune(tiny_experiment(), tmp_path))
    run._process.kill()
    wait_until(lambda: run.status == "failed", ENDED_S)
    assert tvmlab.attach(run.id, tmp_path).status == "failed"  # nor does another reader wait for it
    with pytest.raises(RunError, match="died"):
        run.wait()


CALLER = """
import sys, time, tvmlab
from tvmlab.experiment import Experiment
run = tvmlab.tune(Experiment.from_json(sys.argv[1]), sys.argv[2])
print(run.id, flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_the_search_outlives_the_process_that_started_it(tiny_experiment, started, tmp_path):
    command = [sys.executable, "-c", CALLER, tiny_experiment().model_dump_json(), str(tmp_path)]
    caller = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    run = started(tvmlab.attach(caller.stdout.readline().strip(), tmp_path))
    os.killpg(caller.pid, signal.SIGKILL)
    caller.wait()
    caller.stdout.close()
    assert run.status == "running"
    assert_complete(run.wait(), 8)


@pytest.mark.slow
def test_a_time_limit_ends_a_run(tiny_experiment, started, tmp_path):
    run = started(tvmlab.tune(tiny_experiment(max_trials=100_000, time_limit_s=6.0), tmp_path)).wait(60)
    assert run.status == "done" and "time limit" in run.progress.message
    assert 1 <= run.progress.trials < 100_000
    assert run.progress.elapsed_s < 60


@pytest.mark.slow
def test_wait_gives_up_after_its_timeout_and_the_run_goes_on(tiny_experiment, started, tmp_path):
    run = started(tvmlab.tune(tiny_experiment(max_trials=1000), tmp_path))
    started_s = time.monotonic()
    assert run.wait(timeout=0.3) is run
    assert time.monotonic() - started_s < 30
    assert run.status == "running"
    run.stop()  # while it is still importing the model
    assert run.status == "stopped"


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"model": "resnet5"}, InputError, "unknown model 'resnet5'.*resnet50"),
        ({"model": "no/such/file.onnx"}, InputError, "cannot read"),
        ({"target": "riscv"}, InputError, "unknown target 'riscv'"),
        ({"target": "nvidia/nvidia-h100"}, InputError, "has no device here"),
        ({"target": "cpu:znver1"}, InputError, "has no device here"),
    ],
)
def test_what_cannot_be_tuned_is_refused_before_there_is_a_folder(tiny_experiment, tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        tvmlab.tune(tiny_experiment(**options), tmp_path / "runs")
    assert not list(tmp_path.rglob("experiment.json"))


def test_a_missing_gpu_is_refused_before_there_is_a_folder(tiny_experiment, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(MissingTool, match="none is attached"):
        tvmlab.tune(tiny_experiment(target="cuda"), tmp_path / "runs")
    assert not list(tmp_path.rglob("experiment.json"))


def test_a_missing_warm_start_is_refused_before_there_is_a_folder(tiny_experiment, tmp_path):
    with pytest.raises(RecordError, match="no run 'yesterday'"):
        tvmlab.tune(tiny_experiment(steps=[Ansor(warm_start=["yesterday"])]), tmp_path / "runs")
    assert not list(tmp_path.rglob("experiment.json"))


def test_a_run_that_fails_says_why(tiny_experiment, started, tmp_path, tiny_onnx):
    """The model disappears between tune() and the search process."""
    model = tmp_path / "gone.onnx"
    model.write_bytes(Path(tiny_onnx).read_bytes())
    folder = RunFolder.create(tiny_experiment(model=str(model)), tmp_path)
    model.unlink()
    command = [sys.executable, "-m", "tvmlab.search_process", str(folder.path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert folder.status == "failed"
    assert "cannot read" in folder.state.message and "gone.onnx" in folder.state.message
    with pytest.raises(RunError, match=r"gone\.onnx"):
        Run(folder).wait()


def test_a_damaged_line_stops_the_resume_and_is_named(tiny_run, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("experiment.json", "environment.json", "tasks.json", "trials.jsonl", "state.json"):
        (copy / name).write_bytes((tiny_run.folder.path / name).read_bytes())
    state = json.loads((copy / "state.json").read_bytes())
    (copy / "state.json").write_text(json.dumps({**state, "status": "stopped"}))
    lines = (copy / "trials.jsonl").read_bytes().split(b"\n")
    (copy / "trials.jsonl").write_bytes(b"\n".join([lines[0], b"{damaged", *lines[2:]]))
    run = tvmlab.resume(copy)
    with pytest.raises(RunError, match=r"line 2 of .*trials\.jsonl is damaged"):
        run.wait()


def test_runs_lists_what_it_can_read(tiny_run, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "experiment.json").write_text("{}")
    RunFolder.create(tiny_run.experiment, tmp_path)
    listed = tvmlab.runs(tmp_path)
    assert sorted(listed["status"]) == ["running", "unreadable"]
    assert tvmlab.runs(tmp_path / "nowhere").empty
