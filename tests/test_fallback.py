"""A space that has nothing to give: another strategy takes its place, at the first call only."""

from types import SimpleNamespace

from tvmlab.search.fallback import Fallback


class Listed:
    def __init__(self, name, *batches):
        self.name, self._batches, self.told = name, list(batches), []

    def ask(self, count):
        return self._batches.pop(0)[:count] if self._batches else []

    def tell(self, candidates, trials):
        self.told.append((candidates, trials))


def test_the_other_takes_the_place_of_one_that_has_nothing():
    other = Listed("other", [1, 2], [3])
    both = Fallback(Listed("first"), lambda: other)
    assert both.name == "first"
    assert both.ask(2) == [1, 2] and both.name == "other"
    both.tell([1, 2], ["a", "b"])
    assert other.told == [([1, 2], ["a", "b"])] and both.ask(2) == [3] and both.ask(2) == []


def test_one_that_is_used_up_is_not_replaced():
    first = Listed("first", [1])
    both = Fallback(first, lambda: SimpleNamespace(ask=lambda count: 1 / 0))
    assert both.ask(4) == [1] and both.ask(4) == [] and both.ask(4) == []
    both.tell([1], ["a"])
    assert first.told == [([1], ["a"])] and both.name == "first" and both.ending == ""
