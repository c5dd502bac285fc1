"""Other processes in which a candidate is timed beside its rival, since which of the two is faster depends on that.

One schedule of a convolution of GoogLeNet takes 360 us in most processes and 308 us in the others, as long as each
lives; probably by the addresses that they happen to get (docs/decisions/0008-droplet.md; the cause was not found
out). A pair that is timed in one process alone says as much of the process as of the schedules, however often it is
timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from tvmlab.core import Measurement, TrialStatus
from tvmlab.measure.device import LEAD, LEADER_FACTOR, TURNS_S, is_behind, loops
from tvmlab.measure.process import START_S, WorkerDied, WorkerProcess, WorkerTimeout
from tvmlab.stats import turn_ratio

__all__ = ["Case", "Witnesses"]


@dataclass(frozen=True)
class Case:
    """What is timed: a task and its arguments, the libraries of a candidate and its rival, and how they are timed."""

    key: str
    arguments: Sequence[tuple[Sequence[int], str]]
    library: str
    rival: str
    timing: dict[str, Any]
    timeout_s: float


class Witnesses:
    """The processes beside the device's own; `start` gives a new one. They are started when the first is needed.

    Who waits is frozen: the idle threads of a kernel spin for a while, and would take the cores from whom is timed.
    """

    def __init__(self, count: int, start: Callable[[], WorkerProcess]) -> None:
        self._count = count
        self._start = start
        self._workers: list[WorkerProcess] = []
        self._awake: dict[WorkerProcess, int] = {}  # which start of each has answered

    def __len__(self) -> int:
        return self._count

    @property
    def pids(self) -> list[int]:
        """Process ids of those that live."""
        return [worker.pid for worker in self._workers if worker.pid]

    def hear(self, device: WorkerProcess, case: Case, found: Measurement) -> Measurement:
        """Add the turns of all processes to those that the device's own took first (`found`).

        Together they take `repeats` turns, and three times as many if the candidate leads after these, shared evenly. A
        candidate that is far behind in the first is not heard elsewhere. A process that fails adds nothing.
        """
        ours, theirs = list(found.latencies_s), list(found.rival_latencies_s)
        if not self._count or is_behind(ours, theirs, case.timing):
            return found
        self._wake()
        everyone = [device, *self._workers]
        taken = [len(ours), *[0] * self._count]
        number, repeats = loops(min(*ours, *theirs), case.timing)
        affordable = max(1, int(TURNS_S / (number * (max(ours) + max(theirs)))))
        for total in (repeats, LEADER_FACTOR * repeats):
            for place, worker in enumerate(everyone):
                first, share = taken[place], _share(min(total, affordable), len(everyone), place)
                if first < share:
                    # Who begins alternates from turn to turn, and from process to process.
                    heard = self._visit(device, worker, case, range(place + first, place + share), number)
                    ours += heard.latencies_s
                    theirs += heard.rival_latencies_s
                    taken[place] = share
            if turn_ratio(ours, theirs) >= LEAD:
                break
        return replace(found, latencies_s=tuple(ours), rival_latencies_s=tuple(theirs))

    def _wake(self) -> None:
        """Have all of them running, and frozen; one that died is started again."""
        if not self._workers:
            self._workers = [self._start() for _ in range(self._count)]
        for worker in self._workers:
            worker.start()
        for worker in self._workers:
            if worker.generation != self._awake.get(worker):
                with suppress(WorkerDied, WorkerTimeout):  # then its turns are not taken
                    worker.request(("ping",), START_S)
                self._awake[worker] = worker.generation
                worker.pause()

    def _visit(
        self, device: WorkerProcess, worker: WorkerProcess, case: Case, turns: range, number: int
    ) -> Measurement:
        """Some turns in one process; none where it fails: the candidate ran elsewhere, and its pairs there count."""
        try:
            if worker is not device:
                device.pause()
                worker.proceed()
            message = ("turns", case.key, case.arguments, case.library, case.rival, turns, number, worker is not device)
            answer = worker.request(message, case.timeout_s)
        except (WorkerDied, WorkerTimeout):
            return Measurement(TrialStatus.CRASHED)
        finally:
            if worker is not device:
                worker.pause()
                device.proceed()
        return answer if answer.status is TrialStatus.OK else Measurement(answer.status)

    def close(self) -> None:
        """End them all."""
        for worker in self._workers:
            worker.kill()


def _share(turns: int, processes: int, place: int) -> int:
    """How many of so many turns a process takes; the first have one more where they do not divide.

    >>> [_share(5, 4, place) for place in range(4)], [_share(20, 4, place) for place in range(4)]
    ([2, 1, 1, 1], [5, 5, 5, 5])
    """
    return turns // processes + (place < turns % processes)
