"""The run folder: torn and damaged files, foreign folders, one writer, dead processes, full disks."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest

from tvmlab import records
from tvmlab.core import MissingTool, RecordError, RunError, Trial, TrialStatus
from tvmlab.experiment import Ansor, Experiment
from tvmlab.records import FORMAT, RunFolder, State, TrialWriter, cut_torn_line
from tvmlab.run import Run, runs

EXPERIMENT = Experiment(model="squeezenet", steps=[Ansor(max_trials=4)])

HOLDER = """
import sys
from tvmlab.records import RunFolder
folder = RunFolder.open(sys.argv[1])
with folder.acquire():
    print("held", flush=True)
    sys.stdin.read()
"""


def trial(number, **changes):
    made = Trial("a" * 16, 0, "evolution", number, f"{number:016x}", 0, [[1, 2], 3], TrialStatus.OK, [1e-3, 2e-3])
    return replace(made, **changes)


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(EXPERIMENT, tmp_path)


@pytest.fixture
def written(folder):
    """A folder with three trials."""
    writer = TrialWriter(folder)
    for number in (1, 2, 3):
        writer.append(trial(number))
    writer.close()
    return folder


@pytest.fixture
def holder(folder):
    """Another process that holds the folder's lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, folder.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_a_trial_comes_back_as_it_was(folder):
    failed = trial(2, status=TrialStatus.RUN_TIMEOUT, latencies_s=[], message='no "answer"\nin time')
    writer = TrialWriter(folder)
    writer.append(trial(1))
    writer.append(failed)
    writer.close()
    assert list(folder.trials()) == [trial(1), failed]
    assert [found.latency_s for found in folder.trials()] == [1.5e-3, None]


def test_a_trial_is_on_the_disk_before_the_writer_closes(folder):
    writer = TrialWriter(folder)
    writer.append(trial(1))
    assert [found.trial for found in folder.trials()] == [1]
    writer.close()


@pytest.mark.parametrize("torn", [b"{", b'{"task_key":"aa', b'{"task_key":1}', b"\x00\x00", "é".encode()[:1]])
def test_a_torn_last_line_is_ignored_and_then_cut(written, torn):
    path = written.path / "trials.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert [found.trial for found in written.trials()] == [1, 2, 3]
    writer = TrialWriter(written)
    assert path.read_bytes() == whole
    writer.append(trial(4))
    writer.close()
    assert [found.trial for found in written.trials()] == [1, 2, 3, 4]


def test_cut_torn_line_of_a_file_that_is_nothing_but_torn(tmp_path):
    path = tmp_path / "file"
    cut_torn_line(path)
    assert not path.exists()
    for content, kept in ((b"", b""), (b"abc", b""), (b"a\n", b"a\n"), (b"a\n\nb", b"a\n\n")):
        path.write_bytes(content)
        cut_torn_line(path)
        assert path.read_bytes() == kept


@pytest.mark.parametrize("damage", [b"{}}", b"", b"\x00" * 8, b"\xff\xfe", b"5", b'{"trial": 2}'])
def test_a_damaged_middle_line_is_named(written, damage):
    path = written.path / "trials.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[1] = damage
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(RecordError, match=r"line 2 of .*trials\.jsonl is damaged"):
        list(written.trials())


def test_damaged_json_file_is_named(written):
    (written.path / "tasks.json").write_text("[{")
    with pytest.raises(RecordError, match=r"tasks\.json is damaged"):
        _ = written.tasks


def test_a_newer_format_is_refused_and_left_alone(folder):
    path = folder.path / "experiment.json"
    newer = {**json.loads(path.read_bytes()), "format": FORMAT + 1}
    path.write_text(json.dumps(newer))
    with pytest.raises(RecordError, match=f"format {FORMAT + 1}, this tvmlab reads up to {FORMAT}"):
        RunFolder.open(folder.path)
    assert json.loads(path.read_bytes()) == newer


def test_a_run_with_a_knob_that_was_retired_can_be_read(folder):
    path = folder.path / "experiment.json"
    content = json.loads(path.read_text())
    content["experiment"]["measure"]["processes"] = 4
    path.write_text(json.dumps(content))
    assert RunFolder.open(folder.path).experiment == folder.experiment


