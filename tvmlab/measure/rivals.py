"""The builds of the rivals that candidates are timed in turns with: kept while candidates go on naming them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future

from tvmlab.core import Candidate
from tvmlab.measure.builder import Build, remove_build

__all__ = ["RivalBuilds"]

_KEPT = 32  # tasks whose rival's build is kept: a search goes from task to task and comes back


class RivalBuilds:
    """One build a task, of the rival that its candidates named last, for the last 32 tasks.

    `build` starts the build of a candidate's program; its future gives a Build. Two threads may ask: on a GPU one
    runs candidates while the other submits more.
    """

    def __init__(self, build: Callable[[Candidate], Future[Build]]) -> None:
        self._build = build
        self._kept: OrderedDict[str, tuple[str, Future[Build]]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, rival: Candidate) -> Future[Build]:
        """The rival's build, started now unless it is kept; the one that it replaces is deleted."""
        with self._lock:
            kept = self._kept.get(rival.task_key)
            if kept is None or kept[0] != rival.key:
                self._drop(rival.task_key)
                self._kept[rival.task_key] = rival.key, self._build(rival)
            self._kept.move_to_end(rival.task_key)
            while len(self._kept) > _KEPT:
                self._drop(next(iter(self._kept)))
            return self._kept[rival.task_key][1]

    def _drop(self, task_key: str) -> None:
        dropped = self._kept.pop(task_key, None)
        if dropped is not None:
            dropped[1].add_done_callback(_remove)


def _remove(build: Future[Build]) -> None:
    if not build.cancelled():
        remove_build(build.result().path)
