"""TVM databases that were made elsewhere, brought into the store as run folders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import orjson

from tvmlab.compat import DATABASE_FILES, fastest_records, load_meta_schedule, structural_key, to_plain
from tvmlab.core import Candidate, InputError, RecordError, TaskInfo, Trial, TrialStatus
from tvmlab.earlier import readable
from tvmlab.environment import describe
from tvmlab.experiment import Ansor, Experiment
from tvmlab.hardware import read_cpu
from tvmlab.past_records import IMPORTED
from tvmlab.records import RunFolder, State, TrialWriter, default_runs_dir
from tvmlab.session import commit, open_database
from tvmlab.spaces.sketch import SketchSpace
from tvmlab.targets import Target, targets
from tvmlab.targets import target as named_target
from tvmlab.tasks import Task, task_of

__all__ = ["import_records"]

_FAILED_S = 1e9  # TVM's own search writes 10^10 seconds of a candidate that failed
_DEVICE = {"llvm": ("mcpu", "mattr", "mtriple"), "cuda": ("arch",)}  # what tells one device from another


def import_records(
    path: str | Path, target: str | Target | None = None, *, most: int = 256, runs_dir: str | Path | None = None
) -> list[RunFolder]:
    """Bring a database of TVM's MetaSchedule into the store, so that runs count on it and start from it.

    `path` is a folder with database_workload.json and database_tuning_record.json. Each of its targets becomes a run
    folder; of each task come the `most` fastest records that can be made again here. The records of another target are
    kept as that target's; `target` says that they are for this one, if they are of the same device (mcpu, arch) and
    differ in other attributes.

    Raises InputError for a folder without a database, without usable records, or for another device than `target`, and
    where `most` is no whole number from 1 on; RecordError if the files are no database of TVM's.
    """
    if not isinstance(most, int) or most < 1:
        raise InputError(
            f"most={most!r} records of a task cannot be imported", remedy="most should be a whole number from 1 on"
        )
    folder = Path(path)
    for name in DATABASE_FILES:
        if not (folder / name).is_file():
            raise InputError(
                f"{folder} holds no TVM database, {name} is missing",
                remedy=f"pass a folder with {' and '.join(DATABASE_FILES)}",
            )
    parent = Path(runs_dir) if runs_dir is not None else default_runs_dir()
    by_target, unreadable = _by_target(folder, most)
    asked = named_target(target) if isinstance(target, str) else target
    devices = {text: _device(attrs, asked) for text, (attrs, _) in by_target.items()}
    known = {info.key: info for run in readable(parent) for info in run.tasks}
    made = [
        _import(folder, devices[text], records, known, parent, unreadable) for text, (_, records) in by_target.items()
    ]
    if not any(made):
        raise InputError(
            f"no record in {folder} is of a schedule that ran and can be made again here",
            remedy="pass a database that this version of TVM tuned",
        )
    return [run for run in made if run is not None]


def _by_target(folder: Path, most: int) -> tuple[dict[str, tuple[dict[str, Any], list[Any]]], int]:
    """The records of a database that ran, by target: its attributes and TVM's records; and how many are unreadable.

    They are read one by one: TVM applies each trace as it reads it, and refuses a whole file for one that fails.
    """
    database = load_meta_schedule().database
    found: dict[str, tuple[dict[str, Any], list[Any]]] = {}
    unreadable = 0
    try:
        lines = [(folder / name).read_bytes().splitlines() for name in DATABASE_FILES]
        workloads = [database.Workload.from_json(orjson.loads(line)) for line in lines[0]]
        records = [orjson.loads(line) for line in fastest_records(filter(_ran, lines[1]), most)]
    except Exception as error:  # noqa: BLE001  JSON's errors, and whatever TVM's parser raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise RecordError(f"{folder} is no TVM database ({reason})", remedy="restore it from a copy") from None
    for workload, content in records:
        try:
            record = database.TuningRecord.from_json(content, workloads[workload])
        except Exception:  # noqa: BLE001  a trace that does not apply to its task
            unreadable += 1
            continue
        if record.target is not None and len(record.trace.insts) > 0:  # else the default schedule
            attrs = _attrs(record.target)
            found.setdefault(str(sorted(attrs.items(), key=str)), (attrs, []))[1].append(record)
    return found, unreadable


def _ran(line: bytes) -> bool:
    """Whether a record is of a schedule that ran."""
    _, (_, seconds, *_) = orjson.loads(line)
    return bool(seconds) and median(seconds) < _FAILED_S


def _attrs(target: Any) -> dict[str, Any]:
    """A tvm target's attributes as JSON, without what TVM derives from the others."""
    exported = to_plain(target.export())
    return {name: value for name, value in exported.items() if name != "tag" and not name.startswith("feature.")}


