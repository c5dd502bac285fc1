"""The process that searches: `python -m tvmlab.search_process <run folder>`, started by tvmlab.run.

It holds the folder's lock for as long as it lives, writes a heartbeat, and ends on SIGTERM after the trial under way.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from tvmlab import reuse
from tvmlab.compat import hide_torch
from tvmlab.core import InputError, Measurer, TvmlabError
from tvmlab.environment import describe
from tvmlab.experiment import Experiment, LayoutTuning, Selective
from tvmlab.layout_plan import LayoutPlan
from tvmlab.layout_step import arrange
from tvmlab.loop import run_steps
from tvmlab.measure.local import LocalMeasurer
from tvmlab.measure.refine import set_slow_aside
from tvmlab.models import load_model
from tvmlab.records import RunFolder
from tvmlab.run_model import model_of
from tvmlab.selective_step import said_of as selected
from tvmlab.session import Session
from tvmlab.targets import Target, require_gpu
from tvmlab.targets import target as named_target
from tvmlab.tasks import Task, require_tunable
from tvmlab.transfer_step import said_of as transferred

__all__ = ["main", "prepare", "search"]

_HEARTBEAT_S = 0.5


def main(path: str) -> int:
    """Search until the experiment is done, stopped or failed; the exit code is 0 unless it failed."""
    folder = RunFolder.open(path)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # before the lock: who sees it held may send a signal
        signal.signal(number, lambda *_: stop.set())
    with folder.acquire():
        state = folder.state
        folder.write_state(replace(state, status="running", pid=os.getpid(), phase="importing the model", message=""))
        try:
            search(folder, stop)
        except Exception as error:  # noqa: BLE001  a run never ends without saying why
            traceback.print_exc()
            message = str(error) if isinstance(error, TvmlabError) else f"{type(error).__name__}: {error} (log.txt)"
            last = folder.read_json("state.json")
            folder.write_json("state.json", {**last, "status": "failed", "message": message})
            return 1
    return 0


def search(
    folder: RunFolder,
    stop: threading.Event,
    make_measurer: Callable[[list[Task], Target, RunFolder], Measurer] | None = None,
) -> None:
    """Do what the folder's experiment asks, from where it is, and write how it ended."""
    target, tasks, plan = prepare(folder)
    make = make_measurer or _local_measurer
    measurer = make(tasks, target, folder)
    session = Session(folder, tasks, target, measurer, plan)
    session.stop = stop
    if said := reuse.said_of_reuse(folder):
        print(said, flush=True)
    pulse = _Heartbeat(folder, session)
    try:
        pulse.start()
        run_steps(session)
        if target.kind == "cuda":
            set_slow_aside(folder, target)
    finally:
        pulse.finish()
        measurer.close()
        session.close()
    status, message = _outcome(session)
    session.phase = ""
    _write(folder, session, status, message)


def prepare(folder: RunFolder) -> tuple[Target, list[Task], LayoutPlan | None]:
    """Load what the experiment names and note it in the folder; the plan is of a layout step that is not done.

    Raises InputError if the machine is another one.
    """
    experiment = folder.experiment
    target = named_target(experiment.target)
    _check_same_machine(folder, target)
    model = model_of(folder)
    reuse.begin(folder, target)
    tasks, plan = arrange(folder, model, target)
    require_tunable(tasks, model)
    if not folder.environment:
        about = {
            "name": model.name,
            "source": model.source,
            "sha256": model.sha256,
            "parameters": model.parameters,
            "flops": model.flops,
        }
        folder.write_json("environment.json", {"target": target.as_record(), "model": about, **describe()})
    return target, tasks, plan


def _check_same_machine(folder: RunFolder, target: Target) -> None:
    before = folder.environment.get("target")
    if before and (before["attrs"], before["label"]) != (target.attrs, target.label):
        raise InputError(
            f"run {folder.id} was made on {before['label']}, this is {target.label}",
            remedy="resume it there, or start a new run with warm_start naming this one",
        )


