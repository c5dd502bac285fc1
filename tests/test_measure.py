"""Measuring with real workers: whatever a kernel does, it gets its named status and the next one is measured."""

import os
import signal
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import tvm

from tvmlab.compat import idle_passes, structural_key
from tvmlab.core import Candidate, Measurement, TaskInfo, TrialStatus
from tvmlab.experiment import Measure
from tvmlab.measure import builder, local
from tvmlab.measure.builder import Build, BuilderPool
from tvmlab.measure.check import difference, make_input
from tvmlab.measure.local import LocalMeasurer
from tvmlab.measure.process import WorkerTimeout
from tvmlab.tasks import Task

KERNEL = """
# from tvm.script import ir as I
# from tvm.script import tirx as T

@I.ir_module
class Module:
    @T.prim_func(s_tir=True)
    def main(a: T.Buffer((64, 64), "float32"), b: T.Buffer((64,), "float32"), c: T.Buffer((64, 64), "float32")):
{body}
"""
LOOP = """
        for i, j in T.grid({rows}, 64):
            with T.sblock("c"):
                v_i, v_j = T.axis.remap("SS", [i, j])
                {statement}
"""
# The task: c = 2 a + b. What follows are candidates of it that do something else.
RIGHT = LOOP.format(rows=64, statement="c[v_i, v_j] = a[v_i, v_j] * T.float32(2) + b[v_j]")
FASTER = LOOP.format(rows=64, statement="c[v_i, v_j] = b[v_j] + a[v_i, v_j] * T.float32(2)")
OTHER_CONSTANT = LOOP.format(rows=64, statement="c[v_i, v_j] = a[v_i, v_j] * T.float32(2.01) + b[v_j]")
OTHER_OPERATOR = LOOP.format(rows=64, statement="c[v_i, v_j] = a[v_i, v_j] * T.float32(2) - b[v_j]")
LAST_ROW_UNWRITTEN = LOOP.format(rows=63, statement="c[v_i, v_j] = a[v_i, v_j] * T.float32(2) + b[v_j]")
WRITES_NOTHING = LOOP.format(rows=0, statement="c[v_i, v_j] = T.float32(0)")
SPOILS_ITS_INPUT = LOOP.format(rows=64, statement="a[v_i, v_j] = T.float32(7)")
SPINS = """
        while c[0, 0] == c[0, 0] or c[0, 0] != c[0, 0]:
            c[0, 1] = c[0, 1] + T.float32(1)
"""
CRASHES = """
        for i in range(64):
            c[T.Cast("int64", i) * T.int64(1099511627776), T.int64(0)] = T.float32(1)
"""
RAISES = """
        assert T.bool(False), "no good"
        c[0, 0] = T.float32(1)
"""


def module(body):
    return tvm.script.from_source(KERNEL.format(body=body))


def task_of(body=RIGHT, name="affine"):
    made = module(body)
    return Task(TaskInfo(structural_key(made), name, name, 1, 2 * 64 * 64, 4.0 * 64 * 129, True), made)


TASK = task_of()


def candidate(body, task=TASK):
    made = module(body)
    return Candidate(task.key, structural_key(made), 0, (), SimpleNamespace(mod=made))


@pytest.fixture(scope="module")
def measurer(cpu, tmp_path_factory):
    """One measurer for the file: that it survives every test is what is tested."""
    folder = tmp_path_factory.mktemp("measure")
    options = Measure(repeats=2, min_repeat_ms=0.2, run_timeout_s=2.0, build_workers=2)
    with LocalMeasurer([TASK], cpu, options, folder) as made:
        (default,) = made.measure_defaults([TASK.key])
        assert default.status is TrialStatus.OK, default.message
        yield made


def measure(measurer, *bodies):
    return list(measurer.measure([candidate(body) for body in bodies]))


def assert_still_works(measurer):
    (found,) = measure(measurer, RIGHT)
    assert found.status is TrialStatus.OK, found.message


