"""One session of a run: what is measured, written to the run folder as it comes."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from tvmlab.compat import DATABASE_FILES, load_meta_schedule
from tvmlab.core import Candidate, Measurement, Measurer, Strategy, TaskInfo, Trial
from tvmlab.environment import tvm_version
from tvmlab.experiment import LayoutTuning, searches_templates
from tvmlab.layout_plan import LayoutPlan
from tvmlab.past_records import EXHAUSTED_FILE, SKETCHES_FILE
from tvmlab.records import MINIMA_FILE, RunFolder, State, TrialWriter, cut_torn_line
from tvmlab.reuse import Reuse
from tvmlab.spaces.template import sizes
from tvmlab.stats import is_faster
from tvmlab.targets import Target
from tvmlab.tasks import Task

__all__ = ["Session", "commit", "estimate_s", "open_database"]

_P_VALUE = 0.05  # where the step has none


class Session:
    """One session of a run: from start or resume until it is done or stopped. Writes the folder.

    `tasks` are those worked on now; `plan` is that of a layout step which is not done yet; `steps_done` counts the
    stages that are finished; `fell_short` says that one of them ended before its budget; `minima` says by step and task
    at which local minimum a descent ended; `planned` has the trials of the steps that know more than their options say.
    `limit_s` is the experiment's time limit, or for a while an earlier one.
    """

    def __init__(
        self,
        folder: RunFolder,
        tasks: Sequence[Task],
        target: Target,
        measurer: Measurer,
        plan: LayoutPlan | None = None,
    ) -> None:
        self.folder = folder
        self.experiment = folder.experiment
        self.tasks = {task.key: task for task in tasks if task.info.tunable}
        self.target = target
        self.measurer = measurer
        self.stop = threading.Event()
        self.database = open_database(folder, target)
        self.search_s = 0.0
        self.plan = plan
        self.reuse = Reuse.of(folder)
        self._exhausted: dict[str, int] = folder.read_json(EXHAUSTED_FILE, missing={})
        self._exhausted_sketches: dict[str, str] = folder.read_json(SKETCHES_FILE, missing={})
        if plan is None:  # else the tasks are variants, whose trials no engine made
            self._take_from_earlier_runs()
        self.phase = "starting"
        self.history: list[Trial] = []
        self._default_s: dict[str, float] = {}
        self._best_s: dict[str, float] = {}
        self._trial_s: dict[str, float] = {}
        self._program_s: dict[tuple[str, str], float] = {}  # by task and program
        for trial in folder.trials():
            self._remember(trial)
        defaults = {trial.task_key: trial.ok for trial in self.history if trial.trial == 0}
        self._failed_before = {key for key, ran in defaults.items() if not ran}
        self._writer = TrialWriter(folder)
        earlier = folder.state
        self.steps_done = earlier.steps_done
        self.minima: dict[str, dict[str, str]] = folder.minima
        self._without_trials: set[str] = set()
        self.fell_short = False
        self.limit_s = folder.experiment.time_limit_s
        self.planned: dict[int, int] = {}
        self._earlier_s = earlier.elapsed_s
        self._earlier_wall_s, self._launched_s = earlier.wall_s, earlier.started_s
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
        return self.stop.is_set() or (self.limit_s is not None and self.elapsed_s >= self.limit_s)

    def estimate_s(self, *, untuned: bool = False) -> float | None:
        """The model estimate in seconds: weight x best kernel latency, summed; None while a task has none."""
        return estimate_s([task.info for task in self.tasks.values()], self._default_s if untuned else self._best_s)

    @property
    def total_trials(self) -> int:
        """The trials that all steps take, as far as it is known now how many tasks each has."""
        tasks, plan = [key for key, task in self.tasks.items() if task.info.weight > 0], self.plan
        total = 0
        for number, step in enumerate(self.experiment.stages):
            if number < self.steps_done or (isinstance(step, LayoutTuning) and plan is None):
                total += sum(map(len, self.trials_of(number).values()))
            elif not isinstance(step, LayoutTuning):
                planned = self.planned.get(number)
                total += self.reuse.plan(number, tasks).total if planned is None else planned
            elif plan is not None:
                total += step.total_trials(len(plan.variants)) + step.transform_trials * len(plan.copies)
        return total

    def take(self, tasks: Sequence[Task]) -> None:
        """Go on with other tasks: those of the model in the layout that was chosen."""
        self.measurer.add(tasks)
        self.tasks = {task.key: task for task in tasks if task.info.tunable}
        self.plan = None
        self._take_from_earlier_runs()

    def _take_from_earlier_runs(self) -> None:
        known = any(map(searches_templates, self.experiment.stages))
        self.reuse.take(self.tasks, sizes(self.tasks.values(), self.target.to_tvm()) if known else {})

    def known_latencies_s(self, keys: Iterable[str]) -> dict[str, float | None]:
        """The best latency of each task so far, its unscheduled kernel's included; None where there is none."""
        return {key: self._best_s.get(key) for key in keys}

    def ended(self, key: str, strategy: Strategy) -> None:
        """Note how the search of a task ended, where its strategy can tell: `ending`, `local_minimum`.

        One that ended without any trial is noted too: its space has nothing to measure. That a template space is
        `exhausted`, or what the sketches give, goes into the folder: no later run needs to find it out again.
        """
        if size := getattr(strategy, "exhausted", 0):
            self._exhausted[key] = size
            self.folder.write_json(EXHAUSTED_FILE, self._exhausted)
        if getattr(strategy, "sketches_exhausted", False):
            self._exhausted_sketches[key] = tvm_version()
            self.folder.write_json(SKETCHES_FILE, self._exhausted_sketches)
        ending = getattr(strategy, "ending", "")
        if not any(trial.task_key == key and trial.trial for trial in self.history):
            self._without_trials.add(key)
            ending = ending or "nothing in its space can be made, it keeps its default schedule"
        if ending:
            print(f"{self.phase}, task {self.tasks[key].info.name}: {ending}", flush=True)
        if getattr(strategy, "local_minimum", False):
            self.minima.setdefault(str(self.steps_done), {})[key] = ending
            self.folder.write_json(MINIMA_FILE, self.minima)

    @property
    def kept_default(self) -> list[str]:
        """The names of the tasks of the model that keep their default schedule because nothing could be tried."""
        tried = {trial.task_key for trial in self.history if trial.trial}
        nothing = self._without_trials | self.reuse.without_trials
        return [self.tasks[key].info.name for key in nothing - tried if key in self.tasks]

    def trial_latency(self, key: str) -> float | None:
        """Latency of a task's best trial in seconds, its unscheduled kernel not counted."""
        return self._trial_s.get(key)

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
            wall_s=self._earlier_wall_s + time.time() - self._launched_s,
            trials=self.trials,
            total_trials=self.total_trials,
            steps_done=self.steps_done,
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
            rival=candidate.rival.key if candidate.rival and measured.rival_latencies_s else "",
            rival_latencies_s=measured.rival_latencies_s,
            reference_s=self._reference_s(candidate) if measured.rival_latencies_s else 0.0,
            shown=self._is_shown(measured, step),
        )
        # On a GPU the default schedule is made by rules, not by a trace, so there is none to offer.
        if trial.ok and not (is_default and self.target.kind == "cuda"):
            module = self.tasks[candidate.task_key].module
            commit(self.database, module, candidate.payload.trace, trial.samples_s, self.target)
        self._writer.append(trial)
        self._remember(trial)
        self.trials = max(self.trials, trial.trial)
        return trial

    def _is_shown(self, measured: Measurement, step: int) -> bool:
        """Whether a measurement shows that a candidate is faster than its rival; True if it was timed alone."""
        p_value = getattr(self.experiment.stages[step], "p_value", _P_VALUE) if step >= 0 else _P_VALUE
        pairs = measured.latencies_s, measured.rival_latencies_s
        return not measured.rival_latencies_s or is_faster(*pairs, p_value)

    def _reference_s(self, candidate: Candidate) -> float:
        """The latency of a candidate's rival on the run's clock, in seconds; 0 if it was never measured."""
        assert candidate.rival is not None
        return self._program_s.get((candidate.task_key, candidate.rival.key), 0.0)

    def _remember(self, trial: Trial) -> None:
        self.history.append(trial)
        latency, key = trial.latency_s, trial.task_key
        if latency is None:
            return
        before = self._program_s.get((key, trial.key), latency)
        # Timed beside a rival it is on the clock of that one, which those timed beside it go on with.
        self._program_s[key, trial.key] = latency if trial.reference_s else before
        if trial.trial == 0:
            self._default_s[key] = latency
        elif before < self._program_s[key, trial.key]:  # measured again: the first reading was luck, if it was the best
            programs = ((program, s) for (task, program), s in self._program_s.items() if task == key)
            self._trial_s[key] = min(s for program, s in programs if program != key)
        else:
            self._trial_s[key] = min(latency, self._trial_s.get(key, latency))
        known = (self._default_s.get(key), self._trial_s.get(key))
        self._best_s[key] = min(s for s in known if s is not None)

    def measure_defaults(self, keys: Iterable[str] | None = None) -> dict[str, float | None]:
        """Latency in seconds of the tasks' unscheduled kernels, measured once a run; None where it failed.

        What failed in an earlier session is measured again: the machine may have been to blame. Without `keys` these
        are all tasks, however long it takes; else the run's time limit ends it.
        """
        known = {trial.task_key: trial.latency_s for trial in self.history if trial.trial == 0}
        asked = self.tasks if keys is None else keys
        missing = [key for key in asked if key not in known or key in self._failed_before]
        self.phase = "measuring the default schedules"
        for key, measured in zip(missing, self.measurer.measure_defaults(missing), strict=True):
            trial = self.record(_default_candidate(self.tasks[key]), measured, -1, "default")
            known[key] = trial.latency_s
            self._failed_before.discard(key)
            if self.stop.is_set() or (keys is not None and self.is_over):
                break
        return known

    def close(self) -> None:
        """Close the files."""
        self._writer.close()


