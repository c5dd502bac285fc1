"""The process that holds a whole model: what its first outputs are of."""

from types import SimpleNamespace

import numpy as np
import pytest

from tvmlab.measure import whole_model
from tvmlab.measure.subjects import thread_count
from tvmlab.measure.whole_model import Subject
from tvmlab.targets import target


@pytest.fixture
def subject(monkeypatch):
    """`subject(target, runtime)`: one that can load this runtime for a run on this target."""

    def make(named, runtime):
        run = SimpleNamespace(experiment=SimpleNamespace(target=named))
        monkeypatch.setattr(whole_model.RunFolder, "open", lambda folder: run)
        monkeypatch.setattr(whole_model, "model_of", lambda run: None)
        monkeypatch.setitem(whole_model._RUNTIMES, "tvmlab", lambda model, run, threads: runtime)
        return Subject()

    return make


def graph(broken_at=None):
    """A runtime that answers with the number of its call; the first two record a CUDA graph."""
    calls = []

    def call():
        calls.append(None)
        if len(calls) == broken_at:
            raise RuntimeError("an illegal memory access was encountered")
        return [np.array(len(calls))]

    return call


@pytest.mark.parametrize(("named", "call"), [("sm_90a", 3), ("cpu", 1)])
def test_the_outputs_that_are_checked_on_a_gpu_are_those_of_a_replay(subject, named, call):
    status, outputs = subject(named, graph()).answer(("load", "tvmlab", "a run", 1))
    assert status == "ok" and outputs == [call]


def test_a_replay_that_fails_is_an_error_of_loading_which_is_done_again_without_a_graph(subject):
    status, text = subject("sm_90a", graph(broken_at=3)).answer(("load", "tvmlab", "a run", 1))
    assert status == "error" and "illegal memory access" in text


def test_beside_a_gpu_the_runtimes_of_the_cpu_have_all_its_cores(monkeypatch):
    monkeypatch.setattr("tvmlab.measure.subjects.read_cpu", lambda: SimpleNamespace(cores=16))
    assert thread_count(target("sm_90a")) == 16
    assert thread_count(target("cpu:znver4")) == target("cpu:znver4").attrs["num-cores"]
