"""NVIDIA GPUs: which are attached, what keeps them from being used, and what compiles for them. Imports no TVM."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil

__all__ = [
    "Gpu",
    "Problem",
    "compiled_archs",
    "cuda_attrs",
    "cuda_compiler",
    "gpu_problems",
    "header_env",
    "l2_bytes",
    "library_folders",
    "load_runtime",
    "nvidia_gpus",
    "wheel_roots",
]

_TOOLKIT = Path("/usr/local/cuda")
_COMPILERS = ("nvrtc", "nvcc")  # as TVM_CUDA_COMPILE_MODE names them
WHEELS = "pip install -e '.[cuda]' in tvmlab's checkout"
_RUNTIME = 13  # the major version of CUDA that TVM's runtime is linked to
_LEAST_DRIVER = "580"  # the first driver of CUDA 13 (CUDA 13.0 release notes, table "CUDA Toolkit and Driver")
_LEAST_FREE_BYTES = 2 << 30
_L2_CACHE_SIZE = 38  # CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE, cuda.h


class Problem(NamedTuple):
    """What is wrong with a GPU and what to do about it; `fatal` if nothing can be tuned on it so."""

    text: str
    remedy: str
    fatal: bool = False

    def __str__(self) -> str:
        return f"{self.text}: {self.remedy}"


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU, numbered as CUDA numbers it when CUDA_DEVICE_ORDER is PCI_BUS_ID.

    `cuda` is the newest CUDA that the driver supports; `free_bytes` and `others`, the number of processes that use it
    and are not tvmlab's, are of this moment.
    """

    index: int
    name: str
    capability: tuple[int, int]
    memory_bytes: int
    driver: str
    uuid: str
    cuda: tuple[int, int] = (_RUNTIME, 0)
    free_bytes: int = _LEAST_FREE_BYTES
    others: int = 0

    @property
    def arch(self) -> str:
        """The architecture as TVM names it: from compute capability 9.0 on with the suffix of all features.

        >>> Gpu(0, "NVIDIA H200", (9, 0), 0, "", "").arch, Gpu(0, "NVIDIA A100", (8, 0), 0, "", "").arch
        ('sm_90a', 'sm_80')
        """
        major, minor = self.capability
        return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def nvidia_gpus(nvml: Any = None, visible: str | None = None) -> tuple[list[Gpu], list[Problem]]:
    """The GPUs that NVML lists, and what went wrong on the way.

    `nvml` is the module pynvml or one like it; `visible` is what CUDA_VISIBLE_DEVICES says (None: all).
    Without NVML's library there is no driver: no GPU, and nothing wrong unless there is a card.
    """
    nvml = importlib.import_module("pynvml") if nvml is None else nvml
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        if error.value == nvml.NVML_ERROR_LIBRARY_NOT_FOUND:
            return [], []
        return [], [Problem(f"the NVIDIA driver does not answer ({error})", _REPAIR)]
    try:
        return _list_gpus(nvml, visible)
    except nvml.NVMLError as error:
        return [], [Problem(f"the NVIDIA driver does not list its GPUs ({error})", _REPAIR)]
    finally:
        nvml.nvmlShutdown()


_REPAIR = "try nvidia-smi; reinstall the driver or reboot"


def _list_gpus(nvml: Any, visible: str | None) -> tuple[list[Gpu], list[Problem]]:
    driver = _string(nvml.nvmlSystemGetDriverVersion())
    cuda = divmod(int(nvml.nvmlSystemGetCudaDriverVersion()) // 10, 100)  # 13020 is 13.2
    found: list[Gpu | None] = []
    problems = []
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            found.append(Gpu(
                index=index,
                name=_string(nvml.nvmlDeviceGetName(handle)),
                capability=tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle)),
                memory_bytes=int(memory.total),
                driver=driver,
                uuid=_string(nvml.nvmlDeviceGetUUID(handle)),
                cuda=(cuda[0], cuda[1]),
                free_bytes=int(memory.free),
                others=_strangers(nvml, handle),
            ))  # fmt: skip
        except nvml.NVMLError as error:
            found.append(None)
            problems.append(Problem(f"GPU {index} does not answer ({error})", _REPAIR))
    chosen = found if visible is None else _visible(found, visible)
    return [replace(gpu, index=number) for number, gpu in enumerate(chosen) if gpu is not None], problems


