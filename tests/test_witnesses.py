"""A candidate is timed beside its rival in several processes: who takes which turns, and what if one of them fails."""

import os
import signal
import time

import psutil
import pytest
from test_measure import FASTER, RIGHT, TASK, candidate
from test_rivals import SLOWER, against

from tvmlab.core import Measurement, TrialStatus
from tvmlab.experiment import Measure
from tvmlab.measure.local import LocalMeasurer
from tvmlab.measure.process import WorkerDied
from tvmlab.measure.witnesses import Case, Witnesses

TIMING = {"repeats": 5, "min_repeat_ms": 4.0, "slow_factor": 4.0, "cold_cache_bytes": 0, "processes": 4}
CASE = Case("task", [([4], "float32")], "ours.so", "theirs.so", TIMING, 20.0)


class Process:
    """Answers as a device does: in it, the candidate takes this many times as long as its rival. 0: it dies."""

    def __init__(self, name, ratio, log):
        self.name, self.ratio, self.log = name, ratio, log
        self.generation, self.pid, self.is_frozen = 0, None, False

    def start(self):
        self.generation, self.pid = 1, id(self)

    def pause(self):
        self.is_frozen = True

    def proceed(self):
        self.is_frozen = False

    def kill(self):
        self.pid = None

    def request(self, message, timeout_s):
        if message[0] == "ping":
            return "ok"
        turns, is_witness = message[5], message[7]
        assert not self.is_frozen and is_witness == (self.name != "device")
        if not self.ratio:
            raise WorkerDied("killed")
        self.log.append((self.name, list(turns)))
        ours, theirs = (self.ratio * 1e-3,) * len(turns), (1e-3,) * len(turns)
        return Measurement(TrialStatus.OK, ours, rival_latencies_s=theirs)


def hear(ratios, seconds=1e-3, case=CASE, first=2):
    """What comes of the ratios of the device's process and the witnesses', and who took which turns."""
    log = []
    device, *others = [Process(name or "device", ratio, log) for name, ratio in enumerate(ratios)]
    waiting = iter(others)
    witnesses = Witnesses(len(others), lambda: next(waiting))
    ours, theirs = (seconds * ratios[0],) * first, (seconds,) * first
    heard = witnesses.hear(device, case, Measurement(TrialStatus.OK, ours, rival_latencies_s=theirs))
    assert not device.is_frozen and all(each.is_frozen for each in others if each.pid)
    witnesses.close()
    assert witnesses.pids == []
    return [a / b for a, b in zip(heard.latencies_s, heard.rival_latencies_s, strict=True)], log


def test_a_candidate_that_does_not_lead_has_as_many_turns_as_repeats():
    ratios, log = hear([1.1, 1.0, 0.9, 1.1])
    assert log == [(1, [1]), (2, [2]), (3, [3])]
    assert sorted(round(ratio, 6) for ratio in ratios) == [0.9, 1.0, 1.1, 1.1, 1.1]


def test_one_that_leads_over_all_has_three_times_as_many_evenly():
    ratios, log = hear([1.1, 0.9, 0.9, 0.9])
    assert len(ratios) == 15 and sorted(round(ratio, 6) for ratio in ratios)[11:] == [1.1] * 4
    assert log[3:] == [("device", [2, 3]), (1, [2, 3, 4]), (2, [3, 4, 5]), (3, [4, 5])]


def test_one_that_leads_here_alone_or_by_next_to_nothing_does_not_lead():
    assert len(hear([0.8, 1.1, 1.1, 1.1])[0]) == 5
    assert len(hear([0.995, 0.995, 0.995, 0.995])[0]) == 5


def test_one_far_behind_is_not_heard_elsewhere():
    assert hear([1.4, 0.5, 0.5, 0.5]) == ([1.4, 1.4], [])


def test_a_process_that_dies_adds_nothing():
    ratios, log = hear([0.9, 0, 0.9, 0.9])
    assert {name for name, _ in log} == {"device", 2, 3} and len(ratios) == 11


def test_turns_of_slow_kernels_end_in_time():
    ratios, log = hear([1.0, 1.0, 1.0, 1.0], seconds=0.6, first=1)
    assert len(ratios) == 3 and log == [(1, [1]), (2, [2])]  # 3.6 s


@pytest.fixture(scope="module")
def measurer(cpu, tmp_path_factory):
    options = Measure(repeats=2, min_repeat_ms=0.2, build_workers=2, processes=2)
    with LocalMeasurer([TASK], cpu, options, tmp_path_factory.mktemp("witnesses")) as made:
        list(made.measure_defaults([TASK.key]))
        yield made


def test_real_processes_share_the_turns(measurer):
    alone = set(measurer.pids)
    (found,) = measurer.measure(against(SLOWER, RIGHT))
    assert found.status is TrialStatus.OK and found.message == ""
    assert len(found.latencies_s) == len(found.rival_latencies_s) == 6
    (witness,) = set(measurer.pids) - alone
    deadline = time.monotonic() + 20  # the signal is sent, not waited for
    while psutil.Process(witness).status() != psutil.STATUS_STOPPED and time.monotonic() < deadline:
        time.sleep(0.02)
    assert psutil.Process(witness).status() == psutil.STATUS_STOPPED


def test_a_witness_that_was_killed_is_started_again(measurer):
    list(measurer.measure(against(SLOWER, RIGHT)))
    (worker,) = measurer._witnesses._workers
    os.kill(worker.pid, signal.SIGKILL)
    found = list(measurer.measure(against(SLOWER, RIGHT, FASTER)))
    assert [len(each.latencies_s) for each in found] == [6, 6]
    assert worker.generation == 2


@pytest.mark.parametrize(("kind", "cold", "processes"), [("cuda", False, 4), ("llvm", True, 4), ("llvm", False, 1)])
def test_where_one_process_is_enough(kind, cold, processes, cpu, tmp_path, monkeypatch):
    """A GPU's kernels do not share its addresses, and cold weights have copies of their own."""
    monkeypatch.setattr("tvmlab.measure.local.WorkerProcess.start", lambda self: None)
    fake = type("Fake", (), {"kind": kind, "device": "cpu", "attrs": cpu.attrs, "details": {}, "worker_env": dict})()
    with LocalMeasurer([TASK], fake, Measure(cold_weights=cold, processes=processes), tmp_path) as measurer:
        assert len(measurer._witnesses) == 0 and measurer._timing(TASK.key)["processes"] == 1


def test_a_candidate_without_a_rival_is_not_heard(measurer, monkeypatch):
    monkeypatch.setattr(Witnesses, "hear", None)
    (found,) = measurer.measure([candidate(RIGHT)])
    assert found.status is TrialStatus.OK and len(found.latencies_s) == 2