def test_a_right_kernel_is_ok_and_all_repeats_are_kept(measurer):
    build_wait_s, run_s = measurer.build_wait_s, measurer.run_s
    for found in measure(measurer, RIGHT, FASTER):
        assert found.status is TrialStatus.OK and found.message == ""
        assert len(found.latencies_s) == 2
        assert all(1e-8 < latency < 1e-2 for latency in found.latencies_s)
        assert 0 < found.build_s < 30 and 0 < found.run_s < 2
    assert measurer.run_s > run_s and measurer.build_wait_s > build_wait_s


@pytest.mark.parametrize("body", [OTHER_CONSTANT, OTHER_OPERATOR], ids=["constant", "operator"])
def test_another_computation_is_a_wrong_result(measurer, body):
    (found,) = measure(measurer, body)
    assert found.status is TrialStatus.WRONG_RESULT and found.latencies_s == ()
    assert "max error" in found.message
    assert_still_works(measurer)


@pytest.mark.parametrize("body", [LAST_ROW_UNWRITTEN, WRITES_NOTHING], ids=["last row", "nothing"])
def test_an_element_never_written_is_a_wrong_result(measurer, body):
    assert_still_works(measurer)  # the right result lies in the output buffer
    (found,) = measure(measurer, body)
    assert found.status is TrialStatus.WRONG_RESULT
    assert "never written" in found.message
    assert_still_works(measurer)


def test_a_kernel_that_spoils_its_input_spoils_only_its_own_trial(measurer):
    (found,) = measure(measurer, SPOILS_ITS_INPUT)
    assert found.status is TrialStatus.WRONG_RESULT
    assert_still_works(measurer)


def test_a_crash_is_named_and_the_next_candidate_measured(measurer):
    first, second = measure(measurer, CRASHES, RIGHT)
    assert first.status is TrialStatus.CRASHED
    assert "SIGSEGV" in first.message
    assert second.status is TrialStatus.OK
    assert len(second.latencies_s) == 2


@pytest.mark.parametrize(("repeats", "min_repeat_ms"), [(2, 0.2), (50, 500.0), (5, 100.0)])
def test_what_the_timing_takes_by_plan_is_no_timeout(measurer, monkeypatch, repeats, min_repeat_ms):
    asked = []
    options = measurer._options.model_copy(update={"repeats": repeats, "min_repeat_ms": min_repeat_ms})
    monkeypatch.setattr(measurer, "_options", options)

    def request(message, timeout_s):
        asked.append((message[0], timeout_s))
        return message[0] == "has" or Measurement(TrialStatus.OK, (1e-3,))

    monkeypatch.setattr(measurer._device, "request", request)
    beside = Candidate(TASK.key, "1" * 16, 0, (), candidate(FASTER).payload, rival=candidate(RIGHT))
    list(measurer.measure([candidate(RIGHT), beside]))
    list(measurer.measure_defaults([TASK.key]))
    (alone, turns), (default,) = ([s for kind, s in asked if kind == what] for what in ("measure", "default"))
    assert alone >= repeats * min_repeat_ms / 1e3 + options.run_timeout_s
    assert turns >= min(4.0, 3 * 2 * repeats * min_repeat_ms / 1e3) + options.run_timeout_s  # a leader's turns
    assert default >= repeats * min_repeat_ms / 1e3 + 15 * options.run_timeout_s


@pytest.mark.slow
def test_a_kernel_that_never_ends_times_out(measurer):
    started = time.monotonic()
    first, second = measure(measurer, SPINS, RIGHT)
    assert first.status is TrialStatus.RUN_TIMEOUT
    assert 2.0 <= first.run_s < 10
    assert second.status is TrialStatus.OK
    assert time.monotonic() - started < 40


def test_an_error_that_a_kernel_raises(measurer):
    first, second = measure(measurer, RAISES, RIGHT)
    assert first.status is TrialStatus.RUN_ERROR
    assert "no good" in first.message
    assert second.status is TrialStatus.OK


