"""Fixtures for everyone: run folders that are synthetic but written by the same code as real ones."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest

from tvmlab.core import TaskInfo, Trial, TrialStatus
from tvmlab.experiment import Ansor, Experiment
from tvmlab.records import RunFolder, State, TrialWriter

os.environ.setdefault("MPLBACKEND", "Agg")

_KEYS = itertools.count(1)

# Two tunable tasks and a view, which is never measured: enough to weigh, share and leave out.
TASKS = (
    TaskInfo("a" * 16, "conv2d_relu", "conv2d+relu", 2, 4e6, 1e5, True, "1x3x8x8"),
    TaskInfo("b" * 16, "dense", "dense", 1, 2e6, 8e5, True, "1x64"),
    TaskInfo("c" * 16, "reshape", "reshape", 3, 0.0, 1e4, False, "1x64"),
)
DEFAULTS_US = {"conv2d_relu": 1000.0, "dense": 400.0}
ENVIRONMENT = {
    "target": {"label": "test-cpu", "roofline": {"peak_gflops": 100.0, "bandwidth_gbs": 10.0}},
    "model": {"name": "squeezenet", "source": "/home/somebody/models/squeezenet.onnx"},
    "machine": {"cpu": "Test CPU", "cores": 2},
    "versions": {"tvmlab": "0.1.0", "tvm": "0.27.0"},
    "git": {"commit": "0" * 40, "dirty": False},
    "command": ["/home/somebody/tvmlab/search_process.py", "/home/somebody/runs/a-run"],
    "phases": {},
}


@pytest.fixture
def make_run(tmp_path: Any) -> Callable[..., RunFolder]:
    """`make_run(trials=[...], defaults={...}, ...)` writes a run folder under tmp_path/runs and returns it.

    A trial is `(task name, latency in us)`, `(task name, [repeats in us])` or `(task name, TrialStatus)`, and
    numbers count from 1; `defaults` maps task names to the untuned latency in us (or to a status). Each trial
    ends `seconds_per_trial` after the one before, the defaults in the first second. `environment=None` or
    `tasks=()` leaves that file away, as in a run that has just begun; `comparison` is what compare.json shall
    hold.
    """

    def make(
        trials: Iterable[tuple[str, Any]] = (
            ("conv2d_relu", 500.0),
            ("dense", 200.0),
            ("conv2d_relu", 250.0),
        ),
        *,
        defaults: Mapping[str, Any] = DEFAULTS_US,
        tasks: Sequence[TaskInfo] = TASKS,
        experiment: Experiment | None = None,
        environment: Mapping[str, Any] | None = ENVIRONMENT,
        comparison: Mapping[str, Any] | None = None,
        status: str = "done",
        total_trials: int | None = None,
        seconds_per_trial: float = 1.0,
        strategy: str = "evolution",
        **options: Any,
    ) -> RunFolder:
        experiment = experiment or Experiment(
            **{"model": "squeezenet", "target": "cpu", "steps": [Ansor(max_trials=16)], **options}
        )
        folder = RunFolder.create(experiment, tmp_path / "runs")
        if environment is not None:
            folder.write_json("environment.json", environment)
        if tasks:
            folder.write_json("tasks.json", list(tasks))
        keys = {task.name: task.key for task in tasks}
        trials = list(trials)
        writer = TrialWriter(folder)
        for number, (name, result) in enumerate(defaults.items() if tasks else (), start=1):
            writer.append(_trial(keys[name], 0, result, "default", number / len(defaults)))
        for number, (name, result) in enumerate(trials, start=1):
            writer.append(_trial(keys[name], number, result, strategy, 1.0 + number * seconds_per_trial))
        writer.close()
        if comparison is not None:
            folder.write_json("compare.json", comparison)
        folder.write_state(
            State(
                status=status,
                elapsed_s=1.0 + len(trials) * seconds_per_trial,
                trials=len(trials),
                total_trials=len(trials) if total_trials is None else total_trials,
            )
        )
        return folder

    return make


def _trial(task_key: str, number: int, result: Any, strategy: str, elapsed_s: float) -> Trial:
    failed = isinstance(result, TrialStatus)
    repeats = () if failed else tuple(result) if isinstance(result, Sequence) else (result,)
    return Trial(
        task_key=task_key,
        step=0,
        strategy=strategy,
        trial=number,
        key=f"{next(_KEYS):016x}",
        sketch=0,
        decisions=[[1, 2, 4], number],
        status=result if failed else TrialStatus.OK,
        latencies_s=[repeat * 1e-6 for repeat in repeats],
        build_s=0.2,
        run_s=0.1,
        elapsed_s=elapsed_s,
        time_s=1.7e9 + elapsed_s,
        message=f"{result} happened" if failed else "",
    )


@pytest.fixture(scope="session")
def tiny_onnx(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An ONNX file that compiles in a blink: conv 8->16 3x3 on 14x14, relu, reshape, gemm to 10."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    weights = {"w": (16, 8, 3, 3), "w2": (10, 3136), "b2": (10,)}
    constants = [numpy_helper.from_array(rng.standard_normal(s, dtype=np.float32) * 0.1, n) for n, s in weights.items()]
    constants.append(numpy_helper.from_array(np.array([1, 3136], dtype=np.int64), "shape"))
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Reshape", ["r", "shape"], ["f"]),
        helper.make_node("Gemm", ["f", "w2", "b2"], ["y"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 14, 14])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 10])],
        constants,
    )
    path = tmp_path_factory.mktemp("models") / "tiny.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return str(path)


@pytest.fixture(scope="session")
def tiny_model(tiny_onnx: str) -> Any:
    """The model of `tiny_onnx`."""
    from tvmlab.models import load_model

    return load_model(tiny_onnx)


@pytest.fixture(scope="session")
def cpu() -> Any:
    """This machine's CPU as a target, with an invented roofline: nothing is measured for it."""
    from dataclasses import replace

    from tvmlab.core import Roofline
    from tvmlab.targets import target

    return replace(target("cpu"), _roofline=Roofline(peak_gflops=1e4, bandwidth_gbs=1e3))


