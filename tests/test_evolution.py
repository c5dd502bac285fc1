"""Evolution on invented and on real spaces, answered with invented latencies."""

import json
import math
import subprocess
import sys
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import tvm
from fake_measurer import latency_of
from fake_space import FakeSpace, NoCostModel
from tvm import te

from tvmlab.core import Trial, TrialStatus
from tvmlab.search import evolution as evolution_module
from tvmlab.search.costmodel import CostModel
from tvmlab.search.evolution import Evolution
from tvmlab.spaces.knobs import Choice, Tile
from tvmlab.spaces.sketch import SketchSpace


@pytest.fixture(autouse=True)
def _fake_spaces_have_no_programs(monkeypatch):
    real = evolution_module._tvm_candidate
    monkeypatch.setattr(evolution_module, "_tvm_candidate", lambda c: c if isinstance(c.payload, str) else real(c))


@pytest.fixture
def space():
    return FakeSpace()


@pytest.fixture(scope="module")
def real_space(tiny_tasks, cpu):
    task = tiny_tasks["matmul+add"]
    return SketchSpace(task.key, task.module, cpu.to_tvm())


def evolution(space, seed=0, **options):
    model = NoCostModel() if isinstance(space, FakeSpace) else CostModel(seed)
    values = {"population": 64, "generations": 2, "cost_model": model, **options}
    return Evolution(space, seed=seed, **values)


def by_key(candidate):
    return latency_of(candidate.key)


TARGET = [[4, 2, 4, 4], [7, 2, 1, 4], [8, 8], 2]


def by_decisions(candidate):
    """The further the knobs are from a point the search does not know, the slower: a product over them."""
    latency = 1e-5 * (1 + candidate.sketch)
    for value, best in zip(candidate.decisions, TARGET, strict=True):
        if isinstance(value, list):
            far = sum(abs(math.log2(a / b)) for a, b in zip(value, best, strict=True))
        else:
            far = abs(value - best)
        latency *= 1 + far
    return latency


def answer(candidates, latency=by_key, status=TrialStatus.OK):
    return [
        Trial(c.task_key, 0, "evolution", 1, c.key, c.sketch, c.decisions, status,
              [latency(c)] if status is TrialStatus.OK else [])
        for c in candidates
    ]  # fmt: skip


def search(strategy, total, batch=8, latency=by_key):
    """All candidates of a search, in the order they were asked for."""
    found = []
    while len(found) < total and (asked := strategy.ask(min(batch, total - len(found)))):
        strategy.tell(asked, answer(asked, latency))
        found += asked
    return found


def test_same_seed_and_same_answers_give_the_same_candidates(space):
    first, second = (search(evolution(space), 48) for _ in range(2))
    assert [c.key for c in first] == [c.key for c in second]
    assert [c.key for c in search(evolution(space, seed=1), 16)] != [c.key for c in first[:16]]


OTHER_PROCESS = """
import json, sys
sys.path.insert(0, sys.argv[1])
from test_evolution import evolution, search
from tvmlab.models import load_model
from tvmlab.spaces.sketch import SketchSpace
from tvmlab.targets import target
from tvmlab.tasks import extract
cpu = target("cpu")
task = next(t for t in extract(load_model(sys.argv[2]), cpu) if t.info.kernel_class == "matmul+add")
space = SketchSpace(task.key, task.module, cpu.to_tvm())
print(json.dumps([c.key for c in search(evolution(space), 40)]))
"""


@pytest.mark.slow
def test_same_seed_same_candidates_on_a_real_task_also_in_another_process(real_space, tiny_onnx):
    """40 trials: the model on program features has been trained and had its say."""
    command = [sys.executable, "-c", OTHER_PROCESS, str(Path(__file__).parent), tiny_onnx]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    first, second = ([c.key for c in search(evolution(real_space), 40)] for _ in range(2))
    assert len(set(first)) == 40
    assert first == second
    assert json.loads(other.communicate()[0]) == first


def test_no_candidate_is_proposed_twice(space):
    found = search(evolution(space), 96, batch=16)
    assert len(found) == 96
    assert len({c.key for c in found}) == 96


def test_no_candidate_is_proposed_twice_before_it_is_told(space):
    """The loop asks for the next batch while the one before is measured."""
    strategy = evolution(space)
    search(strategy, 32)
    first, second = strategy.ask(16), strategy.ask(16)
    assert not {c.key for c in first} & {c.key for c in second}
    strategy.tell(first, answer(first))
    third = strategy.ask(16)
    assert not {c.key for c in first + second} & {c.key for c in third}


def test_an_ask_gives_as_many_as_were_asked_for(space):
    strategy = evolution(space)
    for count in (1, 7, 16, 3, 32, 1):
        asked = strategy.ask(count)
        assert len(asked) == count
        strategy.tell(asked, answer(asked))