@pytest.mark.parametrize("content", [None, "[]", "{}", '{"format": 1}', '{"format": "one", "experiment": {}}', "{"])
def test_a_foreign_folder_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "experiment.json").write_text(content)
    with pytest.raises(RecordError, match=re.escape(str(tmp_path))):
        RunFolder.open(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {"experiment.json"}


def test_a_missing_folder_names_what_there_is(folder):
    with pytest.raises(RecordError, match=f"no run 'no-such-run'.*{folder.id}"):
        RunFolder.open("no-such-run", folder.path.parent)
    with pytest.raises(RecordError, match="none exist yet"):
        RunFolder.open("no-such-run", folder.path)


def test_open_by_id_by_path_and_by_itself(folder, monkeypatch):
    for run, where in (
        (folder.id, folder.path.parent),
        (folder.path, None),
        (str(folder.path), None),
        (folder, None),
    ):
        assert RunFolder.open(run, where).path == folder.path
    monkeypatch.setenv("TVMLAB_RUNS", str(folder.path.parent))
    assert RunFolder.open(folder.id).experiment == EXPERIMENT


def test_folders_made_at_once_by_threads_are_all_different(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: RunFolder.create(EXPERIMENT, tmp_path), range(40)))
    assert len({folder.id for folder in made}) == 40
    assert all(RunFolder.open(folder.path).experiment == EXPERIMENT for folder in made)


def test_folders_made_at_once_by_processes_are_all_different(tmp_path):
    with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as pool:
        made = [pool.submit(RunFolder.create, EXPERIMENT, tmp_path) for _ in range(15)]
        ids = {future.result().id for future in made}
    assert len(ids) == 15 == len(list(tmp_path.iterdir()))


def test_a_model_path_makes_a_plain_folder_name(tmp_path):
    made = RunFolder.create(Experiment(model="../my models/Ünet v2.onnx"), tmp_path)
    assert made.path.parent == tmp_path
    assert re.fullmatch(r"\d{8}-\d{6}-net-v2-ansor-s0", made.id.replace("-nicode", ""))


def test_the_lock_excludes_other_processes(folder, holder, monkeypatch):
    monkeypatch.setattr(records, "_LOCK_WAIT_S", 0.3)
    folder.write_state(State(status="running", pid=holder.pid))
    assert folder.is_locked()
    assert folder.status == "running"
    with pytest.raises(RunError, match=f"written by process {holder.pid}"):
        folder.acquire()


def test_a_killed_process_leaves_no_lock_and_a_failed_run(folder, holder):
    folder.write_state(State(status="running", pid=holder.pid))
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert folder.status == "failed"
    assert "died" in folder.state.message
    folder.acquire().release()


def test_a_run_of_another_user_is_listed_too(folder, holder, monkeypatch):
    """Its lock may not be opened to write, which filelock does; who may read it sees whether it is held."""

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    def listed():
        return runs(folder.path.parent).loc[folder.id, "status"]

    folder.write_state(State(status="running", pid=holder.pid, heartbeat_s=time.time()))
    monkeypatch.setattr(records.FileLock, "acquire", refuse)
    assert folder.is_locked() and listed() == "running"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert not folder.is_locked() and listed() == "failed"
    monkeypatch.setattr(os, "open", refuse)  # not even to read
    assert folder.is_locked() and listed() == "running"
    folder.write_state(replace(folder.state, heartbeat_s=time.time() - 1000))
    assert not folder.is_locked() and listed() == "failed"


def test_stop_asks_again_while_the_holder_has_not_said_its_name(folder, holder, monkeypatch):
    """Two processes may want the run (its launcher was killed); the one that lost the race for the lock is gone."""
    loser = subprocess.Popen([sys.executable, "-c", ""])
    loser.wait()
    folder.write_state(State(status="running", pid=loser.pid))
    monkeypatch.setattr(time, "sleep", lambda _: folder.write_state(replace(folder.state, pid=holder.pid)))
    Run(folder).stop(wait=False)
    monkeypatch.undo()
    assert holder.wait(10) == -signal.SIGTERM


@pytest.mark.parametrize("status", ["done", "stopped", "failed"])
def test_an_ended_run_keeps_its_status(folder, status):
    folder.write_state(State(status=status, pid=1))
    assert folder.status == status


def test_a_run_that_is_starting_is_running_but_not_for_ever(folder):
    assert folder.status == "running"
    folder.write_state(replace(folder.state, started_s=time.time() - 1000))
    assert folder.status == "failed"


def test_a_run_whose_launcher_died_is_not_waited_for(folder, holder):
    folder.write_state(State(status="running", launcher=holder.pid, started_s=time.time()))
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert folder.status == "failed"
    assert "tvmlab resume continues" in folder.state.message


def test_the_wall_time_of_a_run_of_before_it_was_noted_follows_from_its_times(folder):
    folder.write_state(State(status="stopped", started_s=100.0, heartbeat_s=130.0, wall_s=45.0))
    assert folder.state.wall_s == 45.0
    older = {name: value for name, value in folder.read_json("state.json").items() if name != "wall_s"}
    folder.write_json("state.json", older)
    assert folder.state.wall_s == 30.0
    folder.write_json("fork.json", {"run": "x", "trials": 4, "elapsed_s": 20.0})
    assert folder.state.wall_s == 50.0


