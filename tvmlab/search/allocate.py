"""Which task gets the next batch of trials.

The gradient task scheduler of Ansor (Zheng et al., OSDI 2020, section 6.2 and appendix A): the next batch goes to the
task where the model estimate is expected to fall most. Differences: Ansor begins with a round over all tasks, here a
task without trials competes with what its unscheduled kernel costs, because a small budget may not reach every task;
and no task is expected to beat the roofline.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from tvmlab.core import IMPROVED, Roofline, TaskInfo

__all__ = ["Allocator", "fit_batch_size", "fit_descent_batches", "fit_template_batches"]

_ALPHA = 0.2  # weight of the past slope against the expected one (Ansor appendix A)
_BETA = 2.0  # a task may become this much faster than the best of its class, per FLOP (Ansor appendix A)
_WINDOW = 3  # batches over which the past slope is taken


def fit_batch_size(total_trials: int, tasks: int) -> tuple[int, int]:
    """Trials in a batch of a task without results and in a later one, so that a small budget comes back to each.

    Without results a batch can only be random, so it takes up to an eighth of an even share (2 to 16); a later
    one, which the cost models guide, up to a fifth (8 to 64).

    >>> fit_batch_size(256, 13), fit_batch_size(20_000, 26)
    ((2, 8), (16, 64))
    """
    share = total_trials // max(tasks, 1)
    return max(2, min(16, share // 8)), max(8, min(64, share // 5 // 8 * 8))


def fit_template_batches(total_trials: int, tasks: int) -> tuple[int, int]:
    """The same for template spaces, whose first batch is the points that the template names: 8 to 16 of them.

    A later batch is an eighth of an even share, 8 to 32: models of a few knobs learn from little, and often.

    >>> fit_template_batches(256, 13), fit_template_batches(20_000, 26)
    ((8, 8), (16, 32))
    """
    share = total_trials // max(tasks, 1)
    return max(8, min(16, share // 4)), max(8, min(32, share // 8 // 8 * 8))


def fit_descent_batches(total_trials: int, tasks: int) -> tuple[int, int]:
    """The same for a descent, which may move after each batch: an eighth of an even share, 4 to 16 neighbours.

    >>> fit_descent_batches(256, 13), fit_descent_batches(2000, 20)
    ((4, 4), (12, 12))
    """
    size = max(4, min(16, total_trials // max(tasks, 1) // 8))
    return size, size


@dataclass
class _Progress:
    info: TaskInfo
    known_s: float | None
    best_s: float | None = None
    trials: int = 0
    before: int = 0  # trials, in earlier runs
    in_flight: int = 0
    since_improvement: int = 0
    history: list[tuple[int, float]] = field(default_factory=list)  # (trials, best latency) after each batch
    finished: bool = False


class Allocator:
    """Keeps the score of every task and names the next one.

    `known_latencies_s` are the best latencies so far, which are those of the unscheduled kernels in a first step (None:
    it did not run). `early_stopping` is the number of trials without an improvement after which a task is finished,
    `limits` the most trials that a task may get (none is named: no limit).
    """

    def __init__(
        self,
        tasks: Sequence[TaskInfo],
        known_latencies_s: Mapping[str, float | None],
        roofline: Roofline | None,
        early_stopping: float,
        limits: Mapping[str, int] | None = None,
    ) -> None:
        self._tasks = {info.key: _Progress(info, known_latencies_s.get(info.key)) for info in tasks}
        self._roofline = roofline
        self._early_stopping = early_stopping
        self._limits = limits or {}

    def next_task(self, waiting: Collection[str] = ()) -> str | None:
        """Key of the task for the next batch; None when every task is finished, has had its share, or is `waiting`."""
        open_tasks = [
            task for key, task in self._tasks.items() if not task.finished and self.room(key) > 0 and key not in waiting
        ]
        if not open_tasks:
            return None
        # max() keeps the first of equals, so the order of the tasks decides ties the same way in every run.
        return max(open_tasks, key=self._expected_gain).info.key

    def is_fresh(self, key: str) -> bool:
        """Whether no trial of this task has ended."""
        return self._tasks[key].before + self._tasks[key].trials == 0

    def room(self, key: str) -> float:
        """How many more trials this task may get, those under way counted; infinity without a limit."""
        task = self._tasks[key]
        return self._limits.get(key, math.inf) - task.trials - task.in_flight

    def begun(self, key: str, trials: int, since_improvement: int) -> None:
        """Earlier runs had so many trials of this task, which no limit counts; the last of them brought nothing."""
        task = self._tasks[key]
        task.before = trials
        task.since_improvement += since_improvement
        task.finished |= task.since_improvement >= self._early_stopping

    def again(self, key: str, latency_s: float | None) -> None:
        """The best schedule of earlier runs was measured again: what a trial has to beat, and no improvement itself."""
        task = self._tasks[key]
        task.trials += 1
        if latency_s is not None:
            task.best_s = min(latency_s, task.best_s or latency_s)
            task.history.append((task.trials, task.best_s))

    def begin(self, key: str, trials: int) -> None:
        """So many trials of this task are under way; the next choice counts them as spent."""
        self._tasks[key].in_flight += trials

    def record(self, key: str, latencies_s: Sequence[float | None]) -> None:
        """Trials of this task that ended; a failed one has latency None."""
        task = self._tasks[key]
        task.in_flight = max(0, task.in_flight - len(latencies_s))
        for latency in latencies_s:
            task.trials += 1
            if latency is not None and (task.best_s is None or latency < task.best_s):
                improved = task.best_s is None or latency < task.best_s * IMPROVED
                task.best_s = latency
                task.since_improvement = 0 if improved else task.since_improvement + 1
            else:
                task.since_improvement += 1
        if task.best_s is not None:
            task.history.append((task.trials, task.best_s))
        if task.since_improvement >= self._early_stopping:
            task.finished = True

    def finish(self, key: str) -> None:
        """The task's space is exhausted."""
        self._tasks[key].finished = True

    def _expected_gain(self, task: _Progress) -> float:
        """Seconds by which the model estimate may fall with each further trial.

        A task without a trial stands to lose most of its latency so far, so it comes early if that is large, and
        late, or never, if it is not.
        """
        current = self._current_s(task)
        # Ansor takes min(current / trials, current - reachable), a rate against a time; this is one rate.
        hope = max(current - self._reachable_s(task), 0.0) / max(task.before + task.trials + task.in_flight, 1)
        return task.info.weight * (_ALPHA * self._past_slope(task) + (1 - _ALPHA) * hope)

    def _current_s(self, task: _Progress) -> float:
        known = [latency for latency in (task.best_s, task.known_s) if latency is not None]
        # Without any latency (the unscheduled kernel failed too) the task counts as running at 1 GFLOP/s and 1 GB/s.
        return min(known) if known else (task.info.flops + task.info.bytes_moved) * 1e-9

    def _past_slope(self, task: _Progress) -> float:
        if len(task.history) < 2:
            return 0.0
        trials_then, best_then = task.history[max(0, len(task.history) - 1 - _WINDOW)]
        trials_now, best_now = task.history[-1]
        return (best_then - best_now) / (trials_now - trials_then)

    def _reachable_s(self, task: _Progress) -> float:
        """The latency the task could come down to, going by its class and by the roofline."""
        rates = [
            other.info.flops / other.best_s
            for other in self._tasks.values()
            if other.best_s and other.info.kernel_class == task.info.kernel_class
        ]
        by_class = task.info.flops / (_BETA * max(rates)) if rates and task.info.flops else 0.0
        limit = self._roofline.latency_s(task.info.flops, task.info.bytes_moved) if self._roofline else 0.0
        return max(by_class, limit)
