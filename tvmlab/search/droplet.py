"""Droplet search: coordinate descent over the knobs of a schedule, by moves that are known to be gains.

Canesche et al., "The Droplet Search Algorithm for Kernel Scheduling" (ACM TACO 2024), section 3: measure the neighbours
of a point along every coordinate, move to the best, stop where none is better, and fill a batch by speculation, further
along the way downhill; "Explore as a Storm, Exploit as a Raindrop" (2024): begin where a short search of another kind
ended. Different here: every neighbour is timed in turns with the point it would replace, and a move takes a paired
test, corrected for the number of neighbours it is the best of. And before a descent ends, some points two steps away
are tried: knobs are coupled, by the registers of a tile say, and then no single one can change. So are children of the
fastest points known (tvmlab.search.offspring), and, if it is given other starts, what is downhill from those
(tvmlab.search.scout): everything is timed beside the incumbent.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, combinations
from statistics import median
from typing import Any

import numpy as np

from tvmlab.core import Candidate, Trial
from tvmlab.search.offspring import Offspring
from tvmlab.search.outlook import Outlook
from tvmlab.search.scout import Scout, Start, name_of
from tvmlab.search.walkable import Walkable
from tvmlab.spaces.knobs import Direction, directions, stepped
from tvmlab.stats import LEAD, faster, is_faster

__all__ = ["Droplet"]

_PROMISING = 6  # directions that are followed two steps
_RIM = 32  # pairs of steps tried before a descent ends
_DOUBTFUL = 0.1  # a neighbour that is faster at this p-value, but not at the corrected one, is timed again
_AGAIN = 2  # so many of a batch at most
_UPHILL = 1.2  # a direction that led to so many times the latency when it was last taken is put off

Proposal = tuple[Candidate, tuple[Direction, ...]]  # and the steps from the incumbent that lead to it


class Droplet:
    """The descent of one task. It ends at a local minimum: then `ask` gives nothing, and `ending` says so.

    It begins at `start` (None: there is no valid point), whose latency in seconds is `latency_s`; without one it is
    measured first. `contenders` are the next fastest, timed in turns with it before anything else: the fastest of many
    readings is often a lucky one, and the descent begins where the faster schedule is. `offspring` is how many children
    of the fastest points are tried once no neighbour is left that looks promising. `others` are schedules in other
    valleys, with their latencies, that are walked down from before it ends. `known` are the trials of the same descent
    before it was interrupted, `earlier` those of other searches: a model of the knobs learns them, and says which
    neighbours are measured first. Those that it expects to be far slower come after the others; and last, after all
    other starts, those of them that lie in a direction which the descent has taken before.

    A neighbour becomes the incumbent if it is faster at `p_value` (`tvmlab.stats.is_faster`), divided by the number of
    neighbours told with it (the best of many looks fast by chance); the fastest, if several are. If it was timed alone,
    its median must be lower. One that was timed beside an earlier incumbent, and looks faster than the present one, is
    asked for once more; so are the two of a batch that are likeliest to be faster, if none is shown to be. They are
    timed again one after the other, each a test of its own.
    """

    name = "droplet"

    def __init__(
        self,
        space: Walkable,
        start: Candidate | None,
        *,
        p_value: float,
        seed: int = 0,
        latency_s: float | None = None,
        contenders: Sequence[Candidate] = (),
        offspring: int = 0,
        others: Sequence[tuple[Candidate, float | None]] = (),
        known: Sequence[Trial] = (),
        earlier: Sequence[Trial] = (),
    ) -> None:
        self._space = space
        self._p_value = p_value
        twins = space.elsewhere(start) if start is not None else []
        self._bases = [*filter(None, [start]), *contenders, *(other for other, _ in others), *twins]
        bases = [(base, space.knobs(base)) for base in self._bases]
        self._outlook = Outlook(bases, seed)
        self._offspring = Offspring(bases, self._outlook, [seed, zlib.crc32(space.task_key.encode()), len(known)])
        # Of an interrupted descent those that are left, if all its trials but the contenders were children.
        self._unborn = offspring - max(0, len(known) - len(contenders))
        self._scout = Scout([Start(other, space.knobs(other), found_s) for other, found_s in others], self._outlook)
        self._scouted: set[str] = set()  # keys of what the scout proposed
        self._knobs = space.knobs(start) if start is not None else ()
        self._rng = np.random.default_rng([seed, zlib.crc32(space.task_key.encode())])
        self._scores: dict[str, float] = {}  # latencies in seconds, as they would be beside the start's
        self._asked: set[str] = set()  # keys of programs
        self._tried: set[str] = set()  # names of points
        self._under_way: dict[str, tuple[Direction, ...]] = {}
        self._rematches: list[Candidate] = []
        self._rematched: set[str] = set()  # keys of what was asked for a second time
        self._twins: list[Candidate] = []  # of the incumbent, in other sketches
        self._ways: list[Direction] = []  # from the incumbent, the most promising first
        self._put_off: list[Direction] = []  # the same, to where it is expected to be far slower
        self._trends: dict[Direction, float] = {}  # latency after the last step in a direction over that before it
        self._here: dict[Direction, float] = {}  # the same, of steps from the incumbent alone
        self._blocked: list[Direction] = []  # from the incumbent, to no valid point
        self._start = self._incumbent = start
        self._first = [start] if start is not None and latency_s is None else []
        self._contenders = list(contenders)
        self._contending: set[str] = set()  # their keys
        self.moves = 0
        self.local_minimum = False
        if start is not None:
            if latency_s is not None:
                self._scores[start.key] = latency_s
            for trial in earlier:
                self._outlook.learn(trial, trial.latency_s)
                self._offspring.tell(trial)
            self._stand_on(start)
            self._resume(start, known)

    def ask(self, count: int) -> list[Candidate]:
        """Up to `count` candidates; an empty list at a local minimum, or where what is under way must be told first."""
        found: list[Candidate] = []
        for candidate, ways in self._proposals():
            self._under_way[candidate.key] = ways
            found.append(candidate)
            if len(found) == count:
                return found
        # Nothing promising of this neighbourhood is left. Until all is told, go on where it looks like going down.
        near, rim = (self._speculation(), ()) if self._under_way else ((), self._rim())
        for candidate, ways in chain(near, self._children(), rim, self._elsewhere(), self._leftovers()):
            self._under_way[candidate.key] = ways
            found.append(candidate)
            if len(found) == count:
                break
        self.local_minimum = not self._under_way
        return found

    def tell(self, candidates: Sequence[Candidate], trials: Sequence[Trial]) -> None:
        """Learn how the candidates did, and move if one of them is shown to be faster than the incumbent."""
        made = {candidate.key: candidate for candidate in candidates}
        for trial in trials:
            ways = self._under_way.pop(trial.key, ())
            self._note(trial, ways)
        best = self._winner(trials)
        again = self._doubtful(trials) if best is None else []
        if best is not None:
            self.moves += 1
            self._stand_on(made[best.key])
        again += [trial for trial in trials if self._is_undecided(trial)]
        self._rematches += [made[trial.key] for trial in again]

    @property
    def incumbent(self) -> Candidate | None:
        """Where the descent stands."""
        return self._incumbent

    @property
    def ending(self) -> str:
        """How the descent ended; an empty string while it goes on."""
        if not self.local_minimum:
            return ""
        if self._start is None or self._incumbent is None:
            return "there is no valid point to start from"
        start, end = (self._scores.get(each.key) for each in (self._start, self._incumbent))
        if end is None:
            return "neither the first point runs, nor one beside it"
        came_from = f" from {start * 1e6:.1f} us" if start is not None else ""
        return f"a local minimum at {end * 1e6:.1f} us, {self.moves} moves{came_from}"

    # Where to go

    def _proposals(self) -> Iterator[Proposal]:
        """What is to be measured next: the start, its contenders, what must be timed again, the neighbours."""
        if self._incumbent is None:
            return
        while self._first:
            start = self._first.pop()
            self._asked.add(start.key)
            yield start, ()
        while self._contenders:
            contender = self._contenders.pop(0)
            if contender.key not in self._asked:
                self._contending.add(contender.key)
                self._asked.add(contender.key)
                self._tried.add(name_of(contender.sketch, contender.decisions))
                yield replace(contender, rival=self._incumbent), ()
        if self._contending & self._under_way.keys():
            return  # where to look around is not known yet
        while self._rematches and not self._rematched & self._under_way.keys():
            candidate = self._rematches.pop(0)
            if self._scores[candidate.key] < self._scores.get(self._incumbent.key, np.inf):
                self._rematched.add(candidate.key)
                yield replace(candidate, rival=self._incumbent), ()
        while self._twins:
            yield from self._new(self._twins.pop(0), ())
        while self._ways:
            way = self._ways.pop(0)
            yield from self._step((way,))

    def _speculation(self) -> Iterator[Proposal]:
        """Two steps from the incumbent: along the directions that look fast so far, again and in pairs."""
        fast = [way for way in self._by_latency() if self._here[way] < 1][:_PROMISING]
        for ways in [(way, way) for way in fast] + list(combinations(fast, 2)):
            yield from self._step(ways)

    def _children(self) -> Iterator[Proposal]:
        """What the models of the knobs expect most of, among the children of the fastest points known."""
        if self._unborn <= 0 or self._contending & self._under_way.keys():
            return
        for base, decisions in self._offspring.born(self._tried):
            for candidate, ways in self._vary(base, decisions, ()):
                self._unborn -= 1
                yield candidate, ways
                if self._unborn <= 0:
                    return

    def _rim(self) -> Iterator[Proposal]:
        """Two steps, before the descent ends here: in the least bad directions, and where one step is not valid."""
        told = self._by_latency()
        best = told[:_PROMISING]
        pairs = [(way, way) for way in best] + list(combinations(best, 2))
        pairs += [(blocked, way) for blocked in self._blocked for way in [*told, *self._blocked] if way != blocked]
        for ways in pairs[:_RIM]:
            yield from self._step(ways)

    def _elsewhere(self) -> Iterator[Proposal]:
        """Points of other valleys, once nothing is under way that the descent itself may move to."""
        if self._under_way.keys() <= self._scouted:
            for base, decisions in self._scout.ahead(self._tried):
                for candidate, ways in self._vary(base, decisions, ()):
                    self._scouted.add(candidate.key)
                    yield candidate, ways

    def _leftovers(self) -> Iterator[Proposal]:
        """The neighbours that were put off: a minimum is one beside all of them."""
        if not self._under_way:
            while self._put_off:
                yield from self._step((self._put_off.pop(0),))

    def _by_latency(self) -> list[Direction]:
        return sorted(self._here, key=lambda way: self._here[way])

    def _step(self, ways: tuple[Direction, ...]) -> Iterator[Proposal]:
        """The candidate after these steps from the incumbent, if there is a new one."""
        assert self._incumbent is not None
        decisions = stepped(self._knobs, self._incumbent.decisions, ways)
        if decisions is not None:
            yield from self._vary(self._incumbent, decisions, ways)

    def _vary(self, base: Candidate, decisions: Sequence[Any], ways: tuple[Direction, ...]) -> Iterator[Proposal]:
        """The candidate with these decisions beside the incumbent, unless it was tried before or is not valid."""
        if (name := name_of(base.sketch, decisions)) in self._tried:
            return
        self._tried.add(name)
        candidate = self._space.vary(base, decisions)
        if candidate is None and len(ways) == 1:
            self._blocked.append(ways[0])
        if candidate is not None:
            yield from self._new(candidate, ways)

    def _new(self, candidate: Candidate, ways: tuple[Direction, ...]) -> Iterator[Proposal]:
        """A candidate beside the incumbent, unless its program was tried before."""
        assert self._incumbent is not None
        self._tried.add(name_of(candidate.sketch, candidate.decisions))
        if candidate.key not in self._asked:
            self._asked.add(candidate.key)
            yield replace(candidate, rival=self._incumbent), ways

    def _stand_on(self, candidate: Candidate) -> None:
        """Look around from a new incumbent."""
        assert self._incumbent is not None
        knobs = self._space.knobs(candidate)  # two traces that come of no sketch may have others
        if candidate.sketch != self._incumbent.sketch or len(knobs) != len(self._knobs):
            self._trends.clear()
        self._knobs = knobs
        self._incumbent = replace(candidate, rival=None)
        self._twins = list(self._space.elsewhere(candidate))
        self._asked.add(candidate.key)
        self._tried.add(name_of(candidate.sketch, candidate.decisions))
        self._here.clear()
        self._blocked.clear()
        ways = directions(self._knobs, candidate.decisions)
        ways = [ways[index] for index in self._rng.permutation(len(ways))]
        points = [stepped(self._knobs, candidate.decisions, [way]) for way in ways]
        reached = {way: point for way, point in zip(ways, points, strict=True) if point is not None}
        scores = dict(zip(reached, self._outlook.scores(candidate.sketch, list(reached.values())), strict=True))
        ways = sorted(reached, key=lambda way: self._rank(way, scores[way]))
        expected = self._outlook.promising(candidate.sketch, candidate.decisions, [reached[way] for way in ways])
        promising = {way for way, is_fast in zip(ways, expected, strict=True) if is_fast}
        promising -= {way for way in ways if self._trends.get(way, 1.0) >= _UPHILL}
        # The model may be wrong: a direction that was never taken is not put off, but comes after the others.
        self._ways = [way for way in ways if way in promising or way not in self._trends]
        self._ways.sort(key=lambda way: way not in promising)
        self._put_off = [way for way in ways if way not in self._ways]

    def _rank(self, way: Direction, score: float) -> tuple[int, float]:
        """What led down before comes first, what led up last; between them what the model thinks best."""
        trend = self._trends.get(way)
        return (1, -score) if trend is None else (0 if trend < 1 else 2, trend)

    # What is known

    def _note(self, trial: Trial, ways: tuple[Direction, ...]) -> None:
        self._scout.tell(trial)
        latency = trial.latency_s
        if latency is None:
            self._outlook.learn(trial, None)
            return
        ratio = _ratio(trial)
        if ratio is not None:
            self._scores.setdefault(trial.rival, trial.reference_s or median(trial.rival_latencies_s))
        elif self._incumbent is not None and self._incumbent.key in self._scores:
            ratio = latency / self._scores[self._incumbent.key]
        # As it looks: whether it is faster is asked of the pairs. What is learned of it is what was shown.
        self._scores[trial.key] = ratio * trial.reference_s if ratio and trial.reference_s else latency
        self._offspring.tell(trial)
        self._outlook.learn(trial, latency)
        if ratio is not None and len(ways) == 1:
            self._trends[ways[0]] = ratio
            if self._is_against_incumbent(trial):
                self._here[ways[0]] = ratio

    def _winner(self, trials: Sequence[Trial]) -> Trial | None:
        """The fastest of those that are shown to be faster than the incumbent.

        What was asked for again was chosen by other pairs than these: it is not one of the many that look fast.
        """
        rivals = [trial for trial in trials if trial.ok and self._is_against_incumbent(trial)]
        fresh = sum(trial.key not in self._rematched for trial in rivals)
        winners = [t for t in rivals if self._beats_incumbent(t, 1 if t.key in self._rematched else fresh)]
        return min(winners, key=lambda trial: self._scores[trial.key], default=None)

    def _doubtful(self, trials: Sequence[Trial]) -> list[Trial]:
        """Those that lead, but might by chance, being the best of many: to be timed again."""
        paired = [trial for trial in trials if trial.ok and trial.rival and self._is_against_incumbent(trial)]
        paired = [trial for trial in paired if (_ratio(trial) or 1.0) < LEAD]
        chances = {
            trial.key: faster(trial.latencies_s, trial.rival_latencies_s)
            for trial in paired
            if trial.key not in self._rematched
        }
        found = [trial for trial in paired if chances.get(trial.key, 1.0) <= _DOUBTFUL]
        return sorted(found, key=lambda trial: chances[trial.key])[:_AGAIN]

    def _beats_incumbent(self, trial: Trial, tests: int) -> bool:
        assert self._incumbent is not None
        if not trial.rival:
            return self._scores[trial.key] < self._scores.get(self._incumbent.key, np.inf)
        return is_faster(trial.latencies_s, trial.rival_latencies_s, self._p_value, tests)

    def _is_against_incumbent(self, trial: Trial) -> bool:
        """Whether a trial says how a candidate compares with the incumbent; alone, by the medians."""
        assert self._incumbent is not None
        return trial.key != self._incumbent.key and trial.rival in ("", self._incumbent.key)

    def _is_undecided(self, trial: Trial) -> bool:
        """Whether a candidate looks faster than the incumbent, but was timed beside an earlier one."""
        assert self._incumbent is not None
        present = self._scores.get(self._incumbent.key, np.inf)
        return trial.ok and not self._is_against_incumbent(trial) and self._scores[trial.key] < present

    def _resume(self, start: Candidate, known: Sequence[Trial]) -> None:
        """Stand where an interrupted descent stood: on the rival of its last trials, unless they beat it."""
        trials = {trial.key: trial for trial in known}
        self._asked |= trials.keys()
        self._tried |= {name_of(trial.sketch, trial.decisions) for trial in known}
        if start.key in trials:
            self._first.clear()
        for trial in known:
            self._note(trial, ())
        others = [trial.rival for trial in known if trial.rival in trials and trial.rival != start.key]
        rivals = list(dict.fromkeys(others))
        stood_on = self._again(trials[rivals[-1]]) if rivals else None
        if stood_on is not None:
            self.moves = len(rivals)
            self._stand_on(stood_on)
        self._rematched = {key for key, times in Counter(trial.key for trial in known).items() if times > 1}
        best = self._winner(list(trials.values()))
        beaten_by = self._again(best) if best is not None else None
        if beaten_by is not None:
            self.moves += 1
            self._stand_on(beaten_by)

    def _again(self, trial: Trial) -> Candidate | None:
        """The candidate of a recorded trial."""
        like = [b for b in self._bases if b.sketch == trial.sketch and len(b.decisions) == len(trial.decisions)]
        made = (self._space.vary(base, trial.decisions) for base in like)
        return next((found for found in made if found is not None and found.key == trial.key), None)


def _ratio(trial: Trial) -> float | None:
    """A candidate's latency over its rival's, turn by turn; None where it was timed alone."""
    if not trial.rival:
        return None
    return median(ours / theirs for ours, theirs in zip(trial.latencies_s, trial.rival_latencies_s, strict=True))
