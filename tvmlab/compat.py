"""The one place where TVM 0.27's oddities are handled. docs/tvm.md tells what was measured."""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import orjson

__all__ = [
    "DATABASE_FILES",
    "REFINE_FILE",
    "brief",
    "fastest_records",
    "hide_torch",
    "idle_passes",
    "latest_records",
    "load_meta_schedule",
    "load_wmma",
    "loading_quietly",
    "read_database",
    "structural_key",
    "to_plain",
]

DATABASE_FILES = ("database_workload.json", "database_tuning_record.json")

REFINE_FILE = "refine.json"  # beside them: the lines of the last that lost in the whole model

_INTRINSICS = "tvm.s_tir.tensor_intrin"


def hide_torch() -> None:
    """Keep TVM from importing torch in this process, before TVM is imported itself.

    Where torch is installed, `import tvm` imports it: 3 seconds and 200 MB in each worker, for nothing.
    """
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # what makes Python say that there is none


def load_meta_schedule(kind: str = "llvm") -> Any:
    """Import `tvm.s_tir.meta_schedule` without the 12 CPU-seconds of parsing every target's tensor intrinsics.

    TVM imports `tvm.s_tir.tensor_intrin` in every TuneContext and in every build; its `__init__` parses the
    intrinsics of all targets as TVMScript. A package of the same name and path that imports nothing by itself
    takes its place; the one sub-module a target's schedule rules name is loaded into it. `kind` is the target kind. On
    CUDA that is none: the rules name wmma intrinsics, for half precision, which `load_wmma` loads.
    """
    import tvm
    import tvm.s_tir
    from tvm.s_tir import meta_schedule

    if _INTRINSICS not in sys.modules:
        package = ModuleType(_INTRINSICS)
        package.__path__ = [str(Path(tvm.s_tir.__file__).parent / "tensor_intrin")]
        sys.modules[_INTRINSICS] = package
        tvm.s_tir.tensor_intrin = package
    if kind == "llvm":  # the rules of AVX-512 machines name dot_16x4
        importlib.import_module(f"{_INTRINSICS}.x86")
    logging.getLogger("tvm").setLevel(logging.WARNING)
    return meta_schedule


def load_wmma() -> None:
    """Load the intrinsics of tensor cores (8 CPU-seconds); without them a CUDA space has no sketch that uses them."""
    importlib.import_module(f"{_INTRINSICS}.cuda")


def read_database(folder: Path, kind: str, fastest: int | None = None) -> Any:
    """TVM's database of a run, to read only: the run may go on, or may have been killed while it wrote.

    JSONDatabase refuses a file with half a line at its end, and creates files that are missing, so it reads a copy.
    The records that refine.json sets aside are left out, so is what was measured again later, and so are all but the
    `fastest` of each workload: TVM takes a while to parse a trace. `kind` is the target kind.
    """
    meta_schedule = load_meta_schedule(kind)
    refined = folder / REFINE_FILE
    aside = set(json.loads(refined.read_bytes())["set_aside"]) if refined.exists() else set()
    with tempfile.TemporaryDirectory(prefix="tvmlab-") as copy:
        for name in reversed(DATABASE_FILES):  # the records first: the workloads they name were written before them
            source = folder / name
            lines = source.read_bytes() if source.exists() else b""
            whole = lines[: lines.rfind(b"\n") + 1].splitlines(keepends=True)
            if name == DATABASE_FILES[-1]:
                whole = [whole[at] for at in latest_records(whole) if at not in aside]
                whole = whole if fastest is None else fastest_records(whole, fastest)
            (Path(copy) / name).write_bytes(b"".join(whole))
        return meta_schedule.database.JSONDatabase(work_dir=copy)


def latest_records(records: Iterable[bytes]) -> list[int]:
    """Of the lines of each schedule the last: what a search measures again it has reason to, see `core.standing`."""
    last = {}
    for at, line in enumerate(records):
        workload, (trace, *_) = orjson.loads(line)
        last[workload, orjson.dumps(trace)] = at
    return sorted(last.values())