def test_what_is_known_is_not_proposed(space):
    """Without records too: then a resumed search starts with random samples, as the first session did."""
    known = [c.key for c in search(evolution(space), 24)]
    found = search(evolution(space, known=known), 48)
    assert len(found) == 48
    assert not set(known) & {c.key for c in found}


def test_failures_are_learned_and_do_not_stop_the_search(space):
    strategy = evolution(space)
    seen = set()
    for _ in range(4):
        asked = strategy.ask(8)
        assert len(asked) == 8
        strategy.tell(asked, answer(asked, status=TrialStatus.BUILD_ERROR))
        seen |= {c.key for c in asked}
    assert len(seen) == 32


def test_it_learns(space):
    """After 64 trials its best is clearly better than the best of 64 random samples of the same seed."""
    ratios = []
    for seed in range(5):
        guided = search(evolution(space, seed=seed), 64, latency=by_decisions)
        rng = np.random.default_rng(seed)
        drawn = [space.sample(index % len(space), rng) for index in range(64)]
        ratios.append(min(map(by_decisions, guided)) / min(map(by_decisions, drawn)))
    assert median(ratios) < 0.7


def test_later_batches_are_better_than_the_first(space):
    found = search(evolution(space), 64, latency=by_decisions)
    assert median(map(by_decisions, found[-16:])) < 0.6 * median(map(by_decisions, found[:16]))


def test_a_space_with_few_points_is_exhausted():
    strategy = evolution(FakeSpace((Tile(6, 2, 0), Choice(2)), sketches=1))
    found = search(strategy, 1000)
    assert len({c.key for c in found}) == len(found) == 8  # 4 tilings, 2 choices
    assert strategy.ask(8) == []


def test_a_real_task_with_few_points_is_exhausted(cpu):
    a = te.placeholder((2, 4), name="a")
    b = te.compute((2, 4), lambda i, j: te.max(a[i, j], 0.0), name="b")
    module = tvm.IRModule({"main": te.create_prim_func([a, b])})
    strategy = evolution(SketchSpace("e" * 16, module, cpu.to_tvm()))
    found = search(strategy, 1000)
    assert 1 <= len(found) < 50
    assert len({c.key for c in found}) == len(found)
    assert strategy.ask(8) == []


def records_of(candidates, latency=by_key):
    """Traces with their latencies, fastest first. The payload of a fake candidate stands for its trace."""
    traces = [c.payload if isinstance(c.payload, str) else c.payload.trace for c in candidates]
    return sorted(zip(traces, map(latency, candidates), strict=True), key=lambda record: record[1])


@pytest.mark.parametrize("kind", ["space", "real_space"])
def test_records_are_measured_again_best_first(kind, request):
    space = request.getfixturevalue(kind)
    earlier = search(evolution(space), 16)
    best = min(earlier, key=by_key)
    asked = evolution(space, seed=5, records=records_of(earlier)).ask(8)
    assert asked[0].key == best.key
    assert len({c.key for c in asked}) == 8


def test_a_record_that_is_known_is_not_measured_again(space):
    """A resumed run starts from its own records, which are of this run."""
    earlier = search(evolution(space), 16)
    known = [c.key for c in earlier]
    asked = evolution(space, records=records_of(earlier), known=known).ask(16)
    assert len(asked) == 16
    assert not set(known) & {c.key for c in asked}


def test_records_make_a_better_start(space):
    earlier = search(evolution(space), 48, latency=by_decisions)
    warm = evolution(space, seed=5, records=records_of(earlier, by_decisions)).ask(8)[1:]
    cold = evolution(space, seed=5).ask(8)
    assert median(map(by_decisions, warm)) < 0.5 * median(map(by_decisions, cold))


def test_a_record_of_another_task_is_passed_over(real_space, tiny_tasks, cpu):
    task = tiny_tasks["conv2d+relu"]
    conv = SketchSpace(task.key, task.module, cpu.to_tvm())
    foreign = conv.sample(0, np.random.default_rng(0))
    asked = evolution(real_space, records=[(foreign.payload.trace, 1e-6)]).ask(4)
    assert len(asked) == 4
    assert all(c.sketch >= 0 for c in asked)


def test_telling_nothing_changes_nothing(space):
    first, second = evolution(space), evolution(space)
    second.tell([], [])
    assert [c.key for c in search(first, 16)] == [c.key for c in search(second, 16)]


def test_the_fastest_points_are_tried_in_the_other_sketches_too(space):
    """Every trial is of the first sketch: what comes next has the fastest's decisions in the second."""
    rng = np.random.default_rng(0)
    first = [c for _ in range(64) if (c := space.realize(space.random(0, rng)))]
    strategy = evolution(space)
    strategy.tell(first, answer(first, by_decisions))
    fastest = min(first, key=by_decisions)
    assert (1, fastest.decisions) in [(c.sketch, c.decisions) for c in strategy.ask(16)]
