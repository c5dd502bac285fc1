"""Where the time goes: the instrument on a machine that takes known times, and a real run's profile."""

import json
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import tvmlab
from tvmlab import Experiment
from tvmlab.core import InputError, RecordError, RunError
from tvmlab.frames import tasks
from tvmlab.profile import OUTSIDE, causes, is_transform, profile_frame
from tvmlab.records import RunFolder


class FakeDevice:
    """A device that is not a CPU, so that nothing is flushed and no thread pool is set."""

    def sync(self):
        pass

    def dlpack_device_type(self):
        return 2


class FakeArgument:
    shape = (1, 8)


class FakeMachine:
    """Follows the virtual machine's protocol: asks the instrument before a call, and skips the call if told to."""

    def __init__(self, calls):
        self.calls = calls  # name -> seconds, in order
        self.made = []
        self.instrument = lambda *_: None

    def set_instrument(self, instrument):
        self.instrument = instrument

    def infer(self):
        for name, seconds in self.calls:

            def function(*_, name=name, seconds=seconds):
                self.made.append(name)
                time.sleep(seconds)

            if self.instrument(function, name, True, None, FakeArgument()) != 1:
                function()
                self.instrument(function, name, False, None, FakeArgument())


KERNELS = SimpleNamespace(keys={"conv": "a" * 16, "dense": "b" * 16}, classes={"conv": "conv2d+relu"}, constants={})


@pytest.fixture
def measured():
    from tvmlab.measure.instrument import profile_machine

    machine = FakeMachine([("conv", 0.004), ("vm.builtin.alloc_tensor", 0.001), ("dense", 0.002), ("conv", 0.004)])
    return machine, profile_machine(machine, machine.infer, KERNELS, FakeDevice(), 2, 3, alone=True)


def test_the_instrument_times_each_kernel_and_calls_it_once(measured):
    machine, found = measured
    assert [kernel["name"] for kernel in found["kernels"]] == ["conv", "dense"]
    conv, dense = found["kernels"]
    assert (conv["calls"], dense["calls"]) == (2, 1)
    assert (conv["kernel_class"], conv["shapes"]) == ("conv2d+relu", [(1, 8)])
    assert len(conv["in_model_s"]) == len(found["whole_s"]) == len(found["instrumented_s"]) == 3
    assert all(0.004 <= seconds < 0.02 for seconds in conv["in_model_s"])
    assert all(0.002 <= seconds < 0.01 for seconds in dense["in_model_s"])
    inferences = 1 + 3 + 3 + 1
    assert machine.made.count("vm.builtin.alloc_tensor") == inferences  # never skipped, never repeated
    alone = 2 + 5  # one call to warm up, one to see how long it takes, the fewest repeats
    assert machine.made.count("conv") == 2 * inferences + alone


def test_a_kernel_alone_is_timed_hot_and_on_another_device_neither_cold_nor_on_one_thread(measured):
    conv = measured[1]["kernels"][0]
    assert 0.004 <= conv["hot_s"] < 0.02
    assert conv["cold_s"] is None and conv["one_thread_s"] is None


@pytest.fixture(scope="module")
def folder(tiny_run, tmp_path_factory):
    copy = tmp_path_factory.mktemp("runs") / tiny_run.id
    shutil.copytree(tiny_run.folder.path, copy)
    return RunFolder.open(copy)


@pytest.fixture(scope="module")
def frame(folder):
    return tvmlab.profile(folder, repeats=5, threads=1)


def test_every_kernel_of_the_model_has_a_row(frame):
    kernels = frame[frame["kind"] == "kernel"]
    assert {"conv2d+relu", "matmul+add"} <= set(kernels["kernel_class"])
    assert frame.index[-1] == OUTSIDE and frame.loc[OUTSIDE, "kind"] == "outside"
    assert (kernels["in_model_us"] > 0).all() and (kernels["calls"] == 1).all()
    assert kernels.loc[kernels["kernel_class"] == "conv2d+relu", "shapes"].item().startswith("1x8x14x14 16x8x3x3")


def test_the_rows_add_up_to_the_inference(frame):
    total_us = (frame["calls"] * frame["in_model_us"]).sum()
    assert total_us == pytest.approx(frame.attrs["end_to_end_ms"] * 1e3)
    assert frame["share"].sum() == pytest.approx(1.0)
    assert frame.attrs["threads"] == 1


def test_a_kernel_stands_beside_its_record(frame, folder):
    known = tasks(folder).set_index("kernel_class")["best_us"]
    for name in ("conv2d+relu", "matmul+add"):
        row = frame[frame["kernel_class"] == name].iloc[0]
        assert row["tuned_us"] == known[name]
        assert row["difference_us"] == pytest.approx(row["in_model_us"] - row["tuned_us"])
        assert min(row["hot_us"], row["cold_us"], row["one_thread_us"]) > 0
    differences = frame["difference_us"].dropna()
    assert list(differences) == sorted(differences, reverse=True)


def test_flushed_weights_take_longer(frame):
    """The matrix product reads 125 kB of weights: from memory that takes several times what it takes from the L2."""
    row = frame[frame["kernel_class"] == "matmul+add"].iloc[0]
    assert row["cold_us"] > row["hot_us"]


def test_it_is_kept_in_the_run_folder(frame, folder):
    again = profile_frame(folder)
    pd.testing.assert_frame_equal(again, frame)
    assert again.attrs == frame.attrs
    kept = json.loads((folder.path / "profile.json").read_text())
    assert len(kept["whole_s"]) == 5


def test_causes(frame):
    found = causes(frame)
    assert set(found.index) == {"cold weights", "threads", "records", "layout transforms", OUTSIDE}
    assert list(found["ms"]) == sorted(found["ms"], reverse=True)
    assert found.loc["threads", "ms"] == pytest.approx(
        (frame["hot_us"] - frame["one_thread_us"]).sum() / 1e3  # on one thread, both are the same measurement
    )
    assert np.allclose(found["share"], found["ms"] / frame.attrs["end_to_end_ms"])


def test_transforms_are_a_cause_of_their_own():
    rows = {
        "conv": ("kernel", 2, 100.0),
        "layout_pack": ("transform", 3, 20.0),
        OUTSIDE: ("outside", 1, 40.0),
    }
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=["kind", "calls", "in_model_us"])
    frame[["tuned_us", "hot_us", "cold_us", "one_thread_us"]] = 10.0
    frame.attrs = {"threads": 1, "end_to_end_ms": 0.3}
    found = causes(frame)["ms"]
    assert found["layout transforms"] == pytest.approx(0.06)
    assert found[OUTSIDE] == pytest.approx(0.04)


@pytest.mark.parametrize(
    ("kernel_class", "expected"),
    [
        ("layout_pack", True),
        ("transpose", True),
        ("conv2d", False),
        ("layout_unpack+relu", False),
        ("reshape+transpose+reshape+layout_pack", True),
    ],
)
def test_what_is_a_transform(kernel_class, expected):
    assert is_transform(kernel_class) is expected


def test_what_cannot_be_profiled(make_run, tmp_path):
    with pytest.raises(InputError, match="repeats=2"):
        tvmlab.profile(make_run(), repeats=2)
    with pytest.raises(RunError, match="has not begun"):
        tvmlab.profile(RunFolder.create(Experiment(model="squeezenet"), tmp_path))
    with pytest.raises(RecordError, match=r"profile\.json is missing"):
        profile_frame(make_run())