def _strangers(nvml: Any, handle: Any) -> int:
    """How many processes compute on a GPU that are not tvmlab's; 0 where the driver does not say."""
    try:
        pids = {process.pid for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle)}
    except nvml.NVMLError:
        return 0
    return sum(not _is_ours(pid) for pid in pids)


def _is_ours(pid: int) -> bool:
    """Whether a process is this one or a worker of tvmlab's."""
    try:
        return pid == os.getpid() or any(word.startswith("tvmlab.") for word in psutil.Process(pid).cmdline())
    except psutil.Error:
        return False


def _visible(gpus: Sequence[Gpu | None], visible: str) -> list[Gpu | None]:
    """CUDA's own rule: indices or UUID prefixes, in the order given, up to the first that names no GPU."""
    chosen: list[Gpu | None] = []
    for word in (word.strip() for word in visible.split(",")):
        if word.isdigit() and int(word) < len(gpus):
            chosen.append(gpus[int(word)])
            continue
        match = [gpu for gpu in gpus if gpu is not None and word and gpu.uuid.startswith(word)]
        if len(match) != 1:
            break
        chosen.append(match[0])
    return chosen


def _string(text: str | bytes) -> str:
    return text.decode() if isinstance(text, bytes) else text


def gpu_problems(gpus: Sequence[Gpu], pci: Path = Path("/sys/bus/pci/devices")) -> list[Problem]:
    """What keeps the attached GPUs from being tuned on, or from being measured well.

    `gpus` are those that `nvidia_gpus` found; `pci` is where Linux lists the cards that are plugged in.
    """
    if not gpus:
        text = "an NVIDIA card is plugged in, but no driver is loaded"
        return [Problem(text, f"install NVIDIA's driver {_LEAST_DRIVER} or newer")] if _has_card(pci) else []
    found = [problem for gpu in gpus for problem in _of_one(gpu)]
    if not load_runtime():
        text = f"CUDA's runtime library, libcudart.so.{_RUNTIME}, is not found, which TVM's is linked to"
        found.append(Problem(text, WHEELS, fatal=True))
    found += _of_compiler(gpus)
    if len({gpu.name for gpu in gpus}) > 1:
        text = f"the GPUs are of different kinds ({'; '.join(f'cuda:{gpu.index} is {gpu.name}' for gpu in gpus)})"
        found.append(Problem(text, "what is tuned for one is not for the other: name the target, such as 'cuda:0'"))
    return found


def _of_one(gpu: Gpu) -> Iterable[Problem]:
    name = f"cuda:{gpu.index} ({gpu.name})"
    if gpu.cuda[0] < _RUNTIME:
        text = f"the driver {gpu.driver} supports CUDA {gpu.cuda[0]}.{gpu.cuda[1]}, TVM's runtime needs {_RUNTIME}.0"
        yield Problem(text, f"install NVIDIA's driver {_LEAST_DRIVER} or newer", fatal=True)
    if gpu.free_bytes < _LEAST_FREE_BYTES:
        text = f"{name} has {gpu.free_bytes / 2**30:.1f} of its {gpu.memory_bytes / 2**30:.0f} GiB of memory free"
        yield Problem(text, "end what uses it (nvidia-smi lists the processes), or choose another GPU")
    if gpu.others:
        processes = f"{gpu.others} other process{'es'[: 2 * (gpu.others > 1)]}"
        remedy = "latencies measured beside them are wrong: wait for their end, or choose another GPU"
        yield Problem(f"{name} is in use by {processes}", remedy)


