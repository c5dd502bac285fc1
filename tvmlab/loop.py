"""The loop: the only file that knows both search and measure. It runs in the search process of a run.

While a batch is built by the workers, the next one is searched for in this process; while a candidate runs on a CPU,
nothing else does. On a GPU further batches are built, and searched for, while one runs, as many as keep the builders
at work. A batch is therefore chosen before those under way are known: on a CPU always by exactly one batch, on a GPU by
as many as their sizes and the number of builders say. So the same seed and the same answers give the same candidates.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from tvmlab.core import Candidate, Measurement, Strategy, Trial
from tvmlab.experiment import Droplet, LayoutTuning, Selective, TransferTuning
from tvmlab.layout_plan import LayoutPlan
from tvmlab.layout_step import adopt
from tvmlab.measure.refine import refine
from tvmlab.rates import building_cores, cores_gain
from tvmlab.reuse import PAST, Plan
from tvmlab.search.allocate import Allocator, fit_batch_size, fit_descent_batches, fit_template_batches
from tvmlab.search.transfer import Transfer
from tvmlab.selective_step import Selection
from tvmlab.session import Session
from tvmlab.strategies import Strategies
from tvmlab.tasks import Task

__all__ = ["run_steps"]

# For each kind of step: the trials a second on two cores of which to expect no more, when only the time is limited,
# and what fits the batches to the trials.
_BATCHES = {
    "ansor": (3, fit_batch_size),
    "autotvm": (5, fit_template_batches),
    "droplet": (2, fit_descent_batches),
    "transfertuning": (3, fit_descent_batches),
}
_CANDIDATES_A_BUILDER = 2  # of a GPU's search: one that is built and one that waits
_DESCENTS_AT_ONCE = 2  # batches of a task: a descent goes on from where the last answers led it
_UNKNOWN_S = 1.0  # of a default kernel that did not run: its task needs a schedule most
_AT_ONCE = 8  # tasks of the first round of transfers that are built together: enough for the builders


def run_steps(session: Session) -> None:
    """Measure the default schedules, then run the experiment's steps in order, those that are done left out."""
    stages = session.experiment.stages
    for number, step in enumerate(stages[session.steps_done :], session.steps_done):
        if isinstance(step, LayoutTuning):
            if session.plan is not None:
                _tune_layout(session, number, step, session.plan)
        else:
            session.measure_defaults()
            if not session.is_over:
                session.phase = f"step {number + 1}: {step.kind}"
                (_tune_selectively if isinstance(step, Selective) else _search)(session, number, step)
            if isinstance(step, TransferTuning) and step.refine and not session.is_over:
                session.phase = f"step {number + 1}: refining in the whole model"
                refine(session.folder, session.target, step.refine, lambda: session.is_over)
        if session.is_over:
            return
        session.steps_done = number + 1


def _tune_layout(session: Session, number: int, step: LayoutTuning, plan: LayoutPlan) -> None:
    """Measure what can be chosen, and choose; a stop leaves that to the next session."""
    session.measure_defaults(session.tasks)
    session.phase = f"step {number + 1}: {step.kind}"
    for tasks, most in ((plan.variants, step.trials_per_variant), (plan.copies, step.transform_trials)):
        if tasks and not session.is_over:
            _search(session, number, step, tasks, most)
    if not session.stop.is_set():
        session.phase = "choosing the layouts"
        adopt(session, plan)
        session.measure_defaults()


def _tune_selectively(session: Session, number: int, step: Selective) -> None:
    """Search the representatives, try their schedules on the others, and search those that they serve poorly."""
    selection = Selection(session, number, step)
    phase = session.phase
    with selection.leaving_time():
        if search := selection.search(selection.representatives):
            _search(session, number, search, selection.representatives)
    if not session.is_over and (sharing := selection.sharing()):
        session.phase = f"{phase}, sharing schedules"
        strategies = {task.key: selection.shared(task) for task in selection.others}
        _search(session, number, sharing, selection.others, strategies=strategies)
    if not session.is_over and (poor := selection.poor()) and (search := selection.search(poor)):
        session.phase = f"{phase}, searching what schedules served poorly"
        _search(session, number, search, poor)


