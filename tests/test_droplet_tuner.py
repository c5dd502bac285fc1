"""Coordinate descent as a tuner of templates: what every tuner must do, and which points it asks for."""

from pathlib import Path

from tvmlab.search.droplet_tuner import DropletTuner
from tvmlab.testing import RecordedSpace, TunerContract, spend

TABLE = Path(__file__).parent.parent / "data" / "recorded_spaces" / "conv3x3_64x28.json"


class TestDropletTuner(TunerContract):
    guided = True
    share = 0.9  # it looks at one point's neighbours at a time

    def make(self, space, seed=0, known=(), earlier=()):
        return DropletTuner(space, seed=seed, known=known, earlier=earlier)

    def table(self):
        return RecordedSpace.load(TABLE)


def test_the_tuner_takes_the_neighbours_of_the_fastest_first():
    space = RecordedSpace({"a": range(20), "b": range(20)}, lambda index: 1e-3 + 1e-5 * index, starts=[210])
    strategy = DropletTuner(space, seed=0)
    spend(strategy, 1, space.measure)
    assert sorted(candidate.decisions[0] for candidate in strategy.ask(4)) == [190, 209, 211, 230]