def _device(attrs: Mapping[str, Any], asked: Target | None) -> Target:
    """The target that records with these attributes are for. Raises InputError if it is not the one that was asked."""
    if asked is not None:
        ours = _attrs(asked.to_tvm())
        same = ("kind", *_DEVICE.get(asked.kind, ()))
        if any(attrs.get(name) != ours.get(name) for name in same):
            raise InputError(
                f"the records are for {attrs}, not for {asked.name}",
                remedy="leave target out: they are kept as records of their own target",
            )
        return asked
    attached = next((each for each in targets() if _attrs(each.to_tvm()) == attrs), None)
    label = str(attrs.get("arch") or attrs.get("mcpu") or attrs["kind"])
    cores = {} if attrs["kind"] == "cuda" else {"num-cores": read_cpu().cores}  # TVM's rules need a number
    return attached or Target(label, f"{label} (imported)", attrs["kind"], {**cores, **attrs})


def _import(
    path: Path, target: Target, records: Iterable[Any], known: Mapping[str, TaskInfo], runs_dir: Path, unreadable: int
) -> RunFolder | None:
    """A run folder of records; None if none of them can be made again. `unreadable` are others of the database."""
    made_s = (path / DATABASE_FILES[1]).stat().st_mtime
    tasks, found, left_out = _made_again(records, target, known)
    if not found:
        return None
    experiment = Experiment(model=IMPORTED, target=target.name, steps=(Ansor(reuse=False),))
    folder = RunFolder.create(experiment, runs_dir)
    about = replace(target, _measure=None).as_record()  # a roofline would only be measured to be written down
    folder.write_json("environment.json", {"target": about, "model": {"name": IMPORTED}, **describe()})
    folder.write_json("tasks.json", [asdict(task.info) for task in tasks.values()])
    database = open_database(folder, target)
    writer = TrialWriter(folder)
    for number, (candidate, latencies_s) in enumerate(found, start=1):
        writer.append(_trial(candidate, latencies_s, number, made_s))
        commit(database, tasks[candidate.task_key].module, candidate.payload.trace, latencies_s, target)
    writer.close()
    message = f"{len(found)} records of {len(tasks)} tasks, imported from {path.name}"
    if left_out + unreadable:
        message += f"; {left_out + unreadable} more cannot be made again here"
    ended = State("done", started_s=made_s, heartbeat_s=made_s, trials=len(found), total_trials=len(found))
    folder.write_state(replace(ended, message=message))
    return folder


def _made_again(
    records: Iterable[Any], target: Target, known: Mapping[str, TaskInfo]
) -> tuple[dict[str, Task], list[tuple[Candidate, list[float]]], int]:
    """The tasks of records, the records as candidates with their latencies, and how many cannot be made again.

    A task that some run in the store has is called as there.
    """
    tasks: dict[str, Task] = {}
    spaces: dict[str, SketchSpace] = {}
    found: dict[tuple[str, str], tuple[Candidate, list[float]]] = {}
    left_out = 0
    for record in records:
        module = record.workload.mod
        key = structural_key(module)
        if key not in tasks:
            info = known.get(key)
            name, kind = (info.name, info.kernel_class) if info else (f"task{len(tasks)}", IMPORTED)
            tasks[key] = task_of(module, name, kind, weight=1)
            spaces[key] = SketchSpace(key, module, target.to_tvm())
        candidate = spaces[key].replay(record.trace)
        if candidate is None:
            left_out += 1
        else:
            found.setdefault((key, candidate.key), (candidate, [float(seconds) for seconds in record.run_secs]))
    made = {key for key, _ in found}
    return {key: task for key, task in tasks.items() if key in made}, list(found.values()), left_out


def _trial(candidate: Candidate, latencies_s: list[float], number: int, time_s: float) -> Trial:
    return Trial(
        task_key=candidate.task_key,
        step=0,
        strategy=IMPORTED,
        trial=number,
        key=candidate.key,
        sketch=candidate.sketch,
        decisions=candidate.decisions,
        status=TrialStatus.OK,
        latencies_s=latencies_s,
        time_s=time_s,
    )