def fastest_records(lines: Iterable[bytes], most: int) -> list[bytes]:
    """The fastest records of each workload and target; a line is [workload, [trace, seconds, target, ...]]."""
    records = list(lines)
    ranked: dict[tuple[int, bytes], list[tuple[float, int]]] = {}
    for at, line in enumerate(records):
        workload, (_, seconds, *rest) = orjson.loads(line)
        if seconds:
            target = orjson.dumps(rest[0] if rest else None, option=orjson.OPT_SORT_KEYS)
            ranked.setdefault((workload, target), []).append((median(seconds), at))
    kept = {at for found in ranked.values() for _, at in sorted(found)[:most]}
    return [line for at, line in enumerate(records) if at in kept]


def structural_key(module: Any) -> str:
    """16 hex digits that name a program: equal for equal programs, in every process.

    TVM's structural hash is 64 bits wide and signed; `IRModule.__hash__` is not stable across processes.
    """
    import tvm_ffi

    return f"{tvm_ffi.structural_hash(module) & (2**64 - 1):016x}"


def to_plain(value: Any) -> Any:
    """TVM's containers and IntImm/FloatImm as lists and numbers (`Trace.as_json` leaves them inside)."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "value"):
        return value.value
    if hasattr(value, "items"):
        return {str(key): to_plain(item) for key, item in value.items()}
    try:
        return [to_plain(item) for item in value]
    except TypeError:
        return str(value)


@contextmanager
def loading_quietly() -> Iterator[None]:
    """Leave out the line that TVM's virtual machine writes to standard error for each constant that it loads.

    They come from C++, whose standard error is the file descriptor. What else is written there meanwhile comes after.
    """
    sys.stderr.flush()
    usual = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(usual, 2)
            os.close(usual)
            written.seek(0)
            os.write(2, b"".join(line for line in written if b"Scope Loaded" not in line))


def brief(text: str, most: int = 300) -> str:
    """What an error's text says in one line: the first and the last line after a traceback that say something.

    A launch that fails is named in the first line, a grid and a block, or the kernel's source, follow; NVRTC's last
    line counts errors. Indented lines quote source.

    >>> brief("NVRTC: k.cu(3): error: no such name\\n      x = y;\\n      ^\\n\\n1 error detected in k.cu.")
    'NVRTC: k.cu(3): error: no such name … 1 error detected in k.cu.'
    """
    lines = [line.rstrip() for line in text.strip().splitlines()]
    begins = max((at for at, line in enumerate(lines[:-1], 1) if line.startswith("Traceback (")), default=0)
    telling = [line for line in lines[begins:] if re.match(r"\S.*\w\w\w", line)] or lines[-1:]
    if len(telling) > 1 and telling[0] != telling[-1]:
        half = most // 2 - 2  # a long first line must not leave out the last
        last = telling[-1][:half]
        return f"{telling[0][: most - len(last) - 3]} … {last}"
    return telling[0][:most] if telling else ""


def idle_passes(kind: str) -> list[str]:
    """The passes to leave out where kernels are compiled for a kind of target, for candidates and for models alike.

    On a CPU two of them have nothing to do, and LLVM hoists conditions itself: of 42 kernels none had other machine
    code without them, and one of Winograd's takes 430 ms to build, not 520. On CUDA the common subexpressions that TVM
    gives names may be vectors, which ThreadSync cannot take: half of the points of some templates did not build. CUDA's
    compilers find them too: where a kernel builds either way, its machine code is the same (docs/tvm.md).
    """
    if kind == "cuda":
        return ["tirx.CommonSubexprElim"]
    if kind != "llvm":
        return []
    return ["s_tir.HoistIfThenElse", "s_tir.InjectPermutedLayout", "s_tir.InjectVirtualThread"]
