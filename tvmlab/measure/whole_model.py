"""A process that holds one whole model in one runtime, and times or profiles it on request.

Used by tvmlab.compare and tvmlab.profile through tvmlab.measure.subjects. Each runtime lives in a process of its own,
so that their thread pools do not share one; they take turns.
"""

from __future__ import annotations

import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np

from tvmlab import deployed
from tvmlab.compat import brief, hide_torch
from tvmlab.core import TvmlabError
from tvmlab.measure.process import end_with_parent_thread, serve
from tvmlab.models import Model
from tvmlab.records import RunFolder
from tvmlab.run_model import model_of
from tvmlab.targets import target as named_target

_RECORDING = 2  # calls that may record a CUDA graph and do not launch it


class Runtime(Protocol):
    """A model, loaded: called, it makes one inference on the run's seeded inputs and returns the outputs."""

    def __call__(self) -> list[np.ndarray]:
        """The outputs in the model's order."""
        ...


class Subject:
    """One runtime with one model: `load` it once, then `time` or `profile` it as often as wanted."""

    def __init__(self) -> None:
        self._runtime: Any = None

    def answer(self, message: tuple[Any, ...]) -> tuple[str, Any]:
        """Dispatch a request: ("ok", answer), ("error", text), or the name of an error of tvmlab's with its parts."""
        try:
            return "ok", getattr(self, f"do_{message[0]}")(*message[1:])
        except TvmlabError as error:
            return type(error).__name__, {"problem": error.problem, "remedy": error.remedy}
        except Exception as error:  # noqa: BLE001  reported by the parent, which names the runtime
            traceback.print_exc()  # into log.txt
            return "error", f"{type(error).__name__}: {brief(str(error))}"

    def do_load(self, name: str, folder: str, threads: int, cuda_graph: bool = True) -> list[np.ndarray]:
        """Prepare a runtime by name; returns the outputs for the run's seeded inputs.

        One of GRAPHED is a CUDA graph on a GPU, unless it shall not be. There the outputs are those of a replay: TVM
        records a graph in the first call, torch in the second, and only a later one launches it.
        """
        run = RunFolder.open(folder)
        model = model_of(run)
        how = {} if cuda_graph else {"cuda_graph": False}
        self._runtime = _RUNTIMES[name](model, run, threads, **how)
        before = _RECORDING if named_target(run.experiment.target).kind == "cuda" else 0
        for _ in range(before):
            self._runtime()
        return self._runtime()

    def do_export(self, path: str) -> dict[str, Any]:
        """Write the loaded runtime's library; what its description says of inputs and outputs."""
        return self._runtime.export(path)

    def do_run_library(self, path: str, folder: str) -> list[np.ndarray]:
        """The outputs of an exported library for a run's seeded inputs."""
        run = RunFolder.open(folder)
        return list(deployed.load(path).run(model_of(run).inputs_for(run.experiment.seed)).values())

    def do_time(self, count: int, warm_s: float = 0.0) -> list[float]:
        """Seconds of each of `count` inferences, after those of the first `warm_s` seconds (one at least)."""
        deadline = time.perf_counter() + warm_s
        self._runtime()
        while time.perf_counter() < deadline:
            self._runtime()
        samples = []
        for _ in range(count):
            started = time.perf_counter()
            self._runtime()
            samples.append(time.perf_counter() - started)
        return samples

    def do_profile(self, repeats: int, alone: bool) -> dict[str, Any]:
        """What the runtime's `profile` measures in `repeats` inferences."""
        return self._runtime.profile(repeats, alone)


class _Tvm:
    """The model compiled by TVM: packed as the run says, with its best schedules; untuned: in NCHW, with none."""

    def __init__(
        self, model: Model, run: RunFolder, threads: int, *, tuned: bool = True, cuda_graph: bool = True
    ) -> None:
        import tvm
        from tvm import relax

        from tvmlab.compat import read_database
        from tvmlab.nvrtc import compile_kernels
        from tvmlab.tasks import compile_model, lower

        target = named_target(run.experiment.target)
        if target.kind == "cuda":
            compile_kernels()
        database = read_database(run.path, target.kind) if tuned else None
        self._lowered, self._classes = lower(model, target, run.assignment if tuned else None)
        kind, _, index = str(target.device).partition(":")
        self._device = tvm.device(kind, int(index or 0))
        self._is_gpu = kind == "cuda"

        def machine(**how: Any) -> Any:
            self._executable = compile_model(self._lowered, target, database, **how)
            return relax.VirtualMachine(self._executable, self._device)

        self._make = machine
        self._machine = machine(cuda_graph=cuda_graph)
        self._main = self._machine["main"]
        self._inputs = [tvm.runtime.tensor(x, self._device) for x in model.inputs_for(run.experiment.seed).values()]
        self._model = model
        self._threads = threads

    def __call__(self) -> list[np.ndarray]:
        result = self._main(*self._inputs)
        self._device.sync()
        outputs = [result] if hasattr(result, "numpy") else list(result)
        return [np.asarray(output.numpy()) for output in outputs]

    def export(self, path: str) -> dict[str, Any]:
        """See tvmlab.export."""
        self._executable.export_library(path)
        shapes, dtypes = self._model.inputs, self._model.dtypes
        inputs = {name: {"shape": list(shape), "dtype": str(dtypes[name])} for name, shape in shapes.items()}
        return {"inputs": inputs, "outputs": list(self._model.outputs)}

    def profile(self, repeats: int, alone: bool) -> dict[str, Any]:
        """See tvmlab.measure.instrument."""
        from tvmlab.measure.instrument import Kernels, profile_machine

        if self._is_gpu:  # the kernels of a CUDA graph pass by the instrument
            self._machine = self._make(cuda_graph=False)
            self._main = self._machine["main"]
        kernels = Kernels(self._lowered, self._classes)
        return profile_machine(self._machine, self, kernels, self._device, self._threads, repeats, alone=alone)