def open_database(folder: RunFolder, target: Target) -> Any:
    """TVM's own database in a run folder, made if there is none. A torn last line is cut off first."""
    meta_schedule = load_meta_schedule(target.kind)
    for name in DATABASE_FILES:
        cut_torn_line(folder.path / name)
    return meta_schedule.database.JSONDatabase(work_dir=str(folder.path))


def commit(database: Any, module: Any, trace: Any, latencies_s: Sequence[float], target: Target) -> None:
    """Append a measured schedule of a task's module to TVM's database, with the median of its repeats.

    TVM ranks records by the mean, which one interrupted repeat decides; all repeats are in the trials.
    """
    meta_schedule = load_meta_schedule()
    record = meta_schedule.database.TuningRecord(
        trace,
        database.commit_workload(module),
        [median(latencies_s)],
        target.to_tvm(),
        meta_schedule.arg_info.ArgInfo.from_prim_func(module["main"]),
    )
    database.commit_tuning_record(record)


def estimate_s(tasks: Sequence[TaskInfo], latencies_s: dict[str, float]) -> float | None:
    """Weight x latency, summed over the tasks of any weight; None if one of them has no latency."""
    counted = [info for info in tasks if info.weight]
    if any(info.key not in latencies_s for info in counted):
        return None
    return sum(info.weight * latencies_s[info.key] for info in counted)


def _default_candidate(task: Task) -> Candidate:
    """The unscheduled kernel as a candidate; its empty trace lets the database offer it against the tuned ones."""
    from tvm.s_tir import Schedule

    return Candidate(task.key, task.key, -1, (), Schedule(task.module))
