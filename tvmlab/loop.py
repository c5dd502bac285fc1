"""The loop: the only file that knows both search and measure. It runs in the search process of a run.

While a batch is built by the workers, the next one is searched for in this process; while a candidate runs on a CPU,
nothing else does. A batch is therefore chosen before the one under way is known, always by exactly one batch, so the
same seed and the same answers give the same candidates.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from tvmlab.compat import DATABASE_FILES, load_meta_schedule, read_database
from tvmlab.core import Candidate, InputError, Measurement, Measurer, TaskInfo, Trial
from tvmlab.experiment import Ansor
from tvmlab.records import RunFolder, State, TrialWriter, cut_torn_line
from tvmlab.search.allocate import Allocator, fit_batch_size
from tvmlab.search.costmodel import CostModel
from tvmlab.search.evolution import Evolution
from tvmlab.spaces.sketch import SketchSpace
from tvmlab.targets import Target
from tvmlab.tasks import Task

__all__ = ["Session", "open_database", "run_steps", "warm_records"]

_TRIALS_PER_S = 3  # of which to expect no more, when only the time is limited (docs/benchmarks.md)
_RECORDS = 64  # earlier schedules of a task that a search starts from


class Session:
    """One session of a run: from start or resume until it is done or stopped. Writes the folder."""

    def __init__(self, folder: RunFolder, tasks: Sequence[Task], target: Target, measurer: Measurer) -> None:
        self.folder = folder
        self.experiment = folder.experiment
        self.tasks = {task.key: task for task in tasks if task.info.tunable}
        self.target = target
        self.measurer = measurer
        self.stop = threading.Event()
        self.database = open_database(folder, target)
        self.search_s = 0.0
        self.total_trials = sum(step.total_trials(len(self.tasks)) for step in self.experiment.steps)
        self.phase = "starting"
        self.history: list[Trial] = []
        self._default_s: dict[str, float] = {}
        self._best_s: dict[str, float] = {}
        for trial in folder.trials():
            self._remember(trial)
        self._writer = TrialWriter(folder)
        earlier = folder.state
        self._earlier_s = earlier.elapsed_s
        self._earlier_phases = earlier.phases
        self._started = time.monotonic()
        self.trials = max((trial.trial for trial in self.history), default=0)

    @property
    def elapsed_s(self) -> float:
        """Tuning time of the run over all its sessions, seconds."""
        return self._earlier_s + time.monotonic() - self._started

    @property
    def is_over(self) -> bool:
        """Whether the run was stopped or its time is up."""
        limit = self.experiment.time_limit_s
        return self.stop.is_set() or (limit is not None and self.elapsed_s >= limit)

    def estimate_s(self, *, untuned: bool = False) -> float | None:
        """The model estimate in seconds: weight x best kernel latency, summed; None while a task has none."""
        return estimate_s([task.info for task in self.tasks.values()], self._default_s if untuned else self._best_s)

    def state(self, status: str, message: str = "") -> State:
        """What state.json should say now."""
        phases = {
            "search_s": self.search_s,
            "build_wait_s": self.measurer.build_wait_s,
            "run_s": self.measurer.run_s,
        }
        return State(
            status=status,
            heartbeat_s=time.time(),
            elapsed_s=self.elapsed_s,
            trials=self.trials,
            total_trials=self.total_trials,
            phase=self.phase,
            estimate_s=self.estimate_s(),
            untuned_s=self.estimate_s(untuned=True),
            phases={name: seconds + self._earlier_phases.get(name, 0.0) for name, seconds in phases.items()},
            message=message,
        )

    def trials_of(self, step: int) -> dict[str, list[Trial]]:
        """The trials of a step so far, by task."""
        found: dict[str, list[Trial]] = defaultdict(list)
        for trial in self.history:
            if trial.step == step and trial.trial > 0:
                found[trial.task_key].append(trial)
        return found

    def record(self, candidate: Candidate, measured: Measurement, step: int, strategy: str) -> Trial:
        """Append a trial to the folder, and to the database if it ran."""
        is_default = strategy == "default"
        trial = Trial(
            task_key=candidate.task_key,
            step=step,
            strategy=strategy,
            trial=0 if is_default else self.trials + 1,
            key=candidate.key,
            sketch=candidate.sketch,
            decisions=candidate.decisions,
            status=measured.status,
            latencies_s=measured.latencies_s,
            build_s=round(measured.build_s, 4),
            run_s=round(measured.run_s, 4),
            elapsed_s=round(self.elapsed_s, 3),
            time_s=round(time.time(), 3),
            message=measured.message,
        )
        # On a GPU the default schedule is made by rules, not by a trace, so there is none to offer.
        if trial.ok and not (is_default and self.target.kind == "cuda"):
            self._commit(candidate, trial)
        self._writer.append(trial)
        self._remember(trial)
        self.trials = max(self.trials, trial.trial)
        return trial

    def _remember(self, trial: Trial) -> None:
        self.history.append(trial)
        latency = trial.latency_s
        if latency is not None:
            if trial.trial == 0:
                self._default_s[trial.task_key] = latency
            self._best_s[trial.task_key] = min(latency, self._best_s.get(trial.task_key, latency))

    def _commit(self, candidate: Candidate, trial: Trial) -> None:
        meta_schedule = load_meta_schedule()
        module = self.tasks[candidate.task_key].module
        self.database.commit_tuning_record(
            meta_schedule.database.TuningRecord(
                candidate.payload.trace,
                self.database.commit_workload(module),
                list(trial.latencies_s),
                self.target.to_tvm(),
                meta_schedule.arg_info.ArgInfo.from_prim_func(module["main"]),
            )
        )

    def measure_defaults(self) -> dict[str, float | None]:
        """Latency in seconds of every task's unscheduled kernel, measured once a run; None where it failed."""
        known = {trial.task_key: trial.latency_s for trial in self.history if trial.trial == 0}
        missing = [key for key in self.tasks if key not in known]
        self.phase = "measuring the default schedules"
        for key, measured in zip(missing, self.measurer.measure_defaults(missing), strict=True):
            trial = self.record(_default_candidate(self.tasks[key]), measured, -1, "default")
            known[key] = trial.latency_s
            if self.stop.is_set():
                break
        return known

    def close(self) -> None:
        """Close the files."""
        self._writer.close()


