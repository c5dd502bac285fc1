"""The roofline: its cache with a fake measurement, and the real measurement against numpy."""

import multiprocessing
import time

import orjson
import pytest

from tvmlab.core import MissingTool, Roofline
from tvmlab.roofline import cached_roofline, measure
from tvmlab.targets import target

REQUEST = {"device": "cpu"}


class Counted:
    """A measurement that counts its calls."""

    def __init__(self, *answers):
        self.answers, self.calls = list(answers), 0

    def __call__(self, request, env):
        self.calls += 1
        return self.answers[self.calls - 1]


def test_measured_once(tmp_path):
    run = Counted(Roofline(100.0, 10.0), Roofline(200.0, 20.0), Roofline(300.0, 30.0), Roofline(150.0, 40.0))
    for _ in range(2):
        assert cached_roofline(REQUEST, {"cpu": "a"}, tmp_path, {}, run=run) == Roofline(100.0, 10.0)
    assert cached_roofline(REQUEST, {"cpu": "b"}, tmp_path, {}, run=run) == Roofline(200.0, 20.0)
    assert cached_roofline(REQUEST, {"cpu": "a"}, tmp_path, {}, run=run, refresh=True) == Roofline(300.0, 30.0)
    assert cached_roofline(REQUEST, {"cpu": "a"}, tmp_path, {}, run=run) == Roofline(300.0, 30.0)
    assert run.calls == 3
    # A busy machine measures low: what was reached once is not taken back.
    assert cached_roofline(REQUEST, {"cpu": "a"}, tmp_path, {}, run=run, refresh=True) == Roofline(300.0, 40.0)


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b'{"peak_gflops": 1}', b'{"peak_gflops": -1, "bandwidth_gbs": 2}', b"\xff\x00"],
)
def test_a_damaged_cache_is_measured_again(tmp_path, damage):
    run = Counted(Roofline(100.0, 10.0), Roofline(200.0, 20.0))
    cached_roofline(REQUEST, {}, tmp_path, {}, run=run)
    (stored,) = tmp_path.glob("roofline-*.json")
    stored.write_bytes(damage)
    assert cached_roofline(REQUEST, {}, tmp_path, {}, run=run) == Roofline(200.0, 20.0)
    assert orjson.loads(stored.read_bytes())["peak_gflops"] == 200.0


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    run = Counted(Roofline(100.0, 10.0), Roofline(200.0, 20.0))
    for expected in (100.0, 200.0):
        assert cached_roofline(REQUEST, {}, tmp_path / "file" / "cache", {}, run=run).peak_gflops == expected


def _slow(request, env):
    with open(request["log"], "a") as log:  # noqa: PTH123
        log.write("measured\n")
    time.sleep(0.3)
    return Roofline(100.0, 10.0)


def _ask(folder, log):
    assert cached_roofline({**REQUEST, "log": log}, {}, folder, {}, run=_slow).peak_gflops == 100.0


def test_two_processes_measure_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    arguments = (tmp_path, str(tmp_path / "log"))
    workers = [context.Process(target=_ask, args=arguments) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert (tmp_path / "log").read_text() == "measured\n"


def test_a_failed_measurement_says_why():
    with pytest.raises(MissingTool, match="roofline of cpu could not be measured") as caught:
        measure({"device": "cpu", "attrs": {"kind": "nonsense"}}, {})
    assert "nonsense" in str(caught.value)


def test_the_real_roofline_is_of_this_machine_and_kept(tmp_path):
    """How near numpy comes to it is benchmarks/roofline.py's question: a busy machine measures low."""
    cpu = target("cpu", cache_dir=tmp_path)
    measured = cpu.roofline
    assert measured is not None
    # No core does more than four 512-bit FMAs a cycle, at 6 GHz: else the compiler dropped work. And one that shares
    # its time with seven others does one scalar FMA a cycle at 1 GHz: else the chains wait for each other.
    assert 2 / 8 < measured.peak_gflops / cpu.attrs["num-cores"] < 4 * 2 * (cpu.vector_bits // 32) * 6
    assert 0.1 < measured.bandwidth_gbs < 10_000
    assert target("cpu", cache_dir=tmp_path).roofline == measured


@pytest.mark.slow
def test_cuda_kernels_become_cuda_source():
    import tvm

    from tvmlab.roofline import _cuda_copy, _cuda_fma

    card = target("sm_90a").to_tvm()
    source = tvm.compile(_cuda_fma(8, 256, 8, 1 << 14), target=card).mod.imports[0].inspect_source()
    assert "blockIdx.x" in source and "acc_ptr[7] * acc_ptr[8]" in source
    source = tvm.compile(_cuda_copy(8, 256), target=card).mod.imports[0].inspect_source()
    assert "float4" in source


@pytest.mark.gpu
def test_roofline_of_a_gpu(tmp_path):
    measured = target("cuda", cache_dir=tmp_path).roofline
    assert measured is not None and measured.peak_gflops > 1000 and measured.bandwidth_gbs > 50
