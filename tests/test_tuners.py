"""The tuners over enumerated spaces: each inherits the contract, and is tested for what is its own."""

import json
from collections import Counter
from pathlib import Path
from statistics import mean, median

import numpy as np
import pytest
from fake_measurer import latency_of
from fake_space import FakeSpace, NoCostModel
from hypothesis import given, settings
from hypothesis import strategies as st

from tvmlab.core import InputError, Trial, TrialStatus
from tvmlab.search import evolution, genetic
from tvmlab.search.annealing import Annealing
from tvmlab.search.genetic import Genetic
from tvmlab.search.grid import Grid
from tvmlab.search.random_search import RandomSearch
from tvmlab.search.tuner import digits_of, index_of, shuffled
from tvmlab.testing import RecordedSpace, StrategyContract, TunerContract, spend

TABLE = Path(__file__).parent.parent / "data" / "recorded_spaces" / "conv3x3_64x28.json"


class Recorded(TunerContract):
    tuner = None

    def make(self, space, seed=0, known=(), earlier=()):
        return self.tuner(space, seed=seed, known=known, earlier=earlier)

    def table(self):
        return RecordedSpace.load(TABLE)


class TestAnnealing(Recorded):
    tuner = Annealing
    guided = True


class TestGenetic(Recorded):
    tuner = Genetic
    guided = True
    share = 0.9  # without a model it learns slowly: a few hundred points are hardly enough


class TestRandom(Recorded):
    tuner = RandomSearch


class TestGrid(Recorded):
    tuner = Grid
    seeded = False

    def test_it_takes_the_points_in_order(self):
        space = RecordedSpace({"a": range(5), "b": range(4)}, lambda index: 1e-3 * index + 1e-3, starts=[7])
        found = [trial.decisions[0] for trial in spend(self.make(space), 100, space.measure)]
        assert found == [7, *(index for index in range(20) if index != 7)]


def best_after(tuner, trials, seeds=range(9)):
    """How close to the best of the recorded table the searches come, by the median over seeds: 1 is the best."""
    space = RecordedSpace.load(TABLE)
    best = min(answer for index in range(len(space)) if isinstance(answer := space.answer(index), float))
    found = [spend(tuner(space, seed=seed), trials, space.measure) for seed in seeds]
    return median(best / min(t.latency_s for t in trials if t.ok) for trials in found)


@pytest.mark.slow
def test_annealing_is_near_the_best_after_few_trials():
    """A tenth of the space measured."""
    assert best_after(Annealing, 48) > 0.98 > best_after(RandomSearch, 48)


@pytest.mark.parametrize(("tuner", "share"), [(Annealing, 0.85), (Genetic, 0.95)])
def test_what_a_guided_one_asks_for_is_faster_than_the_space_in_general(tuner, share):
    space = RecordedSpace.load(TABLE)
    usual = median(answer for index in range(len(space)) if isinstance(answer := space.answer(index), float))
    later = [t.latency_s for seed in range(5) for t in spend(tuner(space, seed=seed), 56, space.measure)[24:]]
    assert median(later) < share * usual


def test_annealing_draws_few_at_random_when_a_model_is_there():
    """Of a space with one fast knob value in eight, nearly all of a guided batch has it."""
    space = RecordedSpace({"fast": range(8), "b": range(40), "c": range(40)}, lambda i: 1e-4 if i % 8 == 3 else 1e-3)
    strategy = Annealing(space, seed=0)
    spend(strategy, 64, space.measure)
    counts = Counter(candidate.decisions[0] % 8 for _ in range(4) for candidate in strategy.ask(32))
    assert counts[3] > 0.8 * counts.total()
    assert len(counts) > 1  # epsilon-greedy: some are drawn from anywhere


def test_annealing_in_a_space_with_one_knob_value_each():
    space = RecordedSpace({"a": (3,), "b": (5,)}, lambda index: 1e-3)
    assert len(spend(Annealing(space, seed=0), 9, space.measure)) == 1


