"""Refinement in the whole model: is a kernel's second-best schedule the better one where the model runs it?

A kernel that is fastest alone, with warm caches, need not be so in its place in the model. The model is compiled with
one schedule swapped and timed in turns with the unswapped one, and a swap stays if it wins.

refine.json in the run folder has `set_aside`, the lines of TVM's database that lost in the model, or against a default
schedule, and are not used to compile it any more (`tvmlab.compat.read_database`), and `swaps`, a row for each that was
tried.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import orjson

from tvmlab.compat import DATABASE_FILES, REFINE_FILE, latest_records, load_meta_schedule, structural_key
from tvmlab.core import TaskInfo
from tvmlab.measure.process import WorkerProcess
from tvmlab.measure.subjects import TURN_S, ask, load, start_worker, thread_count
from tvmlab.records import RunFolder
from tvmlab.stats import faster, paired_difference
from tvmlab.targets import Target

__all__ = ["Swap", "refine", "set_slow_aside", "swaps_of"]

_CLOSE = 1.1  # a schedule up to so many times slower alone may be the faster one in the model
_TURNS = 20
_P_VALUE = 0.05
_COPIED = ("experiment.json", "environment.json", "assignment.json", "state.json", *DATABASE_FILES)


@dataclass(frozen=True)
class Swap:
    """A task whose second-best schedule is close: the line of the best one in the database, and its latency alone.

    `ratio` is the second's latency over the best one's.
    """

    task: TaskInfo
    line: int
    best_s: float
    ratio: float


def refine(folder: RunFolder, target: Target, most: int, is_over: Callable[[], bool]) -> None:
    """Try up to `most` swaps, those of the greatest share of the model first, and note what won in refine.json.

    Tasks that were tried before are left out. Ends early when `is_over`. Raises RunError if the model cannot be timed.
    """
    noted = folder.read_json(REFINE_FILE, missing={"set_aside": [], "swaps": []})
    tried = {row["task_key"] for row in noted["swaps"]}
    swaps = [swap for swap in swaps_of(folder, target, noted["set_aside"]) if swap.task.key not in tried]
    workers: list[WorkerProcess] = []
    try:
        for swap in swaps[: max(0, most - len(tried))]:
            if is_over():
                return
            if not workers:
                workers.append(_load(folder, target, noted["set_aside"]))
            workers.append(_load(folder, target, [*noted["set_aside"], swap.line]))
            row = _row(swap, *_take_turns(*workers), tests=most)
            workers.pop(0 if row["kept"] else 1).kill()
            noted = {
                "set_aside": [*noted["set_aside"], *([swap.line] if row["kept"] else [])],
                "swaps": [*noted["swaps"], row],
            }
            folder.write_json(REFINE_FILE, noted)
    finally:
        for worker in workers:
            worker.kill()


def set_slow_aside(folder: RunFolder, target: Target) -> None:
    """Set aside what is slower than a task's default schedule, on a target where that is in no database: a GPU.

    There the default schedule is made by rules when the model is compiled, and any record would take its place.
    """
    default_s = {trial.task_key: trial.latency_s for trial in folder.trials() if trial.trial == 0}
    noted = folder.read_json(REFINE_FILE, missing={"set_aside": [], "swaps": []})
    slow = [
        line
        for key, found in _lines_of(folder, target, set(noted["set_aside"])).items()
        for latency_s, line in found
        if latency_s > (default_s.get(key) or math.inf)
    ]
    if slow:
        folder.write_json(REFINE_FILE, {**noted, "set_aside": [*noted["set_aside"], *slow]})


def swaps_of(folder: RunFolder, target: Target, set_aside: Sequence[int]) -> list[Swap]:
    """The swaps worth trying, those of the greatest share of the model estimate first."""
    lines = _lines_of(folder, target, set(set_aside))
    found = []
    for info in folder.tasks:
        ranked = sorted(lines.get(info.key, []))
        if info.weight and len(ranked) > 1 and ranked[1][0] <= _CLOSE * ranked[0][0]:
            (best_s, line), (second_s, _) = ranked[:2]
            found.append(Swap(info, line, best_s, second_s / best_s))
    return sorted(found, key=lambda swap: -swap.task.weight * swap.best_s)


def _lines_of(folder: RunFolder, target: Target, set_aside: set[int]) -> dict[str, list[tuple[float, int]]]:
    """Latency in seconds and line number of each schedule in the run's database, by the task's key."""
    workload = load_meta_schedule(target.kind).database.Workload
    modules, records = (list(_whole_lines(folder.path / name)) for name in DATABASE_FILES)
    keys = [structural_key(workload.from_json(orjson.loads(module)).mod) for module in modules]
    found: dict[str, list[tuple[float, int]]] = {}
    for number in latest_records(records):
        module, (_, latencies, *_) = orjson.loads(records[number])
        if latencies and number not in set_aside:
            found.setdefault(keys[module], []).append((median(map(float, latencies)), number))
    return found


def _whole_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from (line for line in file if line.endswith(b"\n"))


def _load(folder: RunFolder, target: Target, set_aside: Sequence[int]) -> WorkerProcess:
    """A frozen process with the model, compiled without the schedules set aside."""
    threads = thread_count(target)
    with tempfile.TemporaryDirectory(prefix="tvmlab-") as scratch:
        for name in _COPIED:
            if (folder.path / name).exists():
                shutil.copy(folder.path / name, scratch)
        RunFolder(Path(scratch)).write_json(REFINE_FILE, {"set_aside": list(set_aside), "swaps": []})
        worker = start_worker(folder, target, threads)
        try:
            load("the model", worker, "tvmlab", RunFolder(Path(scratch)), threads)
        except BaseException:
            worker.kill()
            raise
    worker.pause()
    return worker


def _take_turns(one: WorkerProcess, other: WorkerProcess) -> tuple[list[float], list[float]]:
    """Seconds of each one's inferences, in pairs; who begins alternates, and the one that waits is frozen."""
    found: tuple[list[float], list[float]] = ([], [])
    for turn in range(_TURNS):
        for who in (0, 1) if turn % 2 == 0 else (1, 0):
            worker = (one, other)[who]
            worker.proceed()
            try:
                found[who].extend(ask("the model", worker, ("time", 1), TURN_S))
            finally:
                worker.pause()
    return found


def _row(swap: Swap, unswapped_s: list[float], swapped_s: list[float], tests: int) -> dict[str, Any]:
    """What a swap gave: whole-model latencies in seconds, and whether it stays (at 95 % over all `tests`)."""
    p_value = faster(swapped_s, unswapped_s)
    return {
        "task": swap.task.name,
        "task_key": swap.task.key,
        "line": swap.line,
        "kernel_ratio": swap.ratio,
        "unswapped_s": unswapped_s,
        "swapped_s": swapped_s,
        "difference_s": paired_difference(swapped_s, unswapped_s).value,
        "p_value": p_value,
        "kept": p_value <= _P_VALUE / tests,
    }