def test_a_run_without_state_is_failed(folder):
    (folder.path / "state.json").unlink()
    assert folder.status == "failed"


def test_looking_at_the_status_does_not_keep_a_writer_out(folder):
    """Readers take the lock for an instant: a writer that starts then must get it all the same."""
    with ThreadPoolExecutor(4) as pool:
        looking = [pool.submit(lambda: [RunFolder(folder.path).is_locked() for _ in range(200)]) for _ in range(4)]
        for _ in range(20):
            folder.acquire().release()
        for future in looking:
            future.result()


def test_a_full_disk_when_the_folder_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "write_bytes", _disk_full)
    with pytest.raises(MissingTool, match=f"cannot write to {re.escape(str(tmp_path))}.*No space left"):
        RunFolder.create(EXPERIMENT, tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(MissingTool, match="cannot write"):
        RunFolder.create(EXPERIMENT, tmp_path / "runs")


def test_a_full_disk_when_a_trial_is_written(written, monkeypatch):
    writer = TrialWriter(written)

    class FullFile:
        write = staticmethod(_disk_full)

    whole = writer._file
    monkeypatch.setattr(writer, "_file", FullFile())
    with pytest.raises(MissingTool, match=r"trials\.jsonl.*No space left"):
        writer.append(trial(4))
    whole.close()
    assert list(written.trials()) == [trial(1), trial(2), trial(3)]


def test_the_heartbeat_goes_on_after_a_moment_without_room(folder, monkeypatch):
    from tvmlab import search_process

    written, refused = threading.Event(), threading.Event()
    real = RunFolder.write_json

    def write_json(self, name, value):
        if name == "state.json" and not refused.is_set():
            refused.set()
            _disk_full()
        real(self, name, value)
        written.set()

    class Session:
        state = staticmethod(lambda status, message: State(status=status, trials=7))

    monkeypatch.setattr(RunFolder, "write_json", write_json)
    monkeypatch.setattr(search_process, "_HEARTBEAT_S", 0.01)
    pulse = search_process._Heartbeat(folder, Session())
    pulse.start()
    assert written.wait(10) and refused.is_set()
    pulse.finish()
    assert folder.state.trials == 7


def test_a_disk_that_fills_up_in_the_middle_of_a_line_loses_only_that_line(folder):
    """A file size limit makes the kernel write half a line, as a full disk does."""
    code = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_records import trial
from tvmlab.core import MissingTool
from tvmlab.records import RunFolder, TrialWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
writer = TrialWriter(RunFolder.open({str(folder.path)!r}))
try:
    for number in range(1, 100):
        writer.append(trial(number))
except MissingTool as error:
    print(number, error.remedy)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    last, remedy = done.stdout.split(" ", 1)
    assert "free space" in remedy
    assert (folder.path / "trials.jsonl").stat().st_size == 1000
    assert [found.trial for found in folder.trials()] == list(range(1, int(last)))
    writer = TrialWriter(folder)
    writer.append(trial(int(last)))
    writer.close()
    assert list(folder.trials())[-1].trial == int(last)


def test_replacing_a_file_shows_the_old_or_the_new_one(folder):
    """A reader that looks all the time never sees half a state."""
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(lambda: [folder.write_state(State(trials=n, message="x" * n)) for n in range(500)])
        seen = []
        while not writing.done():
            state = folder.read_json("state.json")
            assert len(state["message"]) == state["trials"]
            seen.append(state["trials"])
    assert seen == sorted(seen)
    assert not [path for path in folder.path.iterdir() if path.name.startswith(".")]


def test_log_tail(folder):
    assert folder.log_tail() == ""
    (folder.path / "log.txt").write_bytes(b"one\ntwo\n\xffthree\n")
    assert folder.log_tail(2).splitlines()[0] == "two"


def _disk_full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_search_beside_another_is_warned_of(folder, holder, monkeypatch):
    running = sys.modules["tvmlab.run"]
    monkeypatch.setattr(running, "_check", lambda experiment, runs_dir: None)
    monkeypatch.setattr(running, "_launch", lambda made: shutil.rmtree(made.path))
    folder.write_state(State(status="running", pid=holder.pid))
    with pytest.warns(RuntimeWarning, match=f"run {folder.id} is under way too"):
        running.tune(folder.experiment, folder.path.parent)
    holder.kill()
    holder.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        running.tune(folder.experiment, folder.path.parent)
