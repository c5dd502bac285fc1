"""Write a run's compiled model into a file that runs without tvmlab's search, and check what was written."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tvmlab import llvm
from tvmlab.compare import ERROR_BOUND, worst_error
from tvmlab.core import InputError, RunError
from tvmlab.deployed import FORMAT, description_path
from tvmlab.environment import describe
from tvmlab.hardware import require_compiler, require_disk
from tvmlab.measure.subjects import LOAD_S, ask, load, recorded_target, start_worker, thread_count
from tvmlab.records import RunFolder
from tvmlab.run import Run
from tvmlab.targets import Target

__all__ = ["export"]


def export(run: Run | RunFolder | str | Path, path: str | Path = "model.so") -> Path:
    """Compile the run's model with its best schedules into a library; returns its path.

    Beside model.so goes model.json, which `tvmlab.load` reads. Both are written only after the library was loaded in a
    fresh process and its outputs for seeded inputs agree with onnxruntime's. The weights are in the library. It runs
    wherever the same version of TVM's runtime and a CPU (or GPU) with the same instructions are.

    Raises InputError for a path that does not end in .so, RunError if the run has no target yet, the model cannot be
    compiled or computes something else, MissingTool without a C++ compiler or space on the disk.

    Example: `tvmlab.export(run, "resnet50.so")`, and in any other process `tvmlab.load("resnet50.so")(image)`
    """
    library = Path(path)
    if library.suffix != ".so":
        raise InputError(f"{library} is no name of a library", remedy="let it end in .so")
    folder = run.folder if isinstance(run, Run) else RunFolder.open(run)
    target = recorded_target(folder)
    require_compiler()
    library.parent.mkdir(parents=True, exist_ok=True)
    require_disk(library.parent)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=library.parent) as scratch:
        made = Path(scratch) / library.name
        about = _about(folder, target) | _compile(folder, target, made)
        description_path(made).write_text(json.dumps(about, indent=1))
        where, threads = str(folder.path.resolve()), thread_count(target)
        expected = _outputs("onnxruntime", folder, target, "load", "onnxruntime", where, threads)
        found = _outputs("the exported library", folder, target, "run_library", str(made), where)
        about["max_error_over_max_output"] = error = worst_error(found, expected)
        if not error <= ERROR_BOUND:
            raise RunError(
                f"the compiled model of run {folder.id} is off by {error:.2g} of its largest output",
                remedy=f"more than {ERROR_BOUND:g} is not exported; see what tvmlab.compare(run) says",
            )
        description_path(made).write_text(json.dumps(about, indent=1))
        for part in (made, description_path(made)):
            part.replace(library.parent / part.name)
    return library


def _compile(folder: RunFolder, target: Target, made: Path) -> dict[str, Any]:
    """Compile the model as `tvmlab.compare` does, and write the library; what it takes and gives."""
    threads = thread_count(target)
    worker = start_worker(folder, target, threads)
    try:
        load("the compiled model", worker, "tvmlab", folder, threads)
        return ask("the compiled model", worker, ("export", str(made)), LOAD_S, loaded=True)
    finally:
        worker.kill()


def _outputs(name: str, folder: RunFolder, target: Target, *request: Any) -> list[np.ndarray]:
    """What a fresh process answers with the outputs for the run's seeded inputs."""
    worker = start_worker(folder, target, thread_count(target))
    try:
        return ask(name, worker, request, LOAD_S)
    finally:
        worker.kill()


def _about(folder: RunFolder, target: Target) -> dict[str, Any]:
    """What model.json says, all but what the compiled model and its check tell."""
    model = folder.environment["model"]
    is_gpu = target.kind == "cuda"
    return {
        "format": FORMAT,
        "model": Path(folder.experiment.model).name,
        "sha256": model["sha256"],
        "run": folder.id,
        "versions": describe()["versions"],
        "label": target.label,
        "device": target.device or ("cuda:0" if is_gpu else "cpu"),
        "flags": [] if is_gpu else llvm.linux_flags(target.attrs),
        # Where a GPU's libraries are is asked before a process starts: nothing that `load` could set.
        "environment": {} if is_gpu else target.worker_env(),
    }