def _search(
    session: Session,
    number: int,
    step: Any,
    only: Sequence[Task] | None = None,
    most: int | None = None,
    strategies: dict[str, Strategy] | None = None,
) -> None:
    """Search all tasks, or `only` these, with the step's strategies, until its budget or their spaces are used up.

    `most` is how many trials each may get, if not what the step says; `strategies` are others than the step's own.
    """
    tasks = list(session.tasks.values()) if only is None else only
    keys = [task.key for task in tasks]
    earlier = {key: trials for key, trials in session.trials_of(number).items() if key in keys}
    if not isinstance(step, TransferTuning):  # what a poor task was lent is no part of its own search
        earlier = {key: [t for t in trials if t.strategy != Transfer.name] for key, trials in earlier.items()}
    plan = _plan(session, number, step, keys) if most is None else Plan(most * len(keys), dict.fromkeys(keys, most))
    left = plan.total - sum(map(len, earlier.values()))
    sizes = _batch_sizes(session, step, plan.total, len(tasks))
    allocator = Allocator(
        [task.info for task in tasks],
        session.known_latencies_s(keys),
        session.target.roofline,
        step.patience(len(tasks)),
        plan.limits,
    )
    for key, (before, since) in plan.begun.items():
        allocator.begun(key, before, since)
    for key, trials in earlier.items():
        _note(allocator, key, trials)
    if strategies is None:
        strategies = own = Strategies(session, number, step)
        if plan.begun and left > 0:
            left -= _measure_again(session, allocator, number, own, keys, left)
    if isinstance(step, TransferTuning):
        left -= _first_round(session, allocator, number, strategies, [key for key in keys if key not in earlier], left)
    at_once = _DESCENTS_AT_ONCE if isinstance(step, Droplet) else None
    stage = _Stage(session, number, allocator, strategies, sizes, left, at_once)
    (_pipelined if session.measurer.overlaps else _in_turns)(stage)
    session.fell_short |= stage.left > 0


def _in_turns(stage: _Stage) -> None:
    """A CPU's way: the next batch is searched while this one is built, and built when this one has run."""
    session = stage.session
    under_way: _Batch | None = None
    while True:
        following = None if session.is_over else stage.search([under_way.key] if under_way else [])
        trials = stage.record(under_way) if under_way else []
        finished, under_way = under_way, None
        if following is not None and not session.is_over:
            under_way = stage.begin(*following)
        if finished:  # told while the next batch is being built
            stage.tell(finished, trials)
        if finished is None and under_way is None:  # what was told last may have been what a strategy waited for
            return


def _pipelined(stage: _Stage) -> None:
    """A GPU's way: batches are built, and run as they are built, while others are searched.

    Behind the batch that runs are as many as give each builder a candidate beside the one that it is at, so that
    neither builders nor the device wait for the search.
    """
    session, under_way = stage.session, deque[_Batch]()
    enough = _CANDIDATES_A_BUILDER * building_cores(session.experiment.measure)
    try:
        while True:
            while not session.is_over and sum(len(batch.candidates) for batch in islice(under_way, 1, None)) < enough:
                following = stage.search([batch.key for batch in under_way])
                if following is None:
                    break
                under_way.append(stage.begin(*following))
            if not under_way or session.is_over:
                return
            oldest = under_way.popleft()
            stage.tell(oldest, stage.record(oldest))
    finally:
        for batch in under_way:  # its time is over: what is under way is no trial
            stage.left += len(batch.candidates)
            batch.measurements.close()


def _plan(session: Session, number: int, step: Any, keys: Sequence[str]) -> Plan:
    """What a stage measures of some tasks; a search within a Selective step knows nothing of earlier runs."""
    is_stage = step is session.experiment.stages[number]
    return session.reuse.plan(number, keys) if is_stage else Plan.afresh(step, keys)


def _measure_again(
    session: Session, allocator: Allocator, number: int, strategies: Strategies, keys: Sequence[str], left: int
) -> int:
    """Measure the best schedule that earlier runs have of each task, as its first trial here; returns how many.

    A latency of another day is no result of this run.
    """
    known = (candidate for key in keys if (candidate := strategies.again(key)) is not None)
    found = list(islice(known, left))  # not every task needs to have one
    return _measure_each(session, allocator, number, found, PAST)


