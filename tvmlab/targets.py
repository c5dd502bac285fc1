"""What is attached, and any other target by name: CPU and NVIDIA GPUs, with their measured rooflines."""

from __future__ import annotations

import difflib
import functools
import html
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tvmlab import llvm
from tvmlab.core import InputError, MissingTool, RecordError, Roofline
from tvmlab.cuda import (
    Gpu,
    Problem,
    cuda_attrs,
    cuda_compiler,
    gpu_problems,
    header_env,
    l2_bytes,
    library_folders,
    nvidia_gpus,
)
from tvmlab.hardware import Cpu, read_cpu
from tvmlab.roofline import cached_roofline, default_cache_dir

__all__ = ["Target", "TargetList", "cpu_target", "gpu_targets", "require_gpu", "target", "targets"]

_EXAMPLES = "'auto', 'cpu', 'cuda:0', or to compile only 'cpu:znver5', 'nvidia/nvidia-h100', 'sm_80'"


@dataclass(frozen=True, repr=False)
class Target:
    """What kernels are built for and, where its device is attached, run on.

    `attrs` goes into tvm.target.Target; `device` is "cpu", "cuda:N" or None when only compiling is possible.
    `details` tells of the machine (cores, memory_bytes, driver, ...). All but the roofline is plain JSON.

    >>> Target("sm_80", "any sm_80", "cuda", {"kind": "cuda", "arch": "sm_80"}).roofline is None
    True
    """

    name: str
    label: str
    kind: str
    attrs: dict[str, Any] = field(hash=False)
    device: str | None = None
    details: dict[str, Any] = field(default_factory=dict, hash=False)
    _roofline: Roofline | None = field(default=None, compare=False)
    _measure: Callable[[], Roofline] | None = field(default=None, compare=False)

    def to_tvm(self) -> Any:
        """The tvm.target.Target. Raises InputError if TVM refuses the attributes."""
        import tvm

        try:
            return tvm.target.Target(self.attrs)
        except (ValueError, TypeError, RuntimeError) as error:
            problem = str(error).split(" Target creation")[0].rstrip(".")
            raise InputError(f"TVM refuses target {self.name!r}", remedy=problem) from error

    @property
    def roofline(self) -> Roofline | None:
        """The device's measured limits, from the cache or measured now (seconds); None without the device.

        If measuring fails this is None too, with a warning that says why.
        """
        if self._roofline is None and self._measure is not None:
            try:
                object.__setattr__(self, "_roofline", self._measure())
            except MissingTool as error:
                object.__setattr__(self, "_measure", None)  # it would fail again, and slowly
                warnings.warn(str(error), RuntimeWarning, stacklevel=2)
        return self._roofline

    @property
    def vector_bits(self) -> int:
        """Width of a vector register in bits; on CUDA that of a thread's widest load (float4)."""
        if self.kind == "cuda":
            return 128
        return llvm.vector_bits(llvm.features(self.attrs))

    def worker_env(self) -> dict[str, str]:
        """Environment variables of a process that builds or runs this target's kernels.

        On CUDA the compiler, its headers, and where the loader finds what TVM's CUDA runtime needs; on a CPU the
        threads: TVM's own thread count on x86 is half the logical CPUs, whatever the target says.
        """
        if self.kind == "cuda":
            mode = cuda_compiler()
            folders = [*library_folders(), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
            env = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "LD_LIBRARY_PATH": os.pathsep.join(folders)}
            return env | header_env() | ({"TVM_CUDA_COMPILE_MODE": mode} if mode else {})
        bind = self.details.get("bind_threads", False)
        return {
            "TVM_NUM_THREADS": str(self.attrs.get("num-cores", 1)),
            "TVM_BIND_THREADS": "1" if bind else "0",
        }

    def as_record(self) -> dict[str, Any]:
        """Plain JSON for environment.json, the roofline included (measured now if need be)."""
        limits = self.roofline
        return {
            "name": self.name, "label": self.label, "kind": self.kind, "attrs": self.attrs,
            "device": self.device, "details": self.details,
            "roofline": limits and {"peak_gflops": limits.peak_gflops, "bandwidth_gbs": limits.bandwidth_gbs},
        }  # fmt: skip

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Target:
        """The target of a record, with the recorded roofline; none is measured here.

        Raises RecordError if the record is damaged.
        """
        try:
            values = {name: record[name] for name in ("name", "label", "kind", "attrs", "device", "details")}
            limits = record["roofline"]
            return cls(**values, _roofline=Roofline(**limits) if limits else None)
        except (KeyError, TypeError) as error:
            raise RecordError(f"the record of a target is damaged ({error})", remedy="tune again") from error

    def row(self) -> dict[str, str]:
        """What a table shows of it."""
        limits, memory = self.roofline, self.details.get("memory_bytes")
        return {
            "name": self.name,
            "label": self.label,
            "peak GFLOP/s": f"{limits.peak_gflops:,.0f}" if limits else "",
            "GB/s": f"{limits.bandwidth_gbs:,.1f}" if limits else "",
            "arch": str(self.attrs.get("arch") or self.attrs.get("mcpu", "")),
            "memory": f"{memory / 2**30:.0f} GiB" if memory else "",
        }

    def __repr__(self) -> str:
        return f"Target({self.name!r}: {self.label})"

    def _repr_html_(self) -> str:
        return _html([self])


