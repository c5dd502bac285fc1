"""Traces that come of no sketch of the task all have the number -1, whatever their knobs: transferred ones, say."""

import hashlib

from test_droplet import Clock, Tiled, descend

from tvmlab.core import Candidate
from tvmlab.search.droplet import Droplet
from tvmlab.search.outlook import Outlook
from tvmlab.spaces.knobs import Choice


class Foreign(Tiled):
    """Two kinds of trace, both of no sketch: that of Tiled, and one of two choices that is ten times as fast."""

    OTHER = (Choice(8), Choice(8))

    def knobs(self, candidate):
        return self.KNOBS if len(candidate.decisions) == len(self.KNOBS) else self.OTHER

    def at(self, *decisions):
        return Candidate(self.task_key, hashlib.sha256(repr(decisions).encode()).hexdigest()[:16], -1, list(decisions))

    def vary(self, candidate, decisions):
        assert len(candidate.decisions) == len(decisions), "these are no decisions of this trace"
        return self.at(*decisions)

    def latency_s(self, candidate):
        if len(candidate.decisions) == len(self.KNOBS):
            return super().latency_s(candidate)
        return 1e-5 * (1 + sum(abs(value - 5) for value in candidate.decisions))


def descent(space, **options):
    start = space.at(*space.START)
    return Droplet(space, start, p_value=0.05, latency_s=space.latency_s(start), contenders=[space.at(1, 2)],
                   offspring=8, **options)  # fmt: skip


def test_a_descent_goes_on_from_a_contender_with_other_knobs():
    space = Foreign()
    droplet = descent(space)
    descend(droplet, Clock(space, noise=0.003))
    assert droplet.incumbent.decisions == [5, 5] and droplet.local_minimum


def test_and_stands_there_again_after_an_interruption():
    space = Foreign()
    before = descend(descent(space), Clock(space, noise=0.003), total=20)
    resumed = descent(space, known=before)
    assert len(resumed.incumbent.decisions) == 2
    descend(resumed, Clock(space, noise=0.003))
    assert resumed.incumbent.decisions == [5, 5]


def test_nothing_is_expected_of_a_point_whose_knobs_are_others():
    space = Foreign()
    start = space.at(*space.START)
    outlook = Outlook([(start, space.KNOBS), (space.at(1, 2), space.OTHER)], seed=0)
    for trial in Clock(space)([start, space.at(3, 3)]):
        outlook.learn(trial, trial.latency_s)
    assert outlook.knows(-1, space.START) and not outlook.knows(-1, [3, 3])
    assert outlook.scores(-1, [[3, 3]]).tolist() == [1] and outlook.elsewhere(-1, [3, 3]) == []