@pytest.mark.parametrize("mutation", [0.0, 0.5])
def test_children_are_made_of_their_parents_knobs(monkeypatch, mutation):
    """Without mutation every knob of every child is one of a parent's; with much of it few children are such."""
    monkeypatch.setattr(genetic, "_MUTATION", mutation)
    space = RecordedSpace({name: range(50) for name in "abcd"}, lambda index: 1e-3 + index * 1e-9)
    strategy = Genetic(space, seed=0)
    asked = strategy.ask(24)
    strategy.tell(asked, space.measure(asked))
    fastest = sorted(candidate.decisions[0] for candidate in asked)[:16]
    parents, children = (
        digits_of(indices, space.radices)
        for indices in (fastest, [candidate.decisions[0] for candidate in strategy.ask(64)])
    )
    inherited = [all(digit in parents[:, knob] for knob, digit in enumerate(child)) for child in children]
    assert all(inherited) if mutation == 0 else mean(inherited) < 0.5


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=6), st.data())
def test_digits_and_indices_are_inverse(radices, data):
    size = int(np.prod(radices, dtype=object))
    indices = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=5))
    digits = digits_of(indices, radices)
    assert index_of(digits, radices) == indices
    assert (digits >= 0).all() and (digits < np.array(radices)).all()


def test_digits_are_in_the_order_of_the_space():
    space = RecordedSpace({"a": (0, 1, 2), "b": (0, 1), "c": (0, 1, 2, 3)}, lambda index: 1e-3)
    digits = digits_of(range(len(space)), space.radices)
    assert [list(space[index].values()) for index in range(len(space))] == digits.tolist()


@given(st.integers(0, 200), st.integers(0, 2**32))
@settings(max_examples=30)
def test_shuffled_is_a_permutation(size, seed):
    assert sorted(shuffled(size, np.random.default_rng(seed))) == list(range(size))


def test_shuffled_is_uniform_and_takes_no_time_for_large_sizes():
    rng = np.random.default_rng(0)
    orders = Counter(tuple(shuffled(3, rng)) for _ in range(6000))
    assert len(orders) == 6 and all(850 < count < 1150 for count in orders.values())
    drawn = [next(shuffled(10**15, rng)) for _ in range(100)]
    assert len(set(drawn)) == 100 and max(drawn) > 10**14


def test_a_strategy_that_breaks_the_rules_fails_the_contract():
    class Repeats(RandomSearch):
        def ask(self, count):
            self._tried.clear()
            self._keys.clear()
            self._rest = shuffled(len(self._space), np.random.default_rng(0))
            return super().ask(count + 1)

    class Suite(Recorded):
        tuner = Repeats

    suite, broken = Suite(), set()
    for name in dir(StrategyContract):
        if name.startswith("test_"):
            try:
                getattr(suite, name)()
            except AssertionError:
                broken.add(name)
    assert broken >= {
        "test_it_gives_at_most_what_was_asked_for",
        "test_nothing_is_proposed_twice",
        "test_nothing_is_proposed_twice_while_answers_are_outstanding",
        "test_a_resumed_search_repeats_nothing",
    }


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"knobs": {"a": [1, 2]}, "table": [1.0], "starts": [], "features": [[1]]}']
)
def test_a_file_that_is_no_table_is_refused(tmp_path, text):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"table\.json.*record it again"):
        RecordedSpace.load(path)


def test_the_recorded_table_is_what_was_measured():
    found = json.loads(TABLE.read_text())
    space = RecordedSpace.load(TABLE)
    index = next(index for index, item in enumerate(found["table"]) if isinstance(item, float))
    (trial,) = space.measure([space.realize(index)])
    assert trial.latency_s == pytest.approx(found["table"][index] * 1e-6) and trial.ok
    refused = [index for index, item in enumerate(found["table"]) if item is None]
    assert refused and all(space.realize(index) is None for index in refused)


class EvolvedSpace(FakeSpace):
    """Answers by the candidate's key; one candidate in sixteen fails."""

    def measure(self, candidates):
        return [
            Trial(
                c.task_key, 0, "evolution", 1, c.key, c.sketch, c.decisions,
                TrialStatus.CRASHED if c.key[-1] == "0" else TrialStatus.OK,
                [] if c.key[-1] == "0" else [latency_of(c.key)],
            )
            for c in candidates
        ]  # fmt: skip


class TestEvolution(StrategyContract):
    """The search over sketches keeps the rules that do not ask for numbered points."""

    @pytest.fixture(autouse=True)
    def _fake_spaces_have_no_programs(self, monkeypatch):
        monkeypatch.setattr(evolution, "_tvm_candidate", lambda candidate: candidate)

    def space(self):
        return EvolvedSpace()

    def make(self, space, seed=0, known=()):
        keys = [trial.key for trial in known]
        return evolution.Evolution(space, seed=seed, population=64, generations=2, cost_model=NoCostModel(), known=keys)
