"""What the machine has: the CPU this process may use, a C compiler, disk. Imports no TVM."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tvmlab.core import MissingTool

__all__ = [
    "MIN_DISK_BYTES",
    "Cpu",
    "compiler",
    "existing_folder",
    "read_cpu",
    "require_compiler",
    "require_disk",
]

MIN_DISK_BYTES = 200e6  # with less, builds and logs start to fail in mid-run

_ROOT = Path("/")

# Widest first: the first one the CPU has goes into the label.
_EXTENSIONS = {
    "avx512f": "AVX-512", "avx2": "AVX2", "avx": "AVX", "sse4_2": "SSE4.2", "sve": "SVE", "asimd": "NEON",
    "avx512_vnni": "VNNI", "avx512_bf16": "BF16", "avx512_fp16": "FP16", "amx_tile": "AMX", "fma": "FMA",
}  # fmt: skip


@dataclass(frozen=True)
class Cpu:
    """The CPU this process may use.

    `cores` are physical cores after affinity and the cgroup's quota; `flags` are the kernel's names of the
    instruction sets (empty where the system lists none); `cache_bytes` is the sum of the last-level caches,
    `memory_bytes` the RAM or the cgroup's limit. `bind_threads` says whether TVM may pin its threads: it pins
    thread i to CPU i, whatever the affinity, so CPUs 0..cores-1 must be allowed and be distinct cores.
    """

    name: str
    cores: int
    flags: frozenset[str]
    cache_bytes: int
    memory_bytes: int
    bind_threads: bool

    @property
    def extensions(self) -> list[str]:
        """Vector extensions by their usual names, the widest first."""
        return [label for flag, label in _EXTENSIONS.items() if flag in self.flags]


def read_cpu(root: Path = _ROOT, allowed: Collection[int] | None = None) -> Cpu:
    """Look at the CPU. `root` is where /proc and /sys hang; `allowed` are logical CPUs (None: ask)."""
    allowed = _allowed_cpus(root) if allowed is None else allowed
    info = _cpuinfo(root)
    core_of = {cpu: _core_id(root, cpu) for cpu in sorted(allowed)}
    cores = len(set(core_of.values()))
    if not (root / "sys/devices/system/cpu/cpu0/topology").is_dir():
        cores = min(cores, psutil.cpu_count(logical=False) or cores)
    cores = max(1, math.floor(min(cores, _cpu_quota(root))))  # more threads than quota are only throttled
    first = range(cores)
    return Cpu(
        name=_clean(info.get("model name") or platform.processor() or platform.machine()),
        cores=cores,
        flags=frozenset((info.get("flags") or info.get("Features") or "").split()),
        cache_bytes=_last_level_cache(root, allowed),
        memory_bytes=_memory(root),
        bind_threads=all(cpu in core_of for cpu in first) and len({core_of[cpu] for cpu in first}) == cores,
    )


def _allowed_cpus(root: Path) -> set[int]:
    """Logical CPUs open to this process: over all its threads, as TVM narrows the main one's affinity."""
    if not hasattr(os, "sched_getaffinity"):
        return set(range(os.cpu_count() or 1))
    allowed = set(os.sched_getaffinity(0))
    for thread in (root / "proc/self/task").glob("[0-9]*"):
        with contextlib.suppress(ProcessLookupError):  # the thread ended meanwhile
            allowed |= os.sched_getaffinity(int(thread.name))
    return allowed


