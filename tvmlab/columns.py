"""trials.jsonl into typed columns: a million rows never exist as Python objects at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pandas as pd

from tvmlab.core import RecordError, TaskInfo, TrialStatus, on_one_clock
from tvmlab.records import RunFolder

__all__ = ["COLUMNS", "DETAILS", "PER_RUN", "TrialReader", "identity"]

# Rows are parsed so few at a time that they die before Python's garbage collector ages them (2x faster), and
# turned into arrays many at a time, because each array costs a few microseconds.
_PARSE_BYTES = 100_000
_BLOCK_ROWS = 50_000

_NUMBERS: dict[str, Any] = {
    "step": np.int32,
    "trial": np.int64,
    "sketch": np.int32,
    "build_s": np.float64,
    "run_s": np.float64,
    "elapsed_s": np.float64,
    "time_s": np.float64,
}
_REPEATED = ("task_key", "strategy", "status")  # few distinct strings: categories
_UNIQUE = ("key", "decisions", "message")  # one object a row
_OF_TASK: dict[str, Callable[[TaskInfo], Any]] = {
    "task": lambda task: task.name,
    "kernel_class": lambda task: task.kernel_class,
    "gflops": lambda task: task.flops,
}
_LATENCIES = ("latency_us", "latency_min_us", "latency_std_us", "repeats")
PER_RUN = ("run", "model", "target", "seed")
COLUMNS = (
    *PER_RUN, "step", "strategy", "trial", "task", "task_key", "kernel_class", "status", *_LATENCIES,
    "build_s", "run_s", "elapsed_s", "time_s", "gflops", "key", "sketch",
)  # fmt: skip
DETAILS = ("decisions", "message")


def identity(folder: RunFolder) -> tuple[str, str, str, int]:
    """Run id, model, target label and seed."""
    experiment = folder.experiment
    label = folder.environment.get("target", {}).get("label", experiment.target)
    return folder.id, Path(experiment.model).stem, label, experiment.seed


class _Codes(dict[str, int]):
    """A number for each distinct value of a column, shared by all runs, so that the categories agree."""

    def __missing__(self, value: str) -> int:
        self[value] = code = len(self)
        return code


class TrialReader:
    """Collects the wanted columns of one run folder after the other."""

    def __init__(self, wanted: Sequence[str]) -> None:
        self._wanted = wanted
        self._parts: dict[str, list[Any]] = {name: [] for name in wanted}
        self._codes = {name: _Codes() for name in ("run", "model", "target", "task", "kernel_class", *_REPEATED)}
        self._codes["status"].update({str(status): code for code, status in enumerate(TrialStatus)})
        stored = {*wanted} & {*_NUMBERS, *_REPEATED, *_UNIQUE}
        if {*wanted} & {*_OF_TASK}:
            stored.add("task_key")
        self._timed = bool({*wanted} & {*_LATENCIES, "gflops"})
        if self._timed:
            stored.add("status")
        self._stored = sorted(stored)

    def read(self, folder: RunFolder) -> None:
        """Add the trials of a run. Raises RecordError if a line is damaged or not a trial."""
        per_run = dict(zip(PER_RUN, identity(folder), strict=True))
        known = {task.key: task for task in folder.tasks}
        try:
            for block, count in self._blocks(folder):
                columns = self._columns(block, count, per_run, known)
                for name in self._wanted:
                    self._parts[name].append(columns[name])
        except KeyError as error:
            raise RecordError(
                f"{folder.path / 'trials.jsonl'} has a trial without {error}",
                remedy="it was not written by tvmlab",
            ) from None

    def _blocks(self, folder: RunFolder) -> Iterator[tuple[dict[str, list[Any]], int]]:
        """The stored fields of many rows, and how many rows; `samples` holds their repeats end to end."""
        names, count = self._stored, 0
        block: dict[str, list[Any]] = {name: [] for name in (*names, "repeats", "samples")}
        for rows in _parsed(folder, whole="decisions" in names):
            for name in names:
                block[name].extend([row[name] for row in rows])
            if self._timed:
                samples = [_samples(row) if "reference_s" in row else row["latencies_s"] for row in rows]
                block["repeats"].extend(map(len, samples))
                block["samples"].extend(chain.from_iterable(samples))
            count += len(rows)
            if count >= _BLOCK_ROWS:
                yield block, count
                block, count = {name: [] for name in block}, 0
        if count:
            yield block, count

    def _columns(
        self, block: dict[str, list[Any]], count: int, per_run: dict[str, Any], known: dict[str, TaskInfo]
    ) -> dict[str, Any]:
        """A block as arrays; repeated strings as codes."""
        found: dict[str, Any] = {}
        for name in self._stored:
            if name in _REPEATED:
                codes = self._codes[name]
                found[name] = np.array([codes[value] for value in block[name]], dtype=np.int32)
            else:
                found[name] = np.array(block[name], dtype=_NUMBERS[name]) if name in _NUMBERS else block[name]
        if self._timed:
            found |= _latencies(block, found["status"] == self._codes["status"]["ok"])
        for name in {*self._wanted} & {*_OF_TASK}:
            found[name] = self._of_task(name, known)[found["task_key"]]
        if "gflops" in found:
            found["gflops"] = found["gflops"] / found["latency_us"] / 1e3
        for name in {*self._wanted} & {*PER_RUN}:
            value = self._codes[name][per_run[name]] if name in self._codes else per_run[name]
            found[name] = np.full(count, value)
        return found

    def _of_task(self, name: str, known: dict[str, TaskInfo]) -> np.ndarray:
        """A property of each task key's task (a code if it is a string), to be indexed by the key's code."""
        values = [_OF_TASK[name](known[key]) if key in known else None for key in self._codes["task_key"]]
        if name not in self._codes:
            return np.array(values, dtype=np.float64)
        return np.array([-1 if value is None else self._codes[name][value] for value in values])

    def frame(self) -> pd.DataFrame:
        """What was read, columns as wanted; the reader is empty afterwards."""
        columns: dict[str, Any] = {}
        for name in self._wanted:
            parts = self._parts.pop(name)
            if name in _UNIQUE:
                columns[name] = pd.Series(list(chain.from_iterable(parts)), dtype=object)
            elif name in self._codes:
                codes = np.concatenate([np.empty(0, np.int32), *parts])
                columns[name] = pd.Categorical.from_codes(codes, categories=pd.Index([*self._codes[name]]))
            else:
                kind = _NUMBERS.get(name, np.int64 if name in ("seed", "repeats") else np.float64)
                columns[name] = np.concatenate([np.empty(0, kind), *parts])
        return pd.DataFrame(columns, copy=False)


def _parsed(folder: RunFolder, whole: bool) -> Iterator[list[dict[str, Any]]]:
    """The rows of trials.jsonl, some hundreds at a time, without decisions unless `whole`.

    A torn last line is left out.
    """
    path = folder.path / "trials.jsonl"
    if not path.exists():
        return
    with path.open("rb") as file:
        is_whole = True
        while is_whole and (lines := file.readlines(_PARSE_BYTES)):
            is_whole = lines[-1].endswith(b"\n")
            if not is_whole:  # to read on would be to begin with its rest, if that is written meanwhile
                lines.pop()
            try:
                yield _array(lines if whole else map(_without_decisions, lines))
            except orjson.JSONDecodeError:
                yield _slowly(folder, lines)


def _array(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    return orjson.loads(b"[" + b",".join(lines) + b"]")


def _without_decisions(line: bytes) -> bytes:
    """The line with its longest field cut out unparsed (2x faster).

    No string can hold these marks, as JSON escapes its quotes. Decisions that hold such a key leave an
    unmatched bracket, which the caller sees.
    """
    start = line.find(b',"decisions":')
    end = line.find(b',"status":', start)
    return line[:start] + line[end:] if 0 <= start < end else line


def _slowly(folder: RunFolder, lines: list[bytes]) -> list[dict[str, Any]]:
    """The same lines, whole. Raises RecordError that numbers the first damaged line of the file."""
    try:
        return _array(lines)
    except orjson.JSONDecodeError:
        deque(folder.rows(), maxlen=0)
        raise


def _samples(row: dict[str, Any]) -> list[float]:
    """The repeats of a trial that was timed in turns with a rival, as `Trial.samples_s` has them."""
    if not row["reference_s"]:
        return row["latencies_s"]
    shown = row.get("shown", True)  # runs of before it was noted have it not
    return on_one_clock(row["latencies_s"], row["rival_latencies_s"], row["reference_s"], shown)


def _latencies(block: dict[str, list[Any]], ok: np.ndarray) -> dict[str, np.ndarray]:
    """Median, least and standard deviation (n - 1) of the repeats in us, NaN where not ok; how many
    repeats."""
    repeats = np.array(block["repeats"], dtype=np.int64)
    samples_us = np.array(block["samples"], dtype=np.float64) * 1e6
    starts = np.cumsum(repeats) - repeats
    found = {name: np.full(len(repeats), np.nan) for name in _LATENCIES[:3]}
    for count in np.unique(repeats[ok & (repeats > 0)]):
        at = np.flatnonzero(ok & (repeats == count))
        taken = samples_us[starts[at, None] + np.arange(count)]
        found["latency_us"][at] = np.median(taken, axis=1)
        found["latency_min_us"][at] = taken.min(axis=1)
        if count > 1:
            found["latency_std_us"][at] = taken.std(axis=1, ddof=1)
    return {**found, "repeats": repeats}