def _of_compiler(gpus: Sequence[Gpu]) -> Iterable[Problem]:
    mode = cuda_compiler()
    if mode is None:
        yield Problem("there is no CUDA compiler, neither NVRTC nor nvcc", WHEELS, fatal=True)
        return
    if mode not in _COMPILERS:
        remedy = f"say {' or '.join(map(repr, _COMPILERS))}, or unset it"
        yield Problem(f"TVM_CUDA_COMPILE_MODE says {mode!r}, which is no compiler", remedy, fatal=True)
        return
    known = compiled_archs(mode)
    if not known:
        remedy = f"put it on the PATH, or unset TVM_CUDA_COMPILE_MODE and {WHEELS}" if mode == "nvcc" else WHEELS
        yield Problem(f"the CUDA compiler {mode} does not answer", remedy, fatal=True)
        return
    for arch in dict.fromkeys(gpu.arch for gpu in gpus):
        if arch.rstrip("af") not in known:
            newest = max(known, key=lambda name: int(name.removeprefix("sm_")))
            text = f"{mode} does not know {arch}, the architecture of {next(g.name for g in gpus if g.arch == arch)}"
            yield Problem(text, f"it knows up to {newest}: install a newer CUDA, or {WHEELS}", fatal=True)


def _has_card(pci: Path) -> bool:
    """Whether a display or compute device of NVIDIA's is plugged in."""
    for vendor in pci.glob("*/vendor"):
        try:
            if vendor.read_text().strip() == "0x10de" and (vendor.parent / "class").read_text().startswith("0x03"):
                return True
        except OSError:
            continue
    return False


def l2_bytes(gpu: Gpu) -> int:
    """The size of a GPU's L2 cache as its driver tells it; 0 where it does not.

    Asked of the driver and not of TVM, whose CUDA runtime is loaded in some processes and not in others.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count, device, size, name = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), (ctypes.c_ubyte * 16)()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    for number in range(count.value):
        if driver.cuDeviceGet(ctypes.byref(device), number) or driver.cuDeviceGetUuid(name, device):
            continue
        if gpu.uuid == f"GPU-{uuid.UUID(bytes=bytes(name))}":
            failed = driver.cuDeviceGetAttribute(ctypes.byref(size), _L2_CACHE_SIZE, device)
            return 0 if failed else size.value
    return 0


# The largest shared memory a thread block may opt in to, in KiB, by compute capability: CUDA C++ Programming
# Guide, appendix "Compute Capabilities", table "Technical Specifications per Compute Capability" (CCCL's
# cuda/__device/arch_traits.h has the same numbers). Threads per block (1024), warp size (32) and the shared
# memory of a kernel that does not opt in, which is TVM's limit (48 KiB), are equal for all.
_OPT_IN_KIB = {
    "50": 48, "52": 48, "53": 48, "60": 48, "61": 48, "62": 48, "70": 96, "72": 96, "75": 64, "80": 163,
    "86": 99, "87": 163, "88": 99, "89": 99, "90": 227, "100": 227, "103": 227, "110": 227, "120": 99,
    "121": 99,
}  # fmt: skip
_HALF_REGISTERS = {"53", "62"}  # 32K registers a block, from the same table


def cuda_attrs(arch: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """TVM's target attributes of a CUDA architecture, and its details; None for an unknown architecture.

    >>> attrs, details = cuda_attrs("sm_90a")
    >>> attrs["max_shared_memory_per_block"], details["shared_memory_optin_bytes"]
    (49152, 232448)
    """
    match = re.fullmatch(r"sm_(\d+)[af]?", arch)
    if not match or match[1] not in _OPT_IN_KIB:
        return None
    attrs = {
        "kind": "cuda",
        "arch": arch,
        "max_threads_per_block": 1024,
        "max_num_threads": 1024,
        "thread_warp_size": 32,
        "registers_per_block": 32768 if match[1] in _HALF_REGISTERS else 65536,
        "max_shared_memory_per_block": 49152,
    }
    return attrs, {"shared_memory_optin_bytes": _OPT_IN_KIB[match[1]] * 1024}


def cuda_compiler() -> str | None:
    """What compiles CUDA here, as TVM_CUDA_COMPILE_MODE names it: 'nvrtc' (the faster), 'nvcc' or None.

    If that variable is set, what it says.
    """
    if named := os.environ.get("TVM_CUDA_COMPILE_MODE", "").lower():
        return named
    if importlib.util.find_spec("cuda") and importlib.util.find_spec("cuda.bindings"):
        return "nvrtc"
    return "nvcc" if shutil.which("nvcc") else None


@functools.cache
def compiled_archs(mode: str) -> frozenset[str]:
    """The architectures that the compiler knows, such as sm_90, without suffix; empty if it does not answer."""
    if mode not in _COMPILERS:
        return frozenset()
    if mode == "nvcc":
        try:
            done = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return frozenset()
        return frozenset(re.findall(r"^sm_\d+", done.stdout, re.M))
    try:
        nvrtc = importlib.import_module("cuda.bindings.nvrtc")
        result, archs = nvrtc.nvrtcGetSupportedArchs()
    except (ImportError, RuntimeError):
        return frozenset()
    return frozenset(f"sm_{arch}" for arch in archs) if int(result) == 0 else frozenset()


def wheel_roots() -> list[Path]:
    """The folders in which NVIDIA's wheels have their `lib` and `include`."""
    spec = importlib.util.find_spec("nvidia")
    return [Path(root) / f"cu{_RUNTIME}" for root in (spec.submodule_search_locations if spec else None) or ()]