def _cpuinfo(root: Path) -> dict[str, str]:
    """The first processor's block of /proc/cpuinfo."""
    block = _text(root / "proc/cpuinfo").split("\n\n")[0]
    pairs = (line.partition(":") for line in block.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _clean(name: str) -> str:
    return " ".join(re.sub(r"\((R|TM|r|tm)\)|\bCPU\b", " ", name).split())


def _core_id(root: Path, cpu: int) -> tuple[str, str]:
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    return _text(topology / "physical_package_id"), _text(topology / "core_id") or f"cpu{cpu}"


def _last_level_cache(root: Path, allowed: Collection[int]) -> int:
    """Bytes of all distinct caches of the highest level; 0 where unknown."""
    sizes: dict[tuple[int, str], int] = {}
    for cpu in allowed:
        for index in (root / f"sys/devices/system/cpu/cpu{cpu}/cache").glob("index*"):
            size = re.fullmatch(r"(\d+)K", _text(index / "size"))
            if size:
                where = (int(_text(index / "level")), _text(index / "shared_cpu_list"))
                sizes[where] = int(size[1]) * 1024
    last = max((level for level, _ in sizes), default=0)
    return sum(size for (level, _), size in sizes.items() if level == last)


def _cpu_quota(root: Path) -> float:
    """CPUs' worth of time the cgroup grants; infinity without a limit."""
    quotas = [math.inf]
    for folder in _cgroup_folders(root, "cpu"):
        quota, _, period = _text(folder / "cpu.max").partition(" ")  # v2: "max 100000" or "150000 100000"
        if not quota:
            quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):
            quotas.append(int(quota) / int(period))
    return min(quotas)


def _memory(root: Path) -> int:
    limits = [psutil.virtual_memory().total]
    for folder in _cgroup_folders(root, "memory"):
        limit = _text(folder / "memory.max") or _text(folder / "memory.limit_in_bytes")
        if limit.isdigit():
            limits.append(int(limit))
    return min(limits)


def _cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's cgroup, of both versions, from the innermost to the mount's root.

    Inside a container the path in /proc/self/cgroup may be the host's: missing folders read as empty.
    """
    mounts = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            tops = [mounts, mounts / "unified"]
        elif controller in controllers.split(","):
            tops = [mounts / controllers, mounts / controller]
        else:
            continue
        parts = Path(path.lstrip("/")).parts
        for top in tops:
            yield from (top.joinpath(*parts[:count]) for count in range(len(parts), -1, -1))


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def compiler() -> str | None:
    """The C/C++ compiler that TVM will call: CXX or CC of the environment, else the first it knows."""
    if named := os.environ.get("CXX") or os.environ.get("CC"):
        return named
    found = map(shutil.which, ("g++", "gcc", "clang++", "clang", "c++", "cc"))
    return next((path for path in found if path), None)


def require_compiler() -> str:
    """The compiler TVM links kernels with, tried on a one-line program (once per compiler, about 50 ms).

    Raises MissingTool if there is none or it does not produce a shared library.
    """
    found = compiler()
    if found is None:
        raise MissingTool("there is no C compiler", remedy="install one, e.g. apt install g++ or conda install gxx")
    _try_compiler(found, os.environ.get("PATH", ""))
    return found


@functools.cache
def _try_compiler(command: str, path: str) -> None:
    """Link a one-line shared library as TVM does; `path` is only there so that a new PATH is tried anew."""
    with tempfile.TemporaryDirectory(prefix="tvmlab-cc-") as folder:
        source, library = Path(folder, "one.c"), Path(folder, "one.so")
        source.write_text("int one(void) { return 1; }\n")
        try:
            done = subprocess.run(
                [command, "-shared", "-fPIC", "-o", str(library), "-x", "c", str(source)],
                capture_output=True, text=True, timeout=60,
            )  # fmt: skip
            words = "" if library.exists() else (done.stderr.strip().splitlines() or ["no output"])[-1]
        except (OSError, subprocess.TimeoutExpired) as error:
            words = str(error)
    if words:
        remedy = "install it with its linker (apt install g++ binutils), or set CXX to one that works"
        raise MissingTool(f"the compiler {command} does not link a shared library ({words})", remedy=remedy)


def existing_folder(path: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def require_disk(path: str | Path, bytes_needed: float = MIN_DISK_BYTES) -> None:
    """Raise MissingTool unless so many bytes are free where `path` is or will be."""
    free = shutil.disk_usage(existing_folder(Path(path))).free
    if free < bytes_needed:
        problem = f"{path} has {free / 1e6:,.0f} MB free, {bytes_needed / 1e6:,.0f} MB are needed"
        raise MissingTool(problem, remedy="free some, or set TVMLAB_RUNS to a folder on another disk")
