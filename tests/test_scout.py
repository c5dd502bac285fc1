"""Walks from other starts, once a descent has nothing left to try."""

from types import SimpleNamespace

import pytest
from test_droplet import BOTTOM, Clock, Tiled, descend

from tvmlab import steps
from tvmlab.core import Candidate, InputError
from tvmlab.search.droplet import Droplet
from tvmlab.search.scout import apart
from tvmlab.spaces.knobs import Choice


class TwoSketches(Tiled):
    """Beside the valley of Tiled a second sketch, of two choices, with a valley of its own: lower or higher."""

    OTHER = (Choice(12), Choice(12))

    def __init__(self, lowest_s):
        self.lowest_s = lowest_s

    def knobs(self, candidate):
        return self.OTHER if candidate.sketch else self.KNOBS

    def vary(self, candidate, decisions):
        return self.second(*decisions) if candidate.sketch else super().vary(candidate, decisions)

    def second(self, *decisions):
        return Candidate(self.task_key, f"second {decisions}", 1, list(decisions))

    def latency_s(self, candidate):
        """The second valley's bottom is at (9, 8)."""
        if not candidate.sketch:
            return super().latency_s(candidate)
        return self.lowest_s * (1 + 0.2 * sum(abs(x - y) for x, y in zip(candidate.decisions, (9, 8), strict=True)))


def new(space, known=()):
    other = space.second(3, 3)
    return Droplet(
        space, space.at(*space.START), p_value=0.05, others=[(other, space.latency_s(other))], known=known
    )  # fmt: skip


@pytest.mark.parametrize("ahead", [True, False])
def test_a_lower_valley_elsewhere_is_found(ahead):
    space = TwoSketches(lowest_s=0.5e-4)
    droplet = new(space)
    trials = descend(droplet, Clock(space, noise=0.003), ahead=ahead)
    assert droplet.incumbent.sketch == 1 and droplet.incumbent.decisions == [9, 8]
    assert droplet.local_minimum
    bottom = space.at(*BOTTOM).key
    beside = [trial.sketch for trial in trials if trial.rival == bottom]
    assert set(beside) == {0, 1} and beside == sorted(beside)  # first all that is near, then elsewhere
    assert len({trial.key for trial in trials}) >= len(trials) - 3


def test_a_higher_valley_is_walked_down_and_left():
    space = TwoSketches(lowest_s=1.5e-4)
    droplet = new(space)
    trials = descend(droplet, Clock(space, noise=0.003))
    assert droplet.incumbent.decisions == BOTTOM and droplet.local_minimum
    elsewhere = [trial for trial in trials if trial.sketch == 1]
    assert min(elsewhere, key=lambda trial: trial.latency_s).decisions == [9, 8]
    assert {trial.rival for trial in elsewhere} == {droplet.incumbent.key}


@pytest.mark.parametrize("count", [40, 60, 80, 90])
@pytest.mark.parametrize("lowest_s", [0.5e-4, 1.5e-4])
def test_resumed_it_goes_on_where_it_was(count, lowest_s):
    space = TwoSketches(lowest_s)
    before = descend(new(space), Clock(space, noise=0.003, seed=3), total=count)
    resumed = new(space, known=before)
    after = descend(resumed, Clock(space, noise=0.003, seed=4))
    assert resumed.local_minimum and resumed.incumbent.sketch == (lowest_s < 1e-4)
    assert resumed.incumbent.decisions == ([9, 8] if lowest_s < 1e-4 else BOTTOM)
    assert not {trial.key for trial in before} & {trial.key for trial in after}


def test_a_resumed_search_that_was_over_has_nothing_to_ask():
    space = TwoSketches(lowest_s=1.5e-4)
    before = descend(new(space), Clock(space, noise=0.003))
    assert new(space, known=before).ask(8) == []


def test_more_starts_than_one_need_the_best():
    with pytest.raises(InputError, match="starts=3 with start='default'"):
        steps.Droplet(start="default", starts=3)


def trial(sketch, *decisions):
    return SimpleNamespace(sketch=sketch, decisions=list(decisions))


def test_starts_are_apart_in_four_knobs_or_in_the_sketch():
    here = trial(0, [1, 2], [4, 4], 1, 0, 3)
    assert apart(here, trial(1, [1, 2], [4, 4], 1, 0, 3))
    assert apart(here, trial(0, [2, 1], [4, 4], 2, 1, 2))
    assert not apart(here, trial(0, [2, 1], [4, 4], 1, 1, 2))
    assert apart(trial(0, 1, 2), trial(0, 2, 1)) and not apart(trial(0, 1, 2), trial(0, 2, 2))  # a small space


def test_points_of_a_template_are_apart_by_their_knobs():
    radices = (4, 4, 4, 4, 4)
    assert not apart(trial(0, 0), trial(0, 1 + 4 + 16), radices)
    assert apart(trial(0, 0), trial(0, 1 + 4 + 16 + 256), radices)
    assert apart(trial(0, 0), trial(0, [1, 2], 3), radices)  # a sketch