class TargetList(list[Target]):
    """Targets as a list; shown as a table. Showing it measures rooflines that are not in the cache yet."""

    def __repr__(self) -> str:
        rows = [list(Target("", "", "", {}).row()), *(list(item.row().values()) for item in self)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)

    def _repr_html_(self) -> str:
        return _html(self)


def _html(shown: Iterable[Target]) -> str:
    head = "".join(f"<th style='text-align:left'>{name}</th>" for name in Target("", "", "", {}).row())
    cells = (
        "".join(f"<td style='text-align:left'>{html.escape(cell)}</td>" for cell in item.row().values())
        for item in shown
    )
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def targets(*, cache_dir: str | Path | None = None, refresh: bool = False) -> TargetList:
    """What is attached: the NVIDIA GPUs, then the CPU.

    Rooflines come from `cache_dir` (None: tvmlab's folder in the user's cache); `refresh` measures them anew,
    which is worth it if the machine was busy the first time. What is wrong with a GPU is a warning each: no driver, or
    one that is too old or does not answer; no compiler, or one that does not know the card; little memory free, other
    processes on it; cards of different kinds.
    """
    gpus, problems = _gpus()
    for problem in problems:
        warnings.warn(str(problem), RuntimeWarning, stacklevel=2)
    return _attached_to(gpus, cache_dir, refresh=refresh)


def require_gpu(device: str) -> None:
    """Raise MissingTool if nothing can be tuned on a GPU ("cuda:0") as the machine is."""
    _, problems = _gpus(device)
    if fatal := next((problem for problem in problems if problem.fatal), None):
        raise MissingTool(fatal.text, remedy=fatal.remedy)


def _gpus(device: str = "") -> tuple[list[Gpu], list[Problem]]:
    """The GPUs, or the one of this name, and what is wrong with them."""
    gpus, problems = nvidia_gpus(visible=os.environ.get("CUDA_VISIBLE_DEVICES"))
    gpus = [gpu for gpu in gpus if device in ("", f"cuda:{gpu.index}")]
    return gpus, [*problems, *gpu_problems(gpus)]


def _attached_to(gpus: Iterable[Gpu], cache_dir: str | Path | None, *, refresh: bool = False) -> TargetList:
    where = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    return TargetList([*gpu_targets(gpus, where, refresh=refresh), cpu_target(read_cpu(), where, refresh=refresh)])


