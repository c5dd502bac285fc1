"""What a device's process does on a GPU only, without one: the first launch does not count, an idle card is woken."""

from types import SimpleNamespace

import pytest

from tvmlab.core import TrialStatus
from tvmlab.measure import device
from tvmlab.measure.device import Device

OPTIONS = {
    "check": False,
    "best_s": None,
    "slow_factor": 4.0,
    "min_repeat_ms": 1.0,
    "repeats": 3,
    "cold_cache_bytes": 0,
}
ARGUMENTS = [((4,), "float32"), ((4,), "float32")]


@pytest.fixture
def scripted(monkeypatch):
    """A device of a kind whose kernels take the given seconds, the last for ever; and how often one was run alone."""
    now = [100.0]
    monkeypatch.setattr(device, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def make(kind, seconds):
        made = Device("cpu")
        made._kind = kind
        made.left, made.runs, made.now = list(seconds), [], now
        monkeypatch.setattr(made, "_load", lambda library: library)

        def run_once(kernel, tensors):
            took = made.left.pop(0) if len(made.left) > 1 else made.left[0]
            now[0] += took
            made.runs.append(took)
            return took

        monkeypatch.setattr(made, "_run_once", run_once)
        monkeypatch.setattr(made, "_timed", lambda kernel, tensors, number, repeat, before="": [made.left[0]] * repeat)
        return made

    return make


def default(made, key="key"):
    return made.answer(("default", key, ARGUMENTS, "library", OPTIONS))


def test_the_first_launch_of_a_process_is_not_the_latency_of_a_default_kernel(scripted):
    made = scripted("cuda", [0.8, 0.001])
    assert default(made).latencies_s == (0.001,) * 3
    slow = scripted("cuda", [0.8, 0.3])
    assert default(slow).latencies_s == (0.3,)
    on_cpu = scripted("cpu", [0.8, 0.001])
    assert default(on_cpu).latencies_s == (0.8,) and on_cpu.runs == [0.8]


def test_an_idle_gpu_is_woken_before_a_kernel_is_timed(scripted):
    made = scripted("cuda", [0.001])
    default(made)
    woken = len(made.runs)
    assert 0.05 <= sum(made.runs) < 0.06
    measured = made.answer(("measure", "key", "library", OPTIONS))
    assert measured.status is TrialStatus.OK and len(made.runs) == woken + 1  # it was not idle
    made.now[0] += 1.0
    made.answer(("has", "key"))  # no work of the GPU's
    made.answer(("measure", "key", "library", OPTIONS))
    assert 0.05 <= sum(made.runs[woken + 1 :]) < 0.06
    made.now[0] += 1.0
    made.left = [2.0]
    made.answer(("measure", "key", "library", OPTIONS))
    assert made.runs.count(2.0) == 1


def test_a_cpu_is_not(scripted):
    made = scripted("cpu", [0.001])
    default(made)
    made.now[0] += 10.0
    made.answer(("measure", "key", "library", OPTIONS))
    assert made.runs == [0.001] * 2