def _local_measurer(tasks: list[Task], target: Target, folder: RunFolder) -> Measurer:
    return LocalMeasurer(tasks, target, folder.experiment.measure, folder.path)


def _outcome(session: Session) -> tuple[str, str]:
    stages = session.experiment.stages
    spent = session.plan is None and session.trials >= session.total_trials
    left = stages[session.steps_done :]
    # These have more to do when they have no trial left: to time the whole model, to see what was served poorly.
    is_more = any(isinstance(step, Selective) or getattr(step, "refine", 0) for step in left)
    cut_short = bool(left) and (is_more or not spent)
    if cut_short and session.stop.is_set():
        return "stopped", "stopped on request; tvmlab resume continues to the total that was asked"
    folder = session.folder
    parts = ["the time limit was reached" if cut_short else "", reuse.said_of_reuse(folder), _said_of_clocks(folder)]
    if session.fell_short and not cut_short:
        parts.append("every task stopped early or has no more candidates")
    if minima := len({key for ended in session.minima.values() for key in ended} & session.tasks.keys()):
        parts.append(f"the descent of {minima} of {len(session.tasks)} tasks ended at a local minimum")
    if kept := session.kept_default:
        parts.append(f"nothing could be tried for {', '.join(sorted(kept))}, which keep the default schedule")
    return "done", "; ".join(filter(None, [*parts, transferred(folder), selected(folder)]))


def _said_of_clocks(folder: RunFolder) -> str:
    """How many batches were measured while the GPU held its clocks back, and why."""
    batches = folder.batches()
    throttled = [row["throttled"] for row in batches if row["throttled"]]
    reasons = ", ".join(sorted({reason for row in throttled for reason in row}))
    return (
        f"{len(throttled)} of {len(batches)} batches were measured on a throttled GPU ({reasons})" if throttled else ""
    )


def _write(folder: RunFolder, session: Session, status: str, message: str = "") -> None:
    started = folder.read_json("state.json")["started_s"]
    folder.write_state(replace(session.state(status, message), pid=os.getpid(), started_s=started))


class _Heartbeat(threading.Thread):
    """Writes the state twice a second, so that a reader sees a long build as life and a dead process as none."""

    def __init__(self, folder: RunFolder, session: Session) -> None:
        super().__init__(daemon=True, name="heartbeat")
        self._folder = folder
        self._session = session
        self._finished = threading.Event()

    def run(self) -> None:
        """Beat until told to finish."""
        while not self._finished.is_set():
            with suppress(OSError):  # the disk may have room again at the next beat
                _write(self._folder, self._session, "running", reuse.said_of_reuse(self._folder))
            self._finished.wait(_HEARTBEAT_S)

    def finish(self) -> None:
        """Stop beating."""
        self._finished.set()
        self.join()


def check_experiment(experiment: Experiment, begun: RunFolder | None = None) -> None:
    """Everything that can be wrong with an experiment, found before a run folder exists, or before `begun` goes on.

    Raises TvmlabError.
    """
    target = named_target(experiment.target)
    if target.device is None:
        raise InputError(
            f"target {experiment.target!r} has no device here to measure on",
            remedy="use one that tvmlab.targets() lists; a target without its device is for compiling only",
        )
    if target.kind == "cuda":
        require_gpu(target.device)
    if target.kind != "llvm" and any(isinstance(step, LayoutTuning) for step in experiment.stages):
        raise InputError(
            f"LayoutTuning does not work on {target.label}",
            remedy="leave it out: packed channels are for a CPU's vectors, on a GPU everything stays in NCHW",
        )
    if begun:
        model_of(begun)
    else:
        load_model(experiment.model, batch=experiment.batch, seed=experiment.seed, dims=experiment.dims)


if __name__ == "__main__":
    hide_torch()
    sys.exit(main(str(Path(sys.argv[1]))))