def cpu_target(cpu: Cpu, cache_dir: Path, *, refresh: bool = False) -> Target:
    """The attached CPU as a target: LLVM's name for it, checked against what the CPU says it has."""
    mcpu, mattr, note = llvm.host_code(llvm.host_name(), cpu.flags)
    attrs = {"kind": "llvm", "mcpu": mcpu, "num-cores": cpu.cores, "cl-opt": list(llvm.OPTIONS)}
    attrs |= {"mattr": mattr} if mattr else {}
    extensions = cpu.extensions or sorted(llvm.features(attrs) & {"avx512f", "avx2", "sse4.2", "sve", "neon"})
    details = {
        "cores": cpu.cores, "vector_extensions": extensions, "memory_bytes": cpu.memory_bytes,
        "cache_bytes": cpu.cache_bytes, "bind_threads": cpu.bind_threads,
    } | ({"note": note} if note else {})  # fmt: skip
    plural = "" if cpu.cores == 1 else "s"
    label = ", ".join([cpu.name, f"{cpu.cores} core{plural}", *extensions[:1]])
    identity = {**attrs, "cpu": cpu.name, "cache_bytes": cpu.cache_bytes, "memory_bytes": cpu.memory_bytes}
    made = Target("cpu", label, "llvm", attrs, "cpu", details)
    return _measurable(made, identity, cache_dir, refresh)


def gpu_targets(gpus: Iterable[Gpu], cache_dir: Path, *, refresh: bool = False) -> list[Target]:
    """The attached GPUs as targets, with the attributes that TVM's tag of the same card has or would have."""
    found = []
    for gpu in gpus:
        known = cuda_attrs(gpu.arch)
        attrs, details = known if known else ({"kind": "cuda", "arch": gpu.arch}, {})
        l2 = l2_bytes(gpu)
        attrs = {**attrs, **({"l2_cache_size_bytes": l2} if l2 else {})}
        details = {**details, "memory_bytes": gpu.memory_bytes, "driver": gpu.driver, "uuid": gpu.uuid}
        label = f"{gpu.name}, {gpu.memory_bytes / 2**30:.0f} GiB, {gpu.arch}"
        made = Target(f"cuda:{gpu.index}", label, "cuda", attrs, f"cuda:{gpu.index}", details)
        found.append(_measurable(made, {"uuid": gpu.uuid, "arch": gpu.arch}, cache_dir, refresh))
    return found


def _measurable(made: Target, identity: dict[str, Any], cache_dir: Path, refresh: bool) -> Target:
    request = {
        "attrs": made.attrs, "device": made.device, "threads": made.attrs.get("num-cores", 1),
        "lanes": made.vector_bits // 32, "cache_bytes": made.details.get("cache_bytes", 0),
        "memory_bytes": made.details["memory_bytes"],
    }  # fmt: skip
    measure = functools.partial(cached_roofline, request, identity, cache_dir, made.worker_env(), refresh=refresh)
    object.__setattr__(made, "_measure", measure)
    return made


def target(name: str, *, cache_dir: str | Path | None = None) -> Target:
    """A target by name.

    `name` is "auto" (the first GPU, else the CPU), "cpu", "cuda" or "cuda:1"; or, to compile only,
    "cpu:znver5" (LLVM's name of a CPU), a TVM tag such as "nvidia/nvidia-h100", "sm_80"; or a TVM target as
    JSON, which runs on the attached device if its mcpu or arch is the same. Raises InputError for anything
    else and MissingTool for a GPU where none is attached.

    >>> target("sm_80").device is None
    True
    """
    if name.startswith("{"):
        return _from_json(name, cache_dir)
    if name in ("auto", "cpu") or re.fullmatch(r"cuda(:\d+)?", name):
        return _attached(name, cache_dir)
    if name.startswith("cpu:"):
        mcpu = name.removeprefix("cpu:")
        attrs = {"kind": "llvm", "mcpu": mcpu, "num-cores": read_cpu().cores, "cl-opt": list(llvm.OPTIONS)}
        return _compile_only(name, attrs)
    if known := cuda_attrs(name):
        return Target(name, f"any {name} GPU (compile only)", "cuda", known[0], None, known[1])
    return _from_tag(name)


def _attached(name: str, cache_dir: str | Path | None) -> Target:
    gpus, problems = nvidia_gpus(visible=os.environ.get("CUDA_VISIBLE_DEVICES"))
    found = _attached_to(gpus, cache_dir)
    if name == "auto":
        return found[0]
    wanted = "cuda:0" if name == "cuda" else name
    if match := next((item for item in found if item.device == wanted), None):
        return match
    if len(found) == 1:
        why = next((f" ({problem.text})" for problem in [*problems, *gpu_problems([])]), "")
        remedy = "use 'cpu', or compile only for a named GPU such as 'nvidia/nvidia-h100' or 'sm_80'"
        raise MissingTool(f"target {name!r} needs an NVIDIA GPU and none is attached{why}", remedy=remedy)
    raise InputError(f"no target {name!r}", remedy=f"attached are {', '.join(item.name for item in found)}")


