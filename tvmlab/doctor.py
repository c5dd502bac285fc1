"""Whether this machine can tune: versions, compiler, CPU, GPU, disk, memory, notebook; each with a remedy."""

from __future__ import annotations

import functools
import html
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
from filelock import FileLock, Timeout

from tvmlab.core import MissingTool
from tvmlab.cuda import WHEELS, compiled_archs, cuda_compiler, gpu_problems, library_folders, nvidia_gpus
from tvmlab.hardware import MIN_DISK_BYTES, existing_folder, read_cpu, require_compiler, require_disk
from tvmlab.records import default_runs_dir
from tvmlab.roofline import child_env, default_cache_dir

__all__ = ["Check", "Diagnosis", "doctor", "require_compiler", "require_disk"]

_DISK_WARN = 2e9
_MEMORY_FAIL, _MEMORY_WARN = 500e6, 2e9
_PROBE_TIMEOUT_S = 120.0
_MARKS = {"ok": "✓", "warn": "!", "fail": "✗"}


@dataclass(frozen=True)
class Check:
    """One thing looked at: what was found, and what to do about it unless all is well."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    remedy: str = ""


class Diagnosis(list[Check]):
    """The checks as a list, shown as a table.

    >>> Diagnosis([Check("disk", "warn", "1 GB free", "free some")]).ok
    True
    """

    @property
    def ok(self) -> bool:
        """Whether nothing failed (warnings are allowed)."""
        return all(check.status != "fail" for check in self)

    def __repr__(self) -> str:
        width = max((len(check.name) for check in self), default=0)
        lines = []
        for check in self:
            lines.append(f"{_MARKS[check.status]} {check.name.ljust(width)}  {check.detail}")
            if check.remedy:
                lines.append(f"  {''.ljust(width)}  -> {check.remedy}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = (
            f"<tr><td>{_MARKS[check.status]}</td>"
            + "".join(
                f"<td style='text-align:left'>{html.escape(text)}</td>"
                for text in (check.name, check.detail, check.remedy)
            )
            + "</tr>"
            for check in self
        )
        return f"<table>{''.join(rows)}</table>"


def doctor(*, runs_dir: str | Path | None = None, cache_dir: str | Path | None = None, nvml: Any = None) -> Diagnosis:
    """Check everything that tuning needs. Takes seconds: TVM is tried in a process of its own.

    `runs_dir` and `cache_dir` are the folders that will be written (None: the defaults); `nvml` stands in for
    the module pynvml.
    """
    runs = Path(runs_dir) if runs_dir is not None else default_runs_dir()
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    probe = functools.cache(_probe_tvm)
    looks: dict[str, Callable[[], Iterable[Check]]] = {
        "versions": lambda: check_versions(pins(), _installed),
        "TVM": lambda: _check_tvm(probe()),
        "compiler": _check_compiler,
        "CPU": lambda: _check_cpu(probe()),
        "GPU": lambda: _check_gpu(nvml, probe()),
        "disk": lambda: [
            _check_disk("runs folder", runs),
            _check_disk("temporary folder", Path(tempfile.gettempdir())),
        ],
        "memory": _check_memory,
        "file locks": lambda: [_check_locks(runs)],
        "cache folder": lambda: [_check_writable(cache)],
        "notebook": _check_notebook,
    }
    found = Diagnosis()
    for name, look in looks.items():
        try:
            found.extend(look())
        except Exception as error:  # noqa: BLE001  one broken check must not hide the others
            found.append(Check(name, "fail", f"the check itself failed: {error!r}", "report this"))
    return found


def pins() -> dict[str, str]:
    """The exact versions tvmlab is made for, by package: from its metadata or the checkout's pyproject.toml.

    >>> pins()["apache-tvm-ffi"].startswith("0.1.")
    True
    """
    try:
        wanted = importlib.metadata.requires("tvmlab") or []
    except importlib.metadata.PackageNotFoundError:
        project = Path(__file__).resolve().parent.parent / "pyproject.toml"
        wanted = tomllib.loads(project.read_text())["project"]["dependencies"] if project.is_file() else []
    found = (re.fullmatch(r"([\w.-]+)\s*==\s*([\w.+!-]+)\s*", need) for need in wanted)  # extras have a marker
    return {match[1]: match[2] for match in found if match}


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_versions(wanted: Mapping[str, str], installed: Callable[[str], str | None]) -> list[Check]:
    """Compare with the pins, importing nothing: a wrong tvm-ffi takes the process down with it.

    `installed` says a package's version (None: it is not there).
    """
    python = "{}.{}.{}".format(*sys.version_info)
    checks = [Check("Python", "ok", python) if sys.version_info >= (3, 11) else Check(
        "Python", "fail", python, "install Python 3.11 or newer")]  # fmt: skip
    if not wanted:
        return [
            *checks,
            Check("versions", "warn", "tvmlab is not installed, its pins are unknown", "pip install -e ."),
        ]
    wrong = {package: found for package, pin in wanted.items() if (found := installed(package)) != pin}
    for package, found in wrong.items():
        detail = f"{found} is installed, {wanted[package]} is wanted" if found else "is not installed"
        if package == "apache-tvm-ffi" and found:
            detail += " (with others TVM crashes in TuneContext)"
        fatal = not found or package in ("apache-tvm", "apache-tvm-ffi")
        remedy = f'pip install "{package}=={wanted[package]}"'
        checks.append(Check(package, "fail" if fatal else "warn", detail, remedy))
    right = len(wanted) - len(wrong)
    return [*checks, Check("versions", "ok", f"{right} of {len(wanted)} pinned packages are as wanted")]


_PROBE = "from tvmlab.doctor import _answer_probe; _answer_probe()"


def _answer_probe() -> None:
    """Runs in a process of its own: try what tuning does first, and tell of it in JSON."""
    import tvm
    from tvm import te

    from tvmlab.compat import load_meta_schedule
    from tvmlab.targets import cpu_target

    attached = cpu_target(read_cpu(), default_cache_dir())
    ms = load_meta_schedule()
    ten = te.placeholder((16,), name="ten")
    twice = te.create_prim_func([ten, te.compute((16,), lambda i: ten[i] * 2)])
    ms.TuneContext(tvm.IRModule({"main": twice}), target=attached.to_tvm(), space_generator="post-order-apply")
    print(json.dumps({
        "version": tvm.__version__, "attrs": attached.attrs, "label": attached.label,
        "note": attached.details.get("note", ""), "vector_bits": attached.vector_bits,
        "cuda": bool(tvm.cuda(0).exist),
    }))  # fmt: skip


def _probe_tvm() -> dict[str, Any]:
    """The probe's answer, or {"error": what became of it}."""
    command = [sys.executable, "-c", _PROBE]
    folders = [*library_folders(), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    env = child_env({"LD_LIBRARY_PATH": os.pathsep.join(folders)})
    try:
        done = subprocess.run(command, env=env, capture_output=True, timeout=_PROBE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer in {_PROBE_TIMEOUT_S:.0f} s"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if done.returncode < 0:
        return {"error": f"killed by signal {-done.returncode}"}
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return {"error": lines[-1] if lines else f"exit status {done.returncode}"}


def _check_tvm(probe: Mapping[str, Any]) -> list[Check]:
    if "error" in probe:
        wanted = [f'"{name}=={pin}"' for name, pin in pins().items() if name.startswith("apache-tvm")]
        remedy = f"pip install --force-reinstall {' '.join(wanted)}"
        return [Check("TVM", "fail", f"it cannot build a TuneContext: {probe['error']}", remedy)]
    return [Check("TVM", "ok", f"{probe['version']} loads and builds a TuneContext")]


def _check_compiler() -> list[Check]:
    try:
        return [Check("compiler", "ok", f"{require_compiler()} links a shared library")]
    except MissingTool as error:
        return [Check("compiler", "fail", error.problem, error.remedy)]


def _check_cpu(probe: Mapping[str, Any]) -> list[Check]:
    cpu = read_cpu()
    if "error" in probe:
        return [Check("CPU", "warn", f"{cpu.name}, {cpu.cores} cores; what TVM makes of it is unknown", "repair TVM")]
    attrs = probe["attrs"]
    detail = f"{probe['label']}, mcpu {attrs['mcpu']}, {probe['vector_bits']} bit vectors"
    if probe["note"]:
        return [Check("CPU", "warn", f"{detail}: {probe['note']}", "nothing, or name another: target 'cpu:<mcpu>'")]
    return [Check("CPU", "ok", detail)]


def _check_gpu(nvml: Any, probe: Mapping[str, Any]) -> list[Check]:
    gpus, problems = nvidia_gpus(nvml, os.environ.get("CUDA_VISIBLE_DEVICES"))
    problems += gpu_problems(gpus)
    checks = [Check("GPU", "fail" if p.fatal else "warn", p.text, p.remedy) for p in problems]
    if not gpus:
        return checks or [Check("GPU", "ok", "no NVIDIA GPU attached: CPU only")]
    checks += [Check("GPU", "ok", f"cuda:{gpu.index} {gpu.name}, {gpu.arch}, driver {gpu.driver}") for gpu in gpus]
    if (mode := cuda_compiler()) and compiled_archs(mode):
        checks.append(Check("CUDA compiler", "ok", mode))
    if "error" not in probe and not probe["cuda"] and not any(problem.fatal for problem in problems):
        detail = "TVM sees no GPU, although CUDA's runtime library is there"
        checks.append(Check("CUDA runtime", "fail", detail, f"try nvidia-smi; if that sees the GPU, {WHEELS}"))
    return checks


def _check_disk(name: str, path: Path) -> Check:
    free = shutil.disk_usage(existing_folder(path)).free
    status: Literal["ok", "warn", "fail"] = "fail" if free < MIN_DISK_BYTES else "warn" if free < _DISK_WARN else "ok"
    return Check(name, status, f"{path}: {free / 1e9:,.1f} GB free", "" if status == "ok" else "free some space")


def _check_memory() -> list[Check]:
    free = psutil.virtual_memory().available
    status: Literal["ok", "warn", "fail"] = "fail" if free < _MEMORY_FAIL else "warn" if free < _MEMORY_WARN else "ok"
    return [Check("memory", status, f"{free / 1e9:,.1f} GB free", "" if status == "ok" else "close other programs")]


def _check_locks(runs: Path) -> Check:
    """Take a lock twice: the second must be refused, or two processes could write one run."""
    remedy = "set TVMLAB_RUNS to a folder on a local disk"
    where = existing_folder(runs)
    try:
        with tempfile.TemporaryDirectory(dir=where, prefix=".doctor-") as folder, FileLock(f"{folder}/lock"):
            try:
                FileLock(f"{folder}/lock", timeout=0).acquire()
            except Timeout:
                return Check("file locks", "ok", f"they work in {where}")
    except (OSError, NotImplementedError) as error:
        return Check("file locks", "fail", f"{where} cannot be written or locked ({error})", remedy)
    return Check("file locks", "fail", f"{where} is on a file system whose locks do not hold", remedy)


def _check_writable(cache: Path) -> Check:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            return Check("cache folder", "ok", str(cache))
    except OSError as error:
        remedy = "make it writable; until then rooflines are measured anew each time"
        return Check("cache folder", "warn", f"{cache} cannot be written ({error})", remedy)


def _check_notebook() -> list[Check]:
    versions = {name: _installed(name) for name in ("jupyterlab", "ipywidgets")}
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        return [
            Check(
                "notebook",
                "warn",
                f"{' and '.join(missing)} missing: no widgets",
                f"pip install {' '.join(missing)}",
            )
        ]
    return [Check("notebook", "ok", ", ".join(f"{name} {version}" for name, version in versions.items()))]
