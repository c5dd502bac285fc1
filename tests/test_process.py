"""Worker processes: one request at a time, killed on timeout, restarted, gone when their parent is."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tvmlab.measure.process import WorkerDied, WorkerProcess, WorkerTimeout

HERE = str(Path(__file__).parent)

PARENT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_process import make_worker
worker = make_worker(Path(sys.argv[2]))
worker.request(("echo", 1), 30)
print(worker.pid, worker.request(("child",), 30), flush=True)
if sys.argv[3] == "busy":
    worker._connection.send(("sleep", 600))
time.sleep(600)
"""


def make_worker(folder, **environment):
    return WorkerProcess("fake_worker", [], folder / "log.txt", {"PYTHONPATH": HERE, **environment})


@pytest.fixture
def worker(tmp_path):
    made = make_worker(tmp_path)
    yield made
    made.kill()


def gone(pid, within_s=10.0):
    """Whether a process ends within so many seconds (a zombie has ended)."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_one_process_answers_many_requests(worker):
    assert worker.pid is None
    assert worker.request(("echo", {"a": [1, None]}), 30) == {"a": [1, None]}
    first = worker.pid
    big = b"x" * 5_000_000  # more than a socket holds
    assert worker.request(("echo", big), 30) == big
    assert worker.pid == first and worker.generation == 1


def test_it_has_the_environment_it_was_given(tmp_path):
    worker = make_worker(tmp_path, TVM_NUM_THREADS="3")
    assert worker.request(("environment", "TVM_NUM_THREADS"), 30) == "3"
    worker.kill()


def test_what_it_prints_goes_to_the_log(worker, tmp_path, capfd):
    worker.request(("print",), 30)
    assert (tmp_path / "log.txt").read_text() == "printed by the worker\n"
    assert capfd.readouterr() == ("", "")


def test_a_timeout_kills_it_and_the_next_request_starts_another(worker):
    worker.request(("echo", 1), 30)
    first = worker.pid
    started = time.monotonic()
    with pytest.raises(WorkerTimeout, match=r"no answer after 0\.3 s"):
        worker.request(("sleep", 60), 0.3)
    assert time.monotonic() - started < 40
    assert gone(first)
    assert worker.pid is None
    assert worker.request(("echo", 2), 30) == 2
    assert worker.pid != first and worker.generation == 2


@pytest.mark.parametrize(
    ("message", "cause"), [(("exit", 3), "ended with exit code 3"), (("kill",), "killed by SIGKILL")]
)
def test_its_death_is_told_with_the_cause(worker, message, cause):
    with pytest.raises(WorkerDied, match=cause):
        worker.request(message, 30)
    assert worker.request(("echo", 2), 30) == 2


def test_death_between_requests_is_noticed(worker):
    worker.request(("echo", 1), 30)
    os.kill(worker.pid, signal.SIGKILL)
    time.sleep(0.1)
    assert worker.pid is None
    with pytest.raises(WorkerDied, match="killed by SIGKILL"):
        worker.request(("echo", 2), 30, anew=False)
    assert worker.pid is None and worker.generation == 1
    assert worker.request(("echo", 2), 30) == 2


def test_a_module_that_does_not_start(tmp_path):
    worker = WorkerProcess("no_such_module", [], tmp_path / "log.txt", {})
    with pytest.raises(WorkerDied, match="exit code 1"):
        worker.request(("echo", 1), 30)
    assert "No module named no_such_module" in (tmp_path / "log.txt").read_text()


def test_killing_ends_its_children_too(worker):
    child = worker.request(("child",), 30)
    pid = worker.pid
    worker.kill()
    assert gone(pid) and gone(child)
    worker.kill()  # twice is once


def test_an_interrupt_does_not_reach_it(worker):
    worker.request(("echo", 1), 30)
    os.kill(worker.pid, signal.SIGINT)
    assert worker.request(("echo", 2), 30) == 2
    assert os.getpgid(worker.pid) == worker.pid != os.getpgrp()


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_when_the_parent_is_killed_the_worker_and_its_children_end(tmp_path, state):
    command = [sys.executable, "-c", PARENT, HERE, str(tmp_path), state]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    worker, child = map(int, parent.stdout.readline().split())
    assert psutil.pid_exists(worker) and psutil.pid_exists(child)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert gone(worker) and gone(child)


def test_when_the_parent_ends_by_itself_the_worker_ends(tmp_path):
    code = PARENT.replace("time.sleep(600)\n", "")
    command = [sys.executable, "-c", code, HERE, str(tmp_path), "idle"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert all(gone(int(pid)) for pid in done.stdout.split())


SPINNING = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_measure import SPINS, TASK, candidate
from tvmlab.experiment import Measure
from tvmlab.measure.local import LocalMeasurer
from tvmlab.targets import target
folder = Path(sys.argv[2])
measurer = LocalMeasurer([TASK], target("cpu"), Measure(build_workers=1), folder)
list(measurer.measure_defaults([TASK.key]))
print(*measurer.pids, flush=True)
list(measurer.measure([candidate(SPINS)]))
"""


@pytest.mark.slow
def test_a_kernel_that_spins_does_not_outlive_a_killed_parent(tmp_path):
    """The worker watches its parent from a thread, which the kernel must not hold up."""
    parent = subprocess.Popen([sys.executable, "-c", SPINNING, HERE, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    pids = list(map(int, parent.stdout.readline().split()))
    assert len(pids) == 2
    device = psutil.Process(pids[1])
    before, deadline = device.cpu_times().user, time.monotonic() + 30
    while device.cpu_times().user < before + 0.7 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert parent.poll() is None
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert all(gone(pid) for pid in pids)


def test_a_frozen_comparison_does_not_outlive_a_killed_parent(tmp_path):
    """A stopped process reads no end of file, so the kernel has to end it with its parent."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from tvmlab.measure.process import WorkerProcess\n"
        "worker = WorkerProcess('tvmlab.measure.whole_model', [], Path(sys.argv[1]), {})\n"
        "print(worker.request(('nothing',), 60)[0], flush=True)\n"
        "worker.pause()\n"
        "print(worker.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, str(script), str(tmp_path / "log.txt")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "error\n"
        worker = psutil.Process(int(parent.stdout.readline()))
        # The signal is sent, not waited for: on a busy machine the worker stops a moment later.
        deadline = time.monotonic() + 20
        while worker.status() != psutil.STATUS_STOPPED and time.monotonic() < deadline:
            time.sleep(0.02)
        assert worker.status() == psutil.STATUS_STOPPED
        parent.kill()
    psutil.wait_procs([worker], timeout=10)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