def _compile_only(name: str, attrs: dict[str, Any]) -> Target:
    """A CPU without its device. Raises InputError if LLVM does not know its mcpu."""
    mcpu = attrs.get("mcpu")
    if not mcpu:
        remedy = f'add "mcpu", such as "{llvm.host_name()}", or use \'cpu\''
        raise InputError(f"target {name!r} would be generic, several times slower", remedy=remedy)
    llvm.check_name(mcpu, attrs.get("mtriple"))
    made = Target(name, f"{mcpu} (compile only)", "llvm", attrs, None, {"cores": attrs.get("num-cores", 1)})
    made.to_tvm()
    return made


def _from_tag(name: str) -> Target:
    import tvm.target

    tags = {str(tag) for tag in tvm.target.list_tags()}
    if name not in tags:
        close = difflib.get_close_matches(name, [*tags, "auto", "cpu", "cuda:0"], n=3, cutoff=0.7)
        hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
        attached = ", ".join(item.name for item in _attached_to(_gpus()[0], None))
        raise InputError(f"unknown target {name!r}", remedy=f"{hint}attached are {attached}; names are {_EXAMPLES}")
    attrs = _plain(tvm.target.Target(name))
    _check_kind(name, attrs)
    return Target(name, f"{name} (compile only)", attrs["kind"], attrs)


def _from_json(text: str, cache_dir: str | Path | None) -> Target:
    """A TVM target as JSON, on the attached device if that is the same architecture."""
    try:
        attrs = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"target {text!r} is not JSON ({error})", remedy=f"names are {_EXAMPLES}") from None
    _check_kind(text, attrs)
    if attrs["kind"] == "llvm":
        attrs.setdefault("num-cores", read_cpu().cores)
        made = _compile_only(text, attrs)
    else:
        limits, details = cuda_attrs(attrs["arch"]) or ({}, {})
        attrs = {**limits, **attrs}
        made = Target(text, f"any {attrs['arch']} GPU (compile only)", "cuda", attrs, None, details)
        made.to_tvm()
    same = ("mcpu", "mattr", "mtriple") if made.kind == "llvm" else ("arch",)
    for item in _attached_to(_gpus()[0], cache_dir):
        if item.kind == made.kind and all(item.attrs.get(key) == attrs.get(key) for key in same):
            details = {**item.details, "cores": attrs.get("num-cores", 1)} if made.kind == "llvm" else item.details
            on_device = Target(text, item.label, made.kind, attrs, item.device, details)
            identity = {**attrs, "of": item.label, "uuid": item.details.get("uuid")}
            where = Path(cache_dir) if cache_dir is not None else default_cache_dir()
            return _measurable(on_device, identity, where, refresh=False)
    return made


def _check_kind(name: str, attrs: Any) -> None:
    if not isinstance(attrs, dict) or attrs.get("kind") not in ("llvm", "cuda"):
        kind = attrs.get("kind") if isinstance(attrs, dict) else None
        raise InputError(f"target {name!r} is of kind {kind!r}", remedy="tvmlab tunes for the kinds llvm and cuda")
    if attrs["kind"] == "cuda" and not str(attrs.get("arch", "")).startswith("sm_"):
        raise InputError(f"target {name!r} names no CUDA architecture", remedy='add it, such as "arch": "sm_80"')


def _plain(tvm_target: Any) -> dict[str, Any]:
    """A tvm target's attributes as JSON, without those that TVM derives from the others."""
    from tvmlab.compat import to_plain

    attrs = to_plain(tvm_target.export())
    host = attrs.get("host")
    return {
        key: _plain_host(host) if key == "host" and host else value
        for key, value in attrs.items()
        if key != "tag" and not key.startswith("feature.")
    }


def _plain_host(host: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in host.items() if key != "tag" and not key.startswith("feature.")}
