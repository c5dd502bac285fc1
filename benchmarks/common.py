"""What the benchmarks share: the one-operator models, upstream in a child process, the last line."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import tvmlab
from tvmlab.core import InputError
from tvmlab.experiment import Ansor, Experiment
from tvmlab.records import RunFolder
from tvmlab.run import Run
from tvmlab.stats import median_interval, paired_ratio

HERE = Path(__file__).parent


def tune_upstream(kind: str, model: str, trials: int, seed: int, folder: Path, target: str = "cpu") -> float:
    """Seconds that upstream took; its database is in `folder`. Raises RuntimeError if it failed."""
    command = [sys.executable, str(HERE / "upstream.py"), kind, model, str(trials), str(seed), str(folder), target]
    # On a GPU upstream too needs to be told where CUDA's runtime library is; on a CPU it keeps its own thread count.
    env = os.environ | ({} if target == "cpu" else tvmlab.target(target).worker_env())
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env, start_new_session=True) as process:
        try:
            output, errors = process.communicate()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # its workers too, which may outlive it
            raise
    if process.returncode != 0:
        raise RuntimeError(f"upstream failed:\n{errors[-1800:]}")
    return float(json.loads(output.strip().splitlines()[-1])["seconds"])


def tune_tvmlab(model: str, trials: int, seed: int, folder: Path, target: str = "cpu") -> tuple[Run, float]:
    """The finished run, and the seconds from the call to its end: process starts and default kernels included."""
    started = time.perf_counter()
    step = Ansor(max_trials=trials, early_stopping_threshold=100_000, trials_per_kernel=100_000)
    run = tvmlab.tune(Experiment(model=model, target=target, seed=seed, steps=(step,)).afresh(), folder).wait()
    return run, time.perf_counter() - started


def conv_model(folder: Path) -> str:
    """ResNet-50's 3x3 convolution at 56x56, 64 to 64 channels, bias and relu, as an .onnx file."""
    weight = np.random.default_rng(0).standard_normal((64, 64, 3, 3), dtype=np.float32) * 0.06
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    weights = {"w": weight, "b": np.zeros(64, np.float32)}
    return save_model(folder / "conv.onnx", nodes, (1, 64, 56, 56), (1, 64, 56, 56), weights)


def matmul_model(folder: Path) -> str:
    """A 512x512x512 matrix product as an .onnx file."""
    weight = np.random.default_rng(0).standard_normal((512, 512), dtype=np.float32) * 0.04
    return save_model(
        folder / "matmul.onnx",
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        (512, 512),
        (512, 512),
        {"w": weight},
    )


def save_model(path: Path, nodes: list, shape_in: tuple, shape_out: tuple, weights: dict) -> str:
    """Write a graph of one input x and one output y as an .onnx file; returns its path."""
    graph = helper.make_graph(
        nodes,
        path.stem,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape_in)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape_out)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return str(path)


def kept(path: Path | None, what: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row of a file of JSON lines; it is measured and appended if the file has none that says `what`.

    So a long benchmark can be interrupted, and spread over days and machines: what is compared within a row was
    measured together, and `device` says on what.
    """
    if path is not None and path.exists():
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if what.items() <= row.items():
                return row
    row = {**what, "device": tvmlab.target("cpu").label, **measure()}
    print(json.dumps(row), flush=True)
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
    return row


def finished(runs_dir: Path, name: str, start: Callable[[], Run]) -> RunFolder:
    """The finished run of this name in a folder: gone on with if it was interrupted, started if there is none."""
    run = Run(RunFolder(runs_dir / name)) if (runs_dir / name).exists() else start()
    run = tvmlab.resume(run) if run.status in ("stopped", "failed") else run
    return run.wait().folder


def median_of(values: list[float]) -> tuple[float, float, float]:
    """The median and its 95 % interval; with fewer values than one takes (6), their range."""
    try:
        found = median_interval(values)
        return found.value, found.low, found.high
    except InputError:
        return median(values), min(values), max(values)


def rounded(value: float) -> float | None:
    """Four digits; None, which JSON writes as null, for the end of an interval that too few values give (NaN)."""
    return None if np.isnan(value) else round(float(value), 4)


def report(benchmark: str, ratio: float, low: float, high: float, goal: float) -> None:
    """The line a reader of the output looks for: the last one."""
    values = {"ratio": rounded(ratio), "low": rounded(low), "high": rounded(high), "goal": goal}
    print(json.dumps({"benchmark": benchmark, **values, "better": "lower"}), flush=True)


def report_mean(benchmark: str, ratios: Sequence[float], goal: float) -> None:
    """`report` of a geometric mean, with the interval of the paired randomization test (tvmlab.stats.paired_ratio)."""
    found = paired_ratio(ratios, np.ones(len(ratios)))
    report(benchmark, found.ratio, found.low, found.high, goal)


def report_medians(benchmark: str, rows: Sequence[dict[str, Any]], ratio: Callable[[dict[str, Any]], float],
                   goal: float) -> None:  # fmt: skip
    """`report_mean` over the kernels of their medians over the seeds; before it a line a kernel, and one of all rows.

    A search ends a quarter above or below the next now and then: a median over five seeds does not mind two of them.
    """
    medians = []
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        ratios = sorted(ratio(row) for row in rows if row["kernel"] == kernel)
        medians.append(median(ratios))
        print(f"{benchmark}, {kernel}: median {medians[-1]:.3f} of {', '.join(f'{each:.3f}' for each in ratios)}")
    found = paired_ratio([ratio(row) for row in rows], np.ones(len(rows)))
    print(f"{benchmark}, geometric mean of all rows: {found.ratio:.3f} [{found.low:.3f}, {found.high:.3f}]")
    report_mean(benchmark, medians, goal)