def run_steps(session: Session) -> None:
    """Measure the default schedules, then run the experiment's steps in order."""
    defaults = session.measure_defaults()
    for number, step in enumerate(session.experiment.steps):
        if session.is_over:
            return
        session.phase = f"step {number + 1}: {step.kind}"
        _run_ansor(session, number, step, defaults)


def _run_ansor(session: Session, number: int, step: Ansor, defaults: dict[str, float | None]) -> None:
    earlier = session.trials_of(number)
    total = step.total_trials(len(session.tasks))
    left = total - sum(map(len, earlier.values()))
    sizes = (step.batch_size, step.batch_size) if step.batch_size else _fit_batches(session, total)
    allocator = Allocator(
        [task.info for task in session.tasks.values()],
        defaults,
        session.target.roofline,
        step.early_stopping_threshold,
    )
    for key, trials in earlier.items():
        allocator.record(key, [trial.latency_s for trial in trials])
    strategies = _Strategies(session, step, earlier)
    under_way: _Batch | None = None
    while True:
        started = time.perf_counter()
        following = None if session.is_over else _next_batch(allocator, strategies, sizes, left)
        session.search_s += time.perf_counter() - started
        trials = _measure_batch(session, allocator, number, under_way) if under_way else []
        finished, under_way = under_way, None
        if following is not None and not session.is_over:
            key, candidates = following
            left -= len(candidates)
            under_way = _Batch(strategies[key], key, candidates, session.measurer.measure(candidates))
        if finished:  # told while the next batch is being built
            started = time.perf_counter()
            finished.strategy.tell(finished.candidates[: len(trials)], trials)
            session.search_s += time.perf_counter() - started
        if under_way is None:
            return


def _fit_batches(session: Session, total: int) -> tuple[int, int]:
    """Batch sizes for the trials that the step's budget and the run's time allow."""
    limit_s = session.experiment.time_limit_s
    expected = total if limit_s is None else min(total, int(limit_s * _TRIALS_PER_S))
    return fit_batch_size(expected, len(session.tasks))