def test_a_kernel_with_other_arguments_is_a_run_error(measurer):
    fewer = module(RIGHT).script().replace('b: T.Buffer((64,), "float32"), ', "").replace("b[v_j]", "a[v_i, v_j]")
    made = tvm.script.from_source(fewer)
    wrong = Candidate(TASK.key, structural_key(made), 0, (), SimpleNamespace(mod=made))
    (found,) = measurer.measure([wrong])
    assert found.status is TrialStatus.RUN_ERROR and found.message
    assert_still_works(measurer)


def test_what_cannot_be_compiled_is_a_build_error(measurer, monkeypatch):
    real = local._to_json
    monkeypatch.setattr(local, "_to_json", lambda made: "{garbage" if made is bad.payload.mod else real(made))
    bad, good = candidate(RIGHT), candidate(FASTER)
    first, second = measurer.measure([bad, good])
    assert first.status is TrialStatus.BUILD_ERROR and first.latencies_s == ()
    assert first.message and "\n" not in first.message
    assert second.status is TrialStatus.OK


def test_a_build_that_takes_too_long(measurer, monkeypatch):
    monkeypatch.setattr(measurer._builders, "_timeout_s", 0.001)
    (found,) = measure(measurer, RIGHT)
    assert found.status is TrialStatus.BUILD_TIMEOUT and found.latencies_s == ()
    monkeypatch.undo()
    assert_still_works(measurer)


@pytest.mark.slow
def test_a_killed_build_worker_costs_one_trial_at_most(measurer):
    assert_still_works(measurer)
    for pid in measurer._builders.pids:
        os.kill(pid, signal.SIGKILL)
    found = measure(measurer, RIGHT, FASTER, RIGHT)
    assert found[-1].status is TrialStatus.OK
    assert_still_works(measurer)


@pytest.mark.slow
def test_a_killed_device_worker_costs_one_trial_at_most(measurer):
    assert_still_works(measurer)
    os.kill(measurer._device.pid, signal.SIGKILL)
    found = measure(measurer, RIGHT, FASTER)
    assert found[0].status in (TrialStatus.OK, TrialStatus.CRASHED)
    assert found[1].status is TrialStatus.OK


def test_workers_live_from_batch_to_batch(measurer):
    assert_still_works(measurer)
    before = measurer.pids
    assert len(before) == 3
    measure(measurer, RIGHT, FASTER)
    measure(measurer, FASTER)
    assert measurer.pids == before


def test_without_the_check_a_wrong_kernel_is_timed(measurer, monkeypatch):
    monkeypatch.setattr(measurer, "_options", measurer._options.model_copy(update={"check": False}))
    (found,) = measure(measurer, OTHER_CONSTANT)
    assert found.status is TrialStatus.OK
    monkeypatch.undo()
    (found,) = measure(measurer, OTHER_CONSTANT)
    assert found.status is TrialStatus.WRONG_RESULT


def test_cold_weights_are_evicted_before_each_call_that_is_timed(measurer, monkeypatch):
    (warm,) = measure(measurer, RIGHT)
    monkeypatch.setattr(measurer, "_cold_cache_bytes", 1 << 20)
    monkeypatch.setattr(measurer, "_best_s", {})  # that of warm calls
    (cold,) = measure(measurer, RIGHT)
    assert cold.status is TrialStatus.OK
    assert len(cold.latencies_s) == 4 * len(warm.latencies_s)  # calls are no longer looped: so many more are timed
    assert min(cold.latencies_s) > min(warm.latencies_s)


def test_measuring_that_is_broken_off_leaves_the_rest_unmeasured(measurer):
    measuring = measurer.measure([candidate(RIGHT), candidate(FASTER), candidate(RIGHT)])
    assert next(measuring).status is TrialStatus.OK
    measuring.close()
    assert_still_works(measurer)


def test_compiled_files_are_deleted(measurer):
    """Those that were measured, and those that a caller who breaks off leaves unmeasured."""
    folder = Path(measurer._scratch.name)
    before = set(folder.rglob("*.so"))
    measure(measurer, RIGHT, OTHER_CONSTANT, RAISES)
    measuring = measurer.measure([candidate(RIGHT), candidate(FASTER), candidate(RIGHT)])
    assert next(measuring).status is TrialStatus.OK
    measuring.close()
    assert set(folder.rglob("*.so")) == before


