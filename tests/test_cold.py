"""Cold arguments: how many copies take turns, what they share; and how many repeats a kernel is given."""

from types import SimpleNamespace

import numpy as np
import pytest
import tvm
from test_rivals import Kernel

from tvmlab.measure.cold import ColdArguments
from tvmlab.measure.device import Device, _Task

WEIGHTS = 1 << 20  # bytes


def arguments(weight_bytes=WEIGHTS):
    """A data tensor, weights, a bias, and an output: as tensors, and their values."""
    sizes = (16, weight_bytes // 4 - 8, 8, 4)
    host = [np.full(size, number, "float32") for number, size in enumerate(sizes)]
    return [tvm.runtime.tensor(array) for array in host], host


@pytest.mark.parametrize(("cache_bytes", "copies"), [(8 * WEIGHTS, 10), (WEIGHTS // 2, 1), (WEIGHTS, 2)])
def test_the_copies_fill_the_caches_and_a_quarter_more(cache_bytes, copies):
    tensors, host = arguments()
    cold = ColdArguments(tensors, host, outputs=[3])
    assert cold.weight_bytes == WEIGHTS
    assert cold.copy(cache_bytes, tvm.cpu()) == (copies - 1) * WEIGHTS
    assert cold.copy(cache_bytes, tvm.cpu()) == 0  # they are there
    turns = [cold.turn() for _ in range(copies)]
    assert turns[0] == tensors and cold.turn() is turns[0]
    for each in turns:
        assert each[0] is tensors[0] and each[3] is tensors[3]
        assert all(np.array_equal(tensor.numpy(), array) for tensor, array in zip(each, host, strict=True))
    assert len({id(each[1]) for each in turns}) == copies


def test_a_kernel_of_one_argument_has_no_weights():
    tensors, host = arguments()
    cold = ColdArguments(tensors[::3], host[::3], outputs=[1])
    assert cold.weight_bytes == 0 and cold.copy(8 * WEIGHTS, tvm.cpu()) == 0
    assert cold.turn() == tensors[::3]


def test_large_weights_take_turns_and_small_ones_are_flushed():
    device, seen, flushed = Device("cpu"), [], []

    class Loaded:
        def __getitem__(self, name):
            return lambda *tensors: seen.append(tensors[1])

        def time_evaluator(self, function, device, number, repeat, f_preproc):
            flushed.append((number, f_preproc))
            return lambda *tensors: SimpleNamespace(results=[1e-3] * repeat)

    for size, number in ((WEIGHTS, 4), (1024, 4)):
        tensors, host = arguments(size)
        task = SimpleNamespace(tensors=tensors, bytes=0, cold=ColdArguments(tensors, host, outputs=[3]))
        found = device._samples(Loaded(), task, number, 3, {"cold_cache_bytes": 2 * WEIGHTS})
        assert len(found) == 3
    assert len({id(tensor) for tensor in seen}) == len(seen) == 3
    assert flushed == [(1, "cache_flush_cpu_non_first_arg")]


def test_the_task_s_weights_are_what_is_neither_first_nor_written():
    task = _Task("a" * 16, [((4, 4), "float32"), ((4, 8), "float32"), ((4, 8), "float32")], tvm.cpu())
    task.tensors[2].copyfrom(np.ones((4, 8), "float32"))
    task.find_outputs()
    assert task.cold.weight_bytes == 4 * 8 * 4


@pytest.mark.parametrize(
    ("best_s", "cold", "repeats"), [(None, 0, 8), (1.9e-3, 0, 8), (1.5e-3, 0, 2), (None, 1, 16), (1.5e-3, 1, 4)]
)
def test_a_kernel_that_is_behind_gets_a_quarter_of_the_repeats(best_s, cold, repeats):
    options = {"repeats": 8, "min_repeat_ms": 4.0, "slow_factor": 4.0, "best_s": best_s, "cold_cache_bytes": cold}
    patient = {**options, "slow_factor": 1e6}
    task = SimpleNamespace(tensors=(), cold=SimpleNamespace(weight_bytes=0))
    kernel = Kernel("a", 2e-3, [])
    assert Device("cpu")._time(kernel, task, 2e-3, options) == [2e-3] * repeats
    assert Device("cpu")._time(kernel, task, 2e-3, patient) == [2e-3] * 8 * (2 if cold else 1)
