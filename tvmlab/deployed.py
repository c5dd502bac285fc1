"""A compiled model in a file, and how to run it: what `tvmlab.export` writes and `tvmlab.load` reads.

model.so is a library as TVM's own runtime loads it; model.json beside it says what it takes and gives, for what machine
it was compiled, and how near its outputs are to onnxruntime's:

    format, model, sha256, run, versions, label, device, flags, environment, inputs, outputs, max_error_over_max_output

`flags` are the CPU's instruction sets that its code may use, as Linux calls them; `environment` are variables that
TVM's runtime reads, such as its number of threads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tvmlab.compat import loading_quietly
from tvmlab.core import InputError, MissingTool, RecordError
from tvmlab.cuda import load_runtime
from tvmlab.hardware import read_cpu

__all__ = ["FORMAT", "Deployed", "description_path", "load"]

FORMAT = 1


@dataclass(frozen=True, eq=False, repr=False)
class Deployed:
    """A compiled model, loaded: call it with the inputs in order or by name; it returns the outputs by name.

    `inputs` are shapes by name, `dtypes` numpy's names of their types, `about` is the description that was exported.
    """

    path: Path
    inputs: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    outputs: list[str]
    about: dict[str, Any]
    _device: Any = field(compare=False)
    _main: Any = field(compare=False)

    def __call__(self, *arrays: np.ndarray, **named: np.ndarray) -> dict[str, np.ndarray]:
        """One inference. Raises InputError for an input that is missing, unknown, or of another shape or type.

        Example: `tvmlab.load("resnet50.so")(np.zeros((1, 3, 224, 224), "float32"))`
        """
        return self.run({**self._in_order(arrays), **named})

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One inference with the inputs by name, whatever characters a name has. Raises as a call does."""
        import tvm

        arrays = [self._checked(name, inputs) for name in self.inputs]
        if unknown := sorted(set(inputs) - set(self.inputs)):
            raise InputError(f"{self.path.name} has no input {unknown[0]!r}", remedy=f"it takes {self._takes()}")
        found = self._main(*(tvm.runtime.tensor(array, self._device) for array in arrays))
        results = [found] if hasattr(found, "numpy") else list(found)
        return dict(zip(self.outputs, (np.asarray(result.numpy()) for result in results), strict=True))

    def _in_order(self, arrays: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        if len(arrays) > len(self.inputs):
            raise InputError(f"{self.path.name} was given {len(arrays)} inputs", remedy=f"it takes {self._takes()}")
        return dict(zip(self.inputs, arrays, strict=False))

    def _checked(self, name: str, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        if name not in inputs:
            raise InputError(f"{self.path.name} misses its input {name!r}", remedy=f"it takes {self._takes()}")
        array = np.asarray(inputs[name])
        if array.shape != self.inputs[name] or array.dtype != self.dtypes[name]:
            raise InputError(
                f"input {name!r} is {array.dtype} of shape {array.shape}",
                remedy=f"{self.path.name} was compiled for {self._takes()}",
            )
        return np.ascontiguousarray(array)

    def _takes(self) -> str:
        return ", ".join(f"{name}: {self.dtypes[name]} {shape}" for name, shape in self.inputs.items())

    def __repr__(self) -> str:
        return f"Deployed({str(self.path)!r}: {self.about['model']} for {self.about['label']}, takes {self._takes()})"


def load(path: str | Path) -> Deployed:
    """Load a model that `tvmlab.export` wrote, on the device that it was compiled for.

    TVM's runtime gets as many threads as the model was tuned for, if nothing in this process used it before; a variable
    TVM_NUM_THREADS of your own stands. Needs no search, no record and no compiler.

    Raises InputError if there is no such model, RecordError if its description is damaged or of a newer tvmlab,
    MissingTool if this machine lacks the CPU's instructions or the GPU that it was compiled for.

    Example: `outputs = tvmlab.load("resnet50.so")(image)`
    """
    library = Path(path)
    about = _description(library)
    _require_machine(library, about)
    for name, value in about["environment"].items():
        os.environ.setdefault(name, value)
    if str(about["device"]).startswith("cuda"):
        load_runtime()
    import tvm
    from tvm import relax

    device = _device(library, about)
    try:
        with loading_quietly():
            machine = relax.VirtualMachine(tvm.runtime.load_module(str(library.resolve())), device)
    except Exception as error:  # TVM raises whatever type its loader happens to
        raise InputError(f"TVM cannot load {library} ({error})", remedy="export the model again") from error
    return Deployed(
        path=library,
        inputs={name: tuple(one["shape"]) for name, one in about["inputs"].items()},
        dtypes={name: one["dtype"] for name, one in about["inputs"].items()},
        outputs=about["outputs"],
        about=about,
        _device=device,
        _main=machine["main"],
    )


def description_path(library: Path) -> Path:
    """Where the description of an exported model is."""
    return library.with_suffix(".json")


def _description(library: Path) -> dict[str, Any]:
    path = description_path(library)
    for needed in (library, path):
        if not needed.is_file():
            raise InputError(
                f"there is no {needed}", remedy="pass the .so file of tvmlab.export, with its .json file beside it"
            )
    try:
        about = json.loads(path.read_bytes())
        version = about["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{path} is damaged ({error})", remedy="export the model again") from error
    if version > FORMAT:
        raise RecordError(f"{path} is of a newer tvmlab (format {version})", remedy="update tvmlab")
    return about


def _require_machine(library: Path, about: Mapping[str, Any]) -> None:
    """Raise MissingTool where the CPU lacks what the code uses: an unknown instruction would end the process."""
    here = read_cpu().flags
    if here and (missing := sorted(set(about["flags"]) - here)):
        raise MissingTool(
            f"{library.name} was compiled for {about['label']}; this CPU lacks {', '.join(missing)}",
            remedy="tune and export on this machine",
        )


def _device(library: Path, about: Mapping[str, Any]) -> Any:
    """TVM's device for it. Raises MissingTool if it is not there."""
    import tvm

    kind, _, index = str(about["device"]).partition(":")
    device = tvm.device(kind, int(index or 0))
    if not device.exist:
        raise MissingTool(
            f"{library.name} was compiled for {about['label']}, and TVM sees no {about['device']} here",
            remedy="`tvmlab doctor` says what is missing; else tune and export on this machine",
        )
    return device