def test_closing_leaves_no_process_and_no_files(cpu, tmp_path):
    log = tmp_path / "log.txt"
    with LocalMeasurer([TASK], cpu, Measure(build_workers=1), tmp_path) as made:
        (found,) = made.measure_defaults([TASK.key])
        assert found.status is TrialStatus.OK
        pids = made.pids
        assert len(pids) == 2
        assert list(tmp_path.glob("scratch-*"))
    assert not any(map(psutil.pid_exists, pids))
    assert list(tmp_path.iterdir()) == [log]


@pytest.mark.slow
def test_an_unscheduled_kernel_that_does_not_run_fails_its_candidates(cpu, tmp_path):
    broken = task_of(RAISES, "broken")
    options = Measure(build_workers=1, run_timeout_s=2.0)
    with LocalMeasurer([broken, TASK], cpu, options, tmp_path) as made:
        first, second = made.measure_defaults([broken.key, TASK.key])
        assert (first.status, second.status) == (TrialStatus.RUN_ERROR, TrialStatus.OK)
        first, second = made.measure([candidate(RIGHT, broken), candidate(RIGHT)])
        assert first.status is TrialStatus.RUN_ERROR
        assert second.status is TrialStatus.OK


def default_interrupted(made, key, interrupt):
    """Measure a default kernel, while the only build worker is held up and then `interrupt`ed."""
    (worker,) = made._builders._workers
    before = made._builders._jobs[worker]
    worker.pause()
    measuring = made.measure_defaults([key])
    while made._builders._jobs[worker] == before:
        time.sleep(0.01)
    time.sleep(0.1)  # until the request is sent
    interrupt(worker)
    (found,) = measuring
    return found


def test_a_default_kernel_whose_build_was_interrupted_is_built_once_more(cpu, tmp_path, monkeypatch):
    killed, late = task_of(FASTER, "killed"), task_of(LOOP.format(rows=64, statement="c[v_i, v_j] = b[v_j]"), "late")
    with LocalMeasurer([TASK, killed, late], cpu, Measure(build_workers=1), tmp_path) as made:
        list(made.measure_defaults([TASK.key]))
        found = default_interrupted(made, killed.key, lambda worker: os.kill(worker.pid, signal.SIGKILL))
        assert found.status is TrialStatus.OK, found.message
        (found,) = made.measure([candidate(RIGHT, killed)])
        assert found.status is TrialStatus.OK, found.message
        with monkeypatch.context() as patched:
            patched.setattr(made._builders, "_timeout_s", 0.2)
            found = default_interrupted(made, late.key, lambda worker: patched.undo())
        assert found.status is TrialStatus.OK, found.message


def test_a_default_kernel_that_cannot_be_built_is_built_twice_at_most(cpu, tmp_path, monkeypatch):
    with LocalMeasurer([TASK], cpu, Measure(build_workers=1), tmp_path) as made:
        asked = []

        def submit(text):
            asked.append(text)
            done = Future()
            done.set_result(Build(TrialStatus.BUILD_TIMEOUT, message="no answer", is_transient=True))
            return done

        monkeypatch.setattr(made._builders, "submit", submit)
        (found,) = made.measure_defaults([TASK.key])
        assert found.status is TrialStatus.BUILD_TIMEOUT and len(asked) == 2
        list(made.measure_defaults([TASK.key]))
        assert len(asked) == 2