@dataclass(frozen=True)
class _Batch:
    """Candidates of one task on their way through the measurer."""

    strategy: Evolution
    key: str
    candidates: list[Candidate]
    measurements: Generator[Measurement]


def _next_batch(
    allocator: Allocator, strategies: _Strategies, sizes: tuple[int, int], left: int
) -> tuple[str, list[Candidate]] | None:
    """The task to work on next and its candidates; None when the budget or every space is used up."""
    first, later = sizes
    while left > 0 and (key := allocator.next_task()) is not None:
        candidates = strategies[key].ask(min(first if allocator.is_fresh(key) else later, left))
        if candidates:
            allocator.begin(key, len(candidates))
            return key, candidates
        allocator.finish(key)
    return None


def _measure_batch(session: Session, allocator: Allocator, step: int, batch: _Batch) -> list[Trial]:
    """Record a batch's measurements as they come; a stop leaves the rest unmeasured."""
    trials: list[Trial] = []
    with closing(batch.measurements):
        for candidate, measured in zip(batch.candidates, batch.measurements, strict=False):
            trials.append(session.record(candidate, measured, step, batch.strategy.name))
            if session.is_over:
                break
    allocator.record(batch.key, [trial.latency_s for trial in trials])
    return trials


class _Strategies(dict[str, Evolution]):
    """One strategy a task, made when the task is first chosen, started from what is known of it."""

    def __init__(self, session: Session, step: Ansor, earlier: dict[str, list[Trial]]) -> None:
        super().__init__()
        self._session = session
        self._step = step
        self._earlier = earlier
        self._cost_model = CostModel(session.experiment.seed)
        self._sources = [session.database, *(_foreign_database(session, run) for run in step.warm_start)]

    def __missing__(self, key: str) -> Evolution:
        session = self._session
        task = session.tasks[key]
        records = [record for source in self._sources for record in warm_records(source, task)]
        self[key] = Evolution(
            SketchSpace(task.key, task.module, session.target.to_tvm()),
            seed=session.experiment.seed,
            population=self._step.population,
            generations=self._step.generations,
            cost_model=self._cost_model,
            known=[trial.key for trial in self._earlier.get(key, ())],
            records=sorted(records, key=lambda record: record[1])[:_RECORDS],
        )
        return self[key]


def warm_records(database: Any, task: Task) -> list[tuple[Any, float]]:
    """The fastest measured schedules of a task in a TVM database: traces and latencies in seconds."""
    if not database.has_workload(task.module):
        return []
    found = database.get_top_k(database.commit_workload(task.module), _RECORDS)
    return [
        (record.trace, sorted(map(float, record.run_secs))[len(record.run_secs) // 2])
        for record in found
        if record.run_secs and len(record.trace.insts) > 0
    ]


def open_database(folder: RunFolder, target: Target) -> Any:
    """TVM's own database in a run folder, made if there is none. A torn last line is cut off first."""
    meta_schedule = load_meta_schedule(target.kind)
    for name in DATABASE_FILES:
        cut_torn_line(folder.path / name)
    return meta_schedule.database.JSONDatabase(work_dir=str(folder.path))


def _foreign_database(session: Session, run: str) -> Any:
    """The database of an earlier run to start from. Raises InputError if it was made for another target."""
    other = RunFolder.open(run, session.folder.path.parent)
    made_for = other.environment.get("target", {}).get("attrs")
    if made_for != session.target.attrs:
        raise InputError(
            f"run {other.id} was tuned for {made_for}, this one is for {session.target.attrs}",
            remedy="leave it out of warm_start: records of another target mislead the search",
        )
    return read_database(other.path, session.target.kind)


def estimate_s(tasks: Sequence[TaskInfo], latencies_s: dict[str, float]) -> float | None:
    """Weight x latency, summed over the tasks; None if one has no latency."""
    if any(info.key not in latencies_s for info in tasks):
        return None
    return sum(info.weight * latencies_s[info.key] for info in tasks)


def _default_candidate(task: Task) -> Candidate:
    """The unscheduled kernel as a candidate; its empty trace lets the database offer it against the tuned ones."""
    from tvm.s_tir import Schedule

    return Candidate(task.key, task.key, -1, (), Schedule(task.module))