@pytest.fixture(scope="session")
def tiny_tasks(tiny_model: Any, cpu: Any) -> dict[str, Any]:
    """The three tasks of the tiny model by kernel class: conv2d+relu, matmul+add, reshape."""
    from tvmlab.tasks import extract

    return {task.info.kernel_class: task for task in extract(tiny_model, cpu)}


@pytest.fixture(scope="session")
def tiny_experiment(tiny_onnx: str) -> Callable[..., Experiment]:
    """`tiny_experiment(max_trials=8, ...)`: the tiny model on this CPU, a small search, short repeats."""
    from tvmlab.experiment import Measure

    def make(max_trials: int = 8, **options: Any) -> Experiment:
        step = Ansor(max_trials=max_trials, population=16, generations=1)
        measure = Measure(repeats=2, min_repeat_ms=0.1, build_workers=1)
        return Experiment(**{"model": tiny_onnx, "target": "cpu", "steps": [step], "measure": measure, **options})

    return make


@pytest.fixture(scope="session")
def tiny_run(tiny_experiment: Callable[..., Experiment], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A real run of eight trials of the tiny model, done. Shared: copy its folder to change it."""
    from tvmlab.run import tune

    return tune(tiny_experiment(), tmp_path_factory.mktemp("runs")).wait()


@pytest.fixture
def make_folder(tiny_onnx: str, tmp_path: Any) -> Callable[..., RunFolder]:
    """A new run folder for the tiny model: `make_folder(max_trials=16, seed=1, ...)`."""

    def make(*, seed: int = 0, time_limit_s: float | None = None, steps: Any = None, **ansor: Any) -> RunFolder:
        ansor = {"population": 16, "generations": 1, "max_trials": 16, **ansor}
        steps = steps or [Ansor(**ansor)]
        experiment = Experiment(model=tiny_onnx, target="cpu", steps=steps, seed=seed, time_limit_s=time_limit_s)
        return RunFolder.create(experiment, tmp_path)

    return make


@pytest.fixture
def run(tiny_tasks: dict[str, Any], cpu: Any) -> Callable[..., list[Trial]]:
    """`run(folder, measurer)` does one session and returns the folder's trials (the defaults left out)."""
    from fake_measurer import FakeMeasurer

    from tvmlab.loop import run_steps
    from tvmlab.session import Session

    def go(folder: RunFolder, measurer: Any = None, *, stop: Any = None, target: Any = cpu) -> list[Trial]:
        measurer = measurer or FakeMeasurer()
        session = Session(folder, list(tiny_tasks.values()), target, measurer)
        session.stop = stop or session.stop
        try:
            run_steps(session)
            folder.write_state(session.state("stopped" if session.stop.is_set() else "done"))
        finally:
            session.close()
        return [trial for trial in folder.trials() if trial.trial > 0]

    return go