def _first_round(
    session: Session,
    allocator: Allocator,
    number: int,
    strategies: dict[str, Strategy],
    keys: Sequence[str],
    left: int,
) -> int:
    """Try the nearest schedule of each task before the second one of any, the costliest tasks first; how many trials.

    One schedule brings most of what a transfer brings, and the time may end before each task had a batch of its own.
    """
    known = session.known_latencies_s(keys)
    costs = {key: session.tasks[key].info.weight * (known[key] or _UNKNOWN_S) for key in keys}
    waiting, done = sorted(keys, key=lambda key: -costs[key])[: max(left, 0)], 0
    while waiting and not session.is_over:
        started = time.perf_counter()
        found = [candidate for key in waiting[:_AT_ONCE] for candidate in strategies[key].ask(1)]
        session.search_s += time.perf_counter() - started
        del waiting[:_AT_ONCE]
        done += _measure_each(session, allocator, number, found, Transfer.name)
    return done


def _measure_each(
    session: Session, allocator: Allocator, number: int, candidates: Sequence[Candidate], strategy: str
) -> int:
    """Measure candidates of several tasks; returns how many, which is not all if the time is over."""
    with closing(session.measurer.measure(candidates)) as measurements:
        for done, (candidate, measured) in enumerate(zip(candidates, measurements, strict=True), start=1):
            trial = session.record(candidate, measured, number, strategy)
            _note(allocator, trial.task_key, [trial])
            if session.is_over:
                return done
    return len(candidates)


def _note(allocator: Allocator, key: str, trials: Sequence[Trial]) -> None:
    """Tell the allocator of a task's trials."""
    for trial in trials:
        if trial.strategy == PAST:
            allocator.again(key, trial.latency_s)
    if new := [trial.latency_s for trial in trials if trial.strategy != PAST]:
        allocator.record(key, new)


def _batch_sizes(session: Session, step: Any, total: int, tasks: int) -> tuple[int, int]:
    """The first batch of a task and a later one: as asked, or to fit the trials that budget and time allow."""
    if step.batch_size:
        return step.batch_size, step.batch_size
    limit_s = session.experiment.time_limit_s
    trials_per_s, fit = _BATCHES[step.kind]
    if limit_s is not None:
        total = min(total, int(limit_s * trials_per_s * cores_gain(building_cores(session.experiment.measure))))
    return fit(total, tasks)


@dataclass(frozen=True)
class _Batch:
    """Candidates of one task on their way through the measurer."""

    strategy: Strategy
    key: str
    candidates: list[Candidate]
    measurements: Generator[Measurement]


@dataclass
class _Stage:
    """One search of some tasks: who gives candidates, who says whose turn it is, and how many trials are left."""

    session: Session
    number: int
    allocator: Allocator
    strategies: dict[str, Strategy]
    sizes: tuple[int, int]  # of a task's first batch and of a later one
    left: int
    at_once: int | None = None  # batches of one task that may be under way (None: any number)

    def search(self, busy: Sequence[str]) -> tuple[str, list[Candidate]] | None:
        """The task to work on next and its candidates; None when the budget is used up, or no strategy has any now.

        `busy` has the task of each batch under way. A strategy with nothing to give is done with its task, unless that
        is one of them: it may go on when it has been told.
        """
        with self._searching():
            waiting = {key for key in busy if self.at_once and busy.count(key) >= self.at_once}
            while self.left > 0 and (key := self.allocator.next_task(waiting)) is not None:
                size = self.sizes[0 if self.allocator.is_fresh(key) else 1]
                candidates = self.strategies[key].ask(int(min(size, self.left, self.allocator.room(key))))
                if candidates:
                    self.allocator.begin(key, len(candidates))
                    return key, candidates
                if key in busy:
                    waiting.add(key)
                else:
                    self.allocator.finish(key)
                    self.session.ended(key, self.strategies[key])
            return None

    def begin(self, key: str, candidates: list[Candidate]) -> _Batch:
        """Give a batch to the measurer, which begins to build it."""
        self.left -= len(candidates)
        return _Batch(self.strategies[key], key, candidates, self.session.measurer.measure(candidates))

    def record(self, batch: _Batch) -> list[Trial]:
        """Record a batch's measurements as they come; a stop leaves the rest unmeasured."""
        trials: list[Trial] = []
        with closing(batch.measurements):
            for candidate, measured in zip(batch.candidates, batch.measurements, strict=False):
                trials.append(self.session.record(candidate, measured, self.number, batch.strategy.name))
                if self.session.is_over:
                    break
        self.allocator.record(batch.key, [trial.latency_s for trial in trials])
        return trials

    def tell(self, batch: _Batch, trials: list[Trial]) -> None:
        """Tell a batch's strategy how its candidates did."""
        with self._searching():
            batch.strategy.tell(batch.candidates[: len(trials)], trials)

    @contextmanager
    def _searching(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.session.search_s += time.perf_counter() - started
