"""What LLVM knows of CPUs: names, instruction sets, how this machine's CPU fits in; and what it is told of stacks."""

from __future__ import annotations

import difflib
import functools
import platform
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tvmlab.core import InputError

__all__ = ["align_stacks", "aligned", "check_name", "features", "host_code", "host_name", "linux_flags", "vector_bits"]

# What LLVM calls an instruction set, and what Linux calls it.
_LLVM_FLAGS = {
    "avx": "avx", "avx2": "avx2", "fma": "fma", "f16c": "f16c", "avx512f": "avx512f", "avx512bw": "avx512bw",
    "avx512cd": "avx512cd", "avx512dq": "avx512dq", "avx512vl": "avx512vl", "avx512vnni": "avx512_vnni",
    "avx512bf16": "avx512_bf16", "avx512fp16": "avx512_fp16", "avxvnni": "avx_vnni", "amx-tile": "amx_tile",
}  # fmt: skip
# Micro-architecture levels, best first (x86-64 psABI, "Micro-Architecture Levels"), in Linux's names.
_LEVELS = {
    "x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx2", "fma", "bmi2"},
    "x86-64-v3": {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"},
    "x86-64-v2": {"cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3"},
}
_ARM_FLAGS = {"sve": "+sve", "asimddp": "+dotprod", "asimdhp": "+fullfp16"}

# Schedules say themselves what is a vector. LLVM's search for further ones in straight-line code takes up to half of
# an unrolled kernel's compile time and seldom finds one worth having (docs/tvm.md).
OPTIONS = ("-vectorize-slp=0",)

_BUILD = "target.build.llvm"
_LINE_BYTES = 64  # a cache line, and the widest vector
_DEFINED = re.compile(r"^define\b.* #(\d+)\b[^#\n]*\{$", re.MULTILINE)


def host_name() -> str:
    """LLVM's name of this machine's CPU."""
    import tvm.target.codegen as codegen

    return str(codegen.llvm_get_system_cpu())


def host_code(llvm_name: str, flags: frozenset[str]) -> tuple[str, list[str], str]:
    """The mcpu, mattr and a note for a CPU that LLVM calls `llvm_name` and that has `flags` (as in Linux).

    LLVM says "generic" of a CPU newer than itself, and names a CPU by its model even where a hypervisor hides
    some of its instructions: neither may pass silently, as one is several times slower and the other crashes.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        extra = [llvm for flag, llvm in _ARM_FLAGS.items() if flag in flags] if llvm_name == "generic" else []
        return llvm_name, extra, "LLVM does not know this CPU by name" if llvm_name == "generic" else ""
    if not flags:
        return llvm_name, [], ""
    mcpu, note = llvm_name, ""
    known = features({"kind": "llvm", "mcpu": mcpu})
    if mcpu in ("generic", "x86-64") or vector_bits(known) < vector_bits(flags):
        mcpu = next((level for level, needs in _LEVELS.items() if needs <= flags), "x86-64")
        note = f"LLVM knows this CPU only as {llvm_name!r}; {mcpu!r} has its vector extensions"
        known = features({"kind": "llvm", "mcpu": mcpu})
    hidden = [llvm for llvm, flag in _LLVM_FLAGS.items() if llvm in known and flag not in flags]
    if hidden:
        note = f"this {mcpu} does not show {', '.join(hidden)} (hidden by a hypervisor?)"
    return mcpu, [f"-{name}" for name in hidden], note


def features(attrs: Mapping[str, Any]) -> set[str]:
    """LLVM's names of the instruction sets (and tuning hints) that a tvm target's attributes amount to."""
    import tvm
    import tvm.target.codegen as codegen

    return {str(name) for name in codegen.llvm_get_cpu_features(tvm.target.Target(dict(attrs)))}


def linux_flags(attrs: Mapping[str, Any]) -> list[str]:
    """The vector instruction sets that code for a tvm target's attributes may use, as /proc/cpuinfo calls them."""
    known = features(attrs)
    return sorted(flag for name, flag in _LLVM_FLAGS.items() if name in known)


def vector_bits(features: Iterable[str]) -> int:
    """Width of a vector register in bits, from LLVM's or Linux's feature names.

    TVM's own `llvm_get_vector_width` says 512 of every x86-64.

    >>> vector_bits({"avx", "avx2"}), vector_bits({"neon"})
    (256, 128)
    """
    names = set(features)
    if "avx512f" in names:
        return 512
    return 256 if "avx" in names else 128


def check_name(mcpu: Any, triple: str | None = None) -> None:
    """Raise InputError if LLVM knows no CPU of that name (TVM would take a generic one and only log it)."""
    import tvm.target
    import tvm.target.codegen as codegen

    triple = triple or str(codegen.llvm_get_system_triple())
    if isinstance(mcpu, str) and codegen.llvm_is_valid_cpu(mcpu, triple):
        return
    probe = tvm.target.Target({"kind": "llvm", "mcpu": "generic", "mtriple": triple})
    names = [str(name) for name in codegen.llvm_get_cpu_archlist(probe)]
    close = difflib.get_close_matches(str(mcpu), names, n=4, cutoff=0.5) or names[-4:] or ["another triple"]
    raise InputError(f"LLVM knows no CPU {mcpu!r} for {triple}", remedy=f"it knows {', '.join(close)}")


@functools.cache
def align_stacks() -> None:
    """Have TVM compile x86 code in this process whose functions align their stack frames to a cache line.

    A function that runs out of vector registers keeps vectors on the stack. LLVM aligns these slots to 16 bytes only,
    as the stack itself, unless the function was to have a frame pointer before registers were allocated
    (`VirtRegMap::createSpillSlot`); so three processes of four, as the address of their stack falls, load and store
    vectors across two cache lines, or two pages. Kernels took up to 2.4 times as long there (docs/tvm.md).
    """
    import tvm_ffi

    usual = tvm_ffi.get_global_func(_BUILD)

    def build(module: Any, target: Any) -> Any:
        built = usual(module, target)
        triple = str(target.attrs.get("mtriple", "")) or platform.machine()
        return _reloaded(built) if triple.startswith(("x86", "AMD64")) else built

    tvm_ffi.register_global_func(_BUILD, build, override=True)


def _reloaded(built: Any) -> Any:
    """A module of LLVM's with aligned stack frames. It is optimised already, and no machine code yet."""
    import tvm

    with tempfile.TemporaryDirectory(prefix="tvmlab-") as folder:
        path = Path(folder) / "module.ll"
        path.write_text(aligned(built.inspect_source("ll")))
        return tvm.runtime.load_module(str(path))


def aligned(source: str) -> str:
    """LLVM's assembly language, the frames of the functions that it defines aligned to a cache line.

    >>> aligned('define i32 @f(ptr %a) #0 {\\nattributes #0 = { noinline }\\nattributes #1 = { nounwind }')
    'define i32 @f(ptr %a) #0 {\\nattributes #0 = { alignstack=64 noinline }\\nattributes #1 = { nounwind }'
    """
    groups = "|".join(sorted(set(_DEFINED.findall(source)))) or "none"
    return re.sub(rf"^(attributes #(?:{groups}) = \{{)", rf"\1 alignstack={_LINE_BYTES}", source, flags=re.MULTILINE)