def header_env() -> dict[str, str]:
    """Environment variables with which TVM's NVRTC callback finds the wheels' headers; none if a toolkit has its own.

    TVM takes CUDA_PATH, else the folder of nvcc, and looks for the C++ library where a toolkit has it, not the wheel.
    """
    if "CUDA_PATH" in os.environ or shutil.which("nvcc") or (_TOOLKIT / "bin" / "nvcc").exists():
        return {}
    for root in wheel_roots():
        if (root / "include" / "cuda_runtime.h").exists():
            options = [shlex.quote(f"-I{root}/include/cccl"), os.environ.get("TVM_CUDA_NVRTC_EXTRA_OPTS", "")]
            return {"CUDA_PATH": str(root), "TVM_CUDA_NVRTC_EXTRA_OPTS": " ".join(filter(None, options))}
    return {}


def library_folders() -> list[str]:
    """The folders of the CUDA libraries that came as wheels or beside nvcc, for the loader's path.

    TVM's runtime needs libcudart.so.13, NVRTC its libnvrtc-builtins, where the loader finds them.
    """
    wheels = [root / "lib" for root in wheel_roots()]
    toolkits = [Path(nvcc).resolve().parents[1] for nvcc in filter(None, [shutil.which("nvcc")])]
    toolkits += [_TOOLKIT, *sorted(Path("/usr/local").glob(f"cuda-{_RUNTIME}*"))]
    found = [*wheels, *(kit / lib for kit in toolkits for lib in ("lib64", "lib"))]
    # One set of libraries: the wheels' are also those that torch uses.
    return [str(folder) for folder in found if (folder / f"libcudart.so.{_RUNTIME}").exists()][:1]


def load_runtime() -> bool:
    """Load CUDA's runtime library into this process, where TVM's, which is linked to it, then finds it; whether it is.

    To be called before TVM is imported. tvmlab's own processes find it by the loader's path instead. Its symbols stay
    its own (no RTLD_GLOBAL): another CUDA's libraries may be in the process.
    """
    name = f"libcudart.so.{_RUNTIME}"
    for path in [*(f"{folder}/{name}" for folder in library_folders()), name]:
        try:
            ctypes.CDLL(path)
        except OSError:
            continue
        return True
    return False
