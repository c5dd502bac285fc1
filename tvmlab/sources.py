"""Where transfer-tuning takes its schedules from: names to runs of the same target, kernel classes, similarity.

Only run folders are read here, without TVM. After Gibson & Cano, "Transfer-Tuning: Reusing Auto-Schedules for Efficient
Tensor Program Code Generation" (PACT 2022, arXiv 2201.05587).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvmlab.core import InputError, Packing, RecordError, TaskInfo, Trial, standing
from tvmlab.earlier import Device, attrs_of, is_of, readable
from tvmlab.experiment import AutoTVM, Experiment, TransferTuning
from tvmlab.records import RunFolder

__all__ = [
    "AUTO",
    "SELECTIVE_FILE",
    "TRANSFER_FILE",
    "Origin",
    "block_of",
    "check_sources",
    "distance",
    "model_of",
    "origins",
    "packing_like",
    "pools",
    "resolve",
    "score",
    "warm_run",
]

AUTO = "auto"
TRANSFER_FILE = "transfer.json"
SELECTIVE_FILE = "selective.json"

_FAR = 64.0  # doublings between kernels whose shapes cannot be compared: further than any that can


@dataclass(frozen=True)
class Origin:
    """A tuned kernel of an earlier run: its task, and the fastest trial of it."""

    run: RunFolder
    task: TaskInfo
    trial: Trial


def check_sources(experiment: Experiment, target: Device, runs_dir: Path) -> None:
    """Raises InputError or RecordError if a step cannot take from other runs on this target what it is to take."""
    for step in experiment.stages:
        if isinstance(step, TransferTuning):
            resolve(step.source, experiment.model, target, runs_dir)
        for run in step.warm_start:
            warm_run(run, target, runs_dir)
        if isinstance(step, AutoTVM) and step.random_trials and not (step.reuse or step.warm_start):
            raise InputError(
                f"random_trials={step.random_trials} have no past records to start from, with reuse=False",
                remedy="leave them out, or name runs in warm_start",
            )


def warm_run(name: str, target: Device, runs_dir: Path) -> RunFolder:
    """A run that a step's warm_start names. Raises InputError if its records are of another target's kernels.

    Those of another device with the same attributes may be named: they build, and are measured again here.
    """
    run = RunFolder.open(name, runs_dir)
    made_for = attrs_of(run)
    if made_for != target.attrs:
        raise InputError(
            f"run {run.id} was tuned for {made_for}, this one is for {target.attrs}" if made_for
            else f"run {run.id} has not begun, so it has no records",
            remedy="leave it out of warm_start: records of another target mislead the search" if made_for
            else "leave it out of warm_start, or wait for it",
        )  # fmt: skip
    return run


def pools(folder: RunFolder, target: Device) -> dict[int, list[RunFolder]]:
    """The runs that each TransferTuning stage of a run chooses from, by the stage's number.

    They are noted in transfer.json when first asked for: a resumed run keeps to them, whatever was tuned since. Raises
    InputError as `resolve` does.
    """
    experiment, runs_dir = folder.experiment, folder.path.parent
    known = folder.read_json(TRANSFER_FILE, missing={"steps": {}, "rows": []})
    found = {}
    for number, step in enumerate(experiment.stages):
        if not isinstance(step, TransferTuning):
            continue
        if str(number) in known["steps"]:
            found[number] = [RunFolder.open(name, runs_dir) for name in known["steps"][str(number)]["pool"]]
        else:
            found[number] = resolve(step.source, experiment.model, target, runs_dir, itself=folder.id)
            known["steps"][str(number)] = {"pool": [_name_of(run, runs_dir) for run in found[number]]}
    if found:
        folder.write_json(TRANSFER_FILE, known)
    return found


def _name_of(run: RunFolder, runs_dir: Path) -> str:
    inside = run.path.resolve().parent == runs_dir.resolve()
    return run.id if inside else str(run.path.resolve())


def resolve(names: Sequence[str], model: str, target: Device, runs_dir: Path, itself: str = "") -> list[RunFolder]:
    """The runs that the names of a step stand for, in their order, each once.

    A name is a run (id or folder) or a model: of that, its newest finished run on this target. "auto" stands for the
    newest finished run of every model but `model`; the heuristic (`score`) has the choice. A run that is named may be
    of another device with the same attributes. `itself` is the id of the run that asks.

    Raises InputError for a name without records, a run that still goes on, or another target's records.
    """
    there = [folder for folder in readable(runs_dir) if folder.id != itself]
    if tuple(names) != (AUTO,):
        found = [_named(name, target, there, runs_dir) for name in names]
        return list({folder.path.resolve(): folder for folder in found}.values())
    newest: dict[str, RunFolder] = {}
    for folder in there:
        name = _model_of(folder)
        if name not in (_canonical(model), *newest) and _is_usable(folder, target):
            newest[name] = folder
    if not newest:
        raise InputError(
            "there is no finished run of another model on this target to transfer from",
            remedy=f"tune one first; {_what_is_there(there, runs_dir)}",
        )
    return list(newest.values())


def _named(name: str, target: Device, there: Sequence[RunFolder], runs_dir: Path) -> RunFolder:
    """The run that a name stands for."""
    of_model = [folder for folder in there if _model_of(folder) == _canonical(name)]
    usable = next((folder for folder in of_model if _is_usable(folder, target)), None)
    if usable is not None:
        return usable
    foreign = next(filter(_has_records, of_model), None)
    if foreign is None and not _is_run(name, runs_dir):
        raise InputError(
            f"transfer source {name!r} has no finished run with records in {runs_dir}",
            remedy=f"tune it first; {_what_is_there(there, runs_dir)}",
        )
    folder = foreign or RunFolder.open(name, runs_dir)
    if folder.status == "running":
        raise InputError(f"transfer source {folder.id} is still running", remedy="wait for it, or stop it first")
    if not origins(folder):
        raise InputError(
            f"run {folder.id} has no tuned kernel to transfer",
            remedy=f"tune it first; {_what_is_there(there, runs_dir)}",
        )
    if attrs_of(folder) != target.attrs:
        raise InputError(
            f"run {folder.id} was tuned for {attrs_of(folder)}, this one is for {target.attrs}",
            remedy="name a run of this target: schedules made for another mislead, and may not even build",
        )
    if foreign is not None and not is_of(folder, target):
        raise InputError(
            f"run {folder.id} was made on {folder.environment['target'].get('label')}, this is {target.label}",
            remedy=f"tune {name} here first, or name that run itself to take its schedules all the same",
        )
    return folder


def _canonical(model: str) -> str:
    from tvmlab.zoo import ALIASES  # here, because it loads onnx and frames read this module

    return ALIASES.get(model, model)


def _model_of(folder: RunFolder) -> str:
    return _canonical(folder.experiment.model)


def _is_run(name: str, runs_dir: Path) -> bool:
    return any((path / "experiment.json").exists() for path in (Path(name), runs_dir / name))


def _is_usable(folder: RunFolder, target: Device) -> bool:
    return is_of(folder, target) and _has_records(folder)


def _has_records(folder: RunFolder) -> bool:
    """Whether a run is done and has a tuned kernel; one that is damaged is no source."""
    try:
        return folder.status == "done" and bool(origins(folder))
    except RecordError:
        return False


def _what_is_there(there: Sequence[RunFolder], runs_dir: Path) -> str:
    found = [f"{folder.id} ({folder.status})" for folder in there[:5]]
    return f"there are {', '.join(found)}" if found else f"there are no other runs in {runs_dir}"


def origins(folder: RunFolder) -> list[Origin]:
    """The tuned kernels of a run, each with its fastest trial; the default schedules do not count."""
    best: dict[str, tuple[float, Trial]] = {}
    for trial in standing(list(folder.trials())):
        latency = trial.latency_s
        if trial.trial > 0 and latency is not None and latency < best.get(trial.task_key, (math.inf,))[0]:
            best[trial.task_key] = (latency, trial)
    return [Origin(folder, info, best[info.key][1]) for info in folder.tasks if info.key in best]


def score(tuned: Iterable[TaskInfo], tasks: Iterable[TaskInfo], untuned_s: Mapping[str, float]) -> float:
    """How much a source promises a target model: the sum over kernel classes c of P_c x sqrt(N_c).

    The heuristic of Gibson & Cano (PACT 2022, equation 1), as far as we know it (decision 9): P_c is the share of class
    c in the target's untuned latency, N_c the number of the source's tuned kernels of that class, under a root as each
    adds less than the one before. `tuned` are those kernels, `tasks` the target's, `untuned_s` its default latencies in
    seconds by task key.

    >>> conv = TaskInfo("1", "conv2d", "conv2d", 1, 1.0, 1.0, True)
    >>> score([conv] * 4, [conv], {"1": 0.5})
    2.0
    """
    shares: dict[str, float] = {}
    for info in tasks:
        shares[info.kernel_class] = shares.get(info.kernel_class, 0.0) + info.weight * untuned_s.get(info.key, 0.0)
    total = sum(shares.values()) or 1.0
    counts = Counter(info.kernel_class for info in tuned)
    return sum(share / total * math.sqrt(counts[name]) for name, share in shares.items())


def distance(one: str, other: str) -> float:
    """How far apart two kernels' shapes are: doublings, summed over every axis of every argument.

    The texts are `TaskInfo.shapes`. Kernels with other epilogues have other arguments after the second: they are
    compared by the first two and the result. Arguments with other axes are as far apart as it gets.

    >>> distance("1x64x56x56 64x64x3x3", "1x128x28x28 128x64x3x3"), distance("1x64", "1x1x64")
    (4.0, 64.0)
    >>> distance("1x64x7x7 64x64x1x1 1x64x7x7", "1x64x7x7 64x64x1x1 1x64x1x1 1x64x14x14")
    2.0
    """
    ours, theirs = _axes(one), _axes(other)
    if len(ours) != len(theirs):
        ours, theirs = ([*axes[:-1][:2], *axes[-1:]] for axes in (ours, theirs))
    if list(map(len, ours)) != list(map(len, theirs)):
        return _FAR
    pairs = [pair for a, b in zip(ours, theirs, strict=True) for pair in zip(a, b, strict=True)]
    return min(_FAR, sum(abs(math.log2(a / b)) for a, b in pairs))


def _axes(shapes: str) -> list[list[int]]:
    return [[int(size) or 1 for size in shape.split("x") if size.isdigit()] for shape in shapes.split()]


def model_of(folder: RunFolder, run: str) -> str:
    """The model of a source run; unknown if it is not beside this one any more."""
    name = folder.path.parent / run / "experiment.json"
    return _model_of(RunFolder(name.parent)) if name.exists() else ""


def block_of(runs: Iterable[RunFolder]) -> int:
    """The block of channels in which most convolutions of these runs are packed; 0 if none is."""
    blocks = [Packing.parse(row["packing"]).block for row in _convolutions(runs)]
    found = Counter(block for block in blocks if block)
    return found.most_common(1)[0][0] if found else 0


def packing_like(about: str, runs: Iterable[RunFolder]) -> Packing | None:
    """The packing of that convolution of some runs which is most like another; None if none is like it.

    `about` is the text of a `Site` without its name. Alike are those of the same kind, kernel and stride, the nearest
    by shape.
    """
    alike = [row for row in _convolutions(runs) if _signature(row["about"]) == _signature(about)]
    nearest = min(alike, key=lambda row: distance(_shapes(row["about"]), _shapes(about)), default=None)
    return Packing.parse(nearest["packing"]) if nearest else None


def _convolutions(runs: Iterable[RunFolder]) -> Iterator[dict[str, Any]]:
    for run in runs:
        yield from (row for row in (run.layouts or {"sites": []})["sites"] if row["site"].startswith("conv"))


def _signature(about: str) -> tuple[str, list[str], str]:
    kind, _, weight, *rest = about.split()
    return kind, weight.split("x")[2:], rest[1] if rest[:1] == ["stride"] else "1x1"


def _shapes(about: str) -> str:
    return " ".join(about.split()[1:3])
