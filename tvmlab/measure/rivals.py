"""The builds of the rivals that candidates are timed in turns with: kept while candidates go on naming them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future

from tvmlab.core import Candidate
from tvmlab.measure.builder import Build, discard

__all__ = ["RivalBuilds"]

_KEPT = 32  # tasks whose rival's build is kept: a search goes from task to task and comes back


class RivalBuilds:
    """The builds of the rivals that the candidates of a task named last (`a_task` of them), for the last 32 tasks.

    `build` starts the build of a candidate's program; its future gives a Build. Two threads may ask: on a GPU one runs
    candidates while the other submits more, whose rival may be another already.
    """

    def __init__(self, build: Callable[[Candidate], Future[Build]], a_task: int = 1) -> None:
        self._build = build
        self._a_task = a_task
        self._kept: OrderedDict[tuple[str, str], Future[Build]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, rival: Candidate) -> Future[Build]:
        """The rival's build, started now unless it is kept; one that is kept no longer is deleted."""
        key = rival.task_key, rival.key
        with self._lock:
            if key not in self._kept:
                self._kept[key] = self._build(rival)
            self._kept.move_to_end(key)
            for old in [other for other in self._kept if other[0] == rival.task_key][: -self._a_task]:
                self._drop(old)
            while len({task for task, _ in self._kept}) > _KEPT:
                self._drop(next(iter(self._kept)))
            return self._kept[key]

    def _drop(self, key: tuple[str, str]) -> None:
        discard(self._kept.pop(key))