class _OnnxRuntime:
    """The graph as it was loaded, in onnxruntime's CPU provider with its default optimisations."""

    def __init__(self, model: Model, run: RunFolder, threads: int) -> None:
        self._model = model
        self._threads = threads
        self._inputs = model.inputs_for(run.experiment.seed)
        self._session = self._open()

    def _open(self, **options: Any) -> Any:
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = self._threads
        settings.log_severity_level = 3
        for name, value in options.items():
            setattr(settings, name, value)
        content = self._model.original.SerializeToString()
        return onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])

    def __call__(self) -> list[np.ndarray]:
        return self._session.run(None, self._inputs)

    def profile(self, repeats: int, alone: bool) -> dict[str, Any]:
        """See tvmlab.measure.onnx_profile. `alone` is TVM's: onnxruntime cannot run one kernel by itself."""
        from tvmlab.measure.onnx_profile import convolutions, nodes

        with tempfile.TemporaryDirectory(prefix="tvmlab-") as folder:
            session = self._open(enable_profiling=True, profile_file_prefix=f"{folder}/profile")
            return {
                "nodes": nodes(session, self._inputs, repeats),
                "convolutions": convolutions(self._model.onnx),
            }


class _Torch:
    """The graph in torch on the run's device: eagerly, or compiled with max-autotune, on a GPU as a CUDA graph.

    cuDNN tries its algorithms for each convolution and keeps the fastest. `tf32` lets matrix products and convolutions
    round their factors to TensorFloat-32; TVM's float32 kernels never do.
    """

    def __init__(
        self, model: Model, run: RunFolder, threads: int, *, compiled: bool = False, tf32: bool = False
    ) -> None:
        sys.modules.pop("torch", None)  # hidden from TVM
        import torch

        from tvmlab.measure.torch_graph import TorchGraph

        torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.benchmark_limit = 0  # all algorithms; by default the first ten
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        self._torch = torch
        self._arrays = model.inputs_for(run.experiment.seed)
        self._graph = TorchGraph(model.onnx, named_target(run.experiment.target).device or "cpu")
        self._inputs = self._graph.tensors(self._arrays)
        module = self._graph.module
        self._call = torch.compile(module, mode="max-autotune", fullgraph=True) if compiled else module

    def __call__(self) -> list[np.ndarray]:
        with self._torch.no_grad():
            return [output.cpu().numpy() for output in self._call(*self._inputs)]

    def profile(self, repeats: int, alone: bool) -> dict[str, Any]:
        """See tvmlab.measure.torch_profile: every operator alone, whatever `alone` says."""
        from tvmlab.measure.torch_profile import nodes

        return {"nodes": nodes(self._graph, self._arrays, repeats)}


def _openvino(model: Model, run: RunFolder, threads: int) -> Runtime:
    import openvino

    core = openvino.Core()
    # On a CPU with AMX or bf16 the plugin would round to it.
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(core.read_model(model.original.SerializeToString()), "CPU", settings)
    inputs = model.inputs_for(run.experiment.seed)
    request = compiled.create_infer_request()
    return lambda: [np.array(value) for value in request.infer(inputs).values()]


# How each subject of a comparison is made. A new baseline is one function and one row.
_RUNTIMES: dict[str, Callable[..., Runtime]] = {
    "tvmlab": _Tvm,
    "untuned": partial(_Tvm, tuned=False),
    "onnxruntime": _OnnxRuntime,
    "torch": _Torch,
    "torch-tf32": partial(_Torch, tf32=True),
    "torch-compile": partial(_Torch, compiled=True),
    "torch-compile-tf32": partial(_Torch, compiled=True, tf32=True),
    "openvino": _openvino,
}
GRAPHED = ("tvmlab", "untuned")  # what compile_model makes
BASELINES = tuple(name for name in _RUNTIMES if name != "tvmlab")
# Those that need a package, which is also the name of an extra of tvmlab.
OPTIONAL = {name: name.partition("-")[0] for name in BASELINES if name.startswith("torch") or name == "openvino"}

if __name__ == "__main__":
    end_with_parent_thread()
    hide_torch()
    serve(int(sys.argv[1]), Subject().answer)