def test_a_default_kernel_that_does_not_run_is_run_twice_at_most(cpu, tmp_path, monkeypatch):
    """It is given a long time: a hang of every candidate's reference would take the whole run."""
    with LocalMeasurer([TASK], cpu, Measure(build_workers=1), tmp_path) as made:
        asked, request = [], made._device.request

        def fails(message, timeout_s):
            if message[0] != "default":
                return request(message, timeout_s)
            asked.append(message[1])
            made._device.kill()
            raise WorkerTimeout("no answer after 300 s")

        monkeypatch.setattr(made._device, "request", fails)
        (found,) = made.measure_defaults([TASK.key])
        assert found.status is TrialStatus.RUN_TIMEOUT
        found = measure(made, RIGHT, FASTER, RIGHT)
        assert [m.status for m in found] == [TrialStatus.RUN_TIMEOUT] * 3 and len(asked) == 2


def test_a_default_kernel_that_failed_is_not_run_again_by_the_same_process(cpu, tmp_path):
    broken = task_of(RAISES, "broken")
    with LocalMeasurer([broken], cpu, Measure(build_workers=1), tmp_path) as made:
        asked, request = [], made._device.request
        made._device.request = lambda message, timeout_s: asked.append(message[0]) or request(message, timeout_s)
        list(made.measure_defaults([broken.key]))
        found = list(made.measure([candidate(RIGHT, broken), candidate(FASTER, broken)]))
        assert {m.status for m in found} == {TrialStatus.RUN_ERROR} and asked.count("default") == 1
        made._device.kill()
        list(made.measure([candidate(RIGHT, broken), candidate(FASTER, broken)]))
        assert asked.count("default") == 2


def test_a_builder_pool_answers_in_the_future(cpu, tmp_path):
    pool = BuilderPool(cpu.attrs, 1, 30.0, tmp_path, tmp_path / "log.txt")
    try:
        good, bad = pool.submit(tvm.ir.save_json(module(RIGHT))), pool.submit("")
        assert good.result().status is TrialStatus.OK
        assert Path(good.result().path).is_file()
        assert bad.result().status is TrialStatus.BUILD_ERROR and bad.result().path == ""
    finally:
        pool.close()
    builder.remove_build(good.result().path)
    assert not list(tmp_path.rglob("*.so"))


def test_the_passes_that_are_left_out_change_no_code(cpu, tmp_path):
    sections = []
    for disabled in ([], idle_passes(cpu.kind)):
        with cpu.to_tvm(), tvm.transform.PassContext(disabled_pass=disabled):
            built = tvm.driver.build(module(RIGHT), target=cpu.to_tvm())
        built.write_to_file(str(tmp_path / "kernel.s"))
        sections.append((tmp_path / "kernel.s").read_text())
    assert sections[0] == sections[1]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int32", "int8", "bool"])
def test_inputs_are_seeded_and_of_their_kind(dtype):
    first, second = (make_input("a" * 16, 0, (5, 7), dtype) for _ in range(2))
    assert first.dtype.name == dtype and first.shape == (5, 7)
    assert np.array_equal(first, second)
    assert not np.array_equal(first, make_input("b" * 16, 0, (5, 7), dtype))
    assert not np.array_equal(first, make_input("a" * 16, 1, (5, 7), dtype))


@pytest.mark.parametrize(
    ("result", "reference", "problem"),
    [
        ([1, 2], [1, 2], ""),
        ([1, 2.0001], [1, 2], ""),
        ([1, 2.01], [1, 2], "max error"),
        ([1, float("nan")], [1, 2], "NaN"),
        ([1, float("nan")], [1, float("nan")], ""),
        ([1, 2], [1, float("nan")], "NaN"),
        ([1, float("inf")], [1, 2], "max error"),
        ([1, 2], [1, float("inf")], "infinite"),
        ([1, float("inf")], [1, float("inf")], ""),
        ([1, float("-inf")], [1, float("inf")], "infinite"),
        ([0, 0], [0, 0], ""),
        ([0, 1e-3], [0, 0], "max error"),
    ],
)
def test_differences(result, reference, problem):
    found = difference(np.array(result, "float32"), np.array(reference, "float32"))
    assert (problem in found) if problem else found == ""


def test_integer_results_must_be_equal():
    assert difference(np.array([1, 2]), np.array([1, 2])) == ""
    assert difference(np.array([1, 2]), np.array([1, 3])) == "integer results differ"
