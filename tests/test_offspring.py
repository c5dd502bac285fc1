"""Children of the fastest points: what they inherit, which come first, and where a descent gets by them."""

import numpy as np
import pytest
from test_droplet import Clock, Tiled, descend
from test_outlook import points, trials_of
from test_scout import TwoSketches

from tvmlab.search.droplet import Droplet
from tvmlab.search.offspring import Offspring
from tvmlab.search.outlook import Outlook
from tvmlab.search.scout import name_of
from tvmlab.spaces.knobs import Choice


class Ridge(Tiled):
    """Three knobs that have to go up together: one or two alone lead uphill. The lowest point is (7, 7, 7)."""

    KNOBS = (Choice(8), Choice(8), Choice(8))
    START = (2, 2, 2)

    def vary(self, candidate, decisions):
        return self.at(*decisions)

    def latency_s(self, candidate):
        x, y, z = candidate.decisions
        return 1e-4 * (1 + 0.2 * (abs(x - y) + abs(y - z) + abs(x - z)) - 0.05 * x)


def descent(space, earlier, offspring, **options):
    start = space.at(*space.START)
    return Droplet(space, start, p_value=0.05, latency_s=space.latency_s(start), offspring=offspring,
                   earlier=earlier, **options)  # fmt: skip


def earlier_of(space, count=150):
    """Trials of random points, none of them faster than the start."""
    found = trials_of(space, points(space, count))
    slowest_s = space.latency_s(space.at(*space.START))
    return [trial for trial in found if trial.latency_s >= slowest_s]


@pytest.mark.parametrize("ahead", [True, False])
def test_they_lead_where_no_step_or_pair_of_steps_does(ahead):
    space = Ridge()
    without, with_children = (descent(space, earlier_of(space), offspring) for offspring in (0, 60))
    for droplet in (without, with_children):
        descend(droplet, Clock(space, noise=0.003), ahead=ahead)
        assert droplet.local_minimum
    assert without.incumbent.decisions == [2, 2, 2]
    assert with_children.incumbent.decisions == [7, 7, 7]


def test_no_more_of_them_than_asked_for_and_none_twice():
    space = Ridge()
    steps = {}  # by how many knobs a trial differs from its rival
    for offspring in (0, 7):
        trials = descend(descent(space, earlier_of(space), offspring), Clock(space, noise=0.003), total=60)
        at = {trial.key: trial.decisions for trial in trials} | {space.at(*space.START).key: list(space.START)}
        away = [np.abs(np.subtract(trial.decisions, at[trial.rival])).sum() for trial in trials]
        steps[offspring] = sum(distance > 2 for distance in away)
        assert len({trial.key for trial in trials}) >= len(trials) - 3
    assert steps[0] == 0 < steps[7] <= 7


def test_an_interrupted_descent_has_no_more_than_were_left():
    space = Ridge()
    known = descend(descent(space, earlier_of(space), 7), Clock(space, noise=0.003), total=40)
    resumed = descent(space, earlier_of(space), 7, known=known)
    trials = descend(resumed, Clock(space, noise=0.003), total=60)
    at = {trial.key: trial.decisions for trial in [*known, *trials]} | {space.at(*space.START).key: list(space.START)}
    assert not {trial.key for trial in known} & {trial.key for trial in trials if trial.key not in resumed._rematched}
    assert all(np.abs(np.subtract(trial.decisions, at[trial.rival])).sum() <= 2 for trial in trials)


def children_of(space, known, tried=frozenset()):
    outlook = Outlook([(candidate, space.knobs(candidate)) for candidate in known], seed=0)
    offspring = Offspring([(candidate, space.knobs(candidate)) for candidate in known], outlook, [0])
    found = trials_of(space, points(space, 100))
    for trial in found:
        outlook.learn(trial, trial.latency_s)
        offspring.tell(trial)
    return found, outlook, offspring.born(tried)


def test_the_most_promising_come_first_and_all_are_new():
    space = Tiled()
    start = space.at(*space.START)
    told, outlook, born = children_of(space, [start])
    decisions = [point for _, point in born]
    scores = outlook.scores(0, decisions)
    assert len(born) > 50 and all(candidate is start for candidate, _ in born)
    assert (np.diff(scores) <= 1e-9).all()
    names = [name_of(0, point) for point in decisions]
    assert len(set(names)) == len(names) and not set(names) & {name_of(0, trial.decisions) for trial in told}
    fastest = np.median([space.latency_s(space.at(*point)) for point in decisions[:20]])
    assert fastest < np.quantile([trial.latency_s for trial in told], 0.1)
    again = [name_of(0, point) for _, point in children_of(space, [start], set(names[:20]))[2]]
    assert not set(again) & set(names[:20])


def test_of_a_sketch_that_no_candidate_is_known_of_there_are_none():
    space = TwoSketches(lowest_s=1e-5)  # the second would be far faster
    start = space.at(*space.START)
    outlook = Outlook([(start, space.KNOBS)], seed=0)
    offspring = Offspring([(start, space.KNOBS)], outlook, [0])
    assert offspring.born(set()) == []
    for trial in trials_of(space, [space.second(9, 8), space.second(1, 1), start]):
        outlook.learn(trial, trial.latency_s)
        offspring.tell(trial)
    born = offspring.born(set())
    assert born and {candidate.sketch for candidate, _ in born} == {0}
