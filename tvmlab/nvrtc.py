"""CUDA source compiled by NVRTC in this process, without the headers that float32 kernels do not use.

TVM's own callback has NVRTC parse the headers of half precision, fp8, fp6, fp4 and libcu++ for every kernel, most of
the time that a build takes (docs/gpu.md), and needs those headers: with this one the wheels of cuda-bindings and
nvidia-cuda-nvrtc are enough. Options are those of `tvm.support.nvcc`, so that the machine code is the same.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from typing import Any

__all__ = ["compile_kernels", "compile_lean", "lean_source"]

_CALLBACK = "tvm_callback_cuda_compile"
_KERNELS = 'extern "C" __global__'
# What a kernel of float32, integers and booleans may use of what TVM writes, or includes, before the first kernel.
_PREAMBLE = """
typedef signed char int8_t; typedef short int16_t; typedef int int32_t; typedef long long int64_t;
typedef unsigned char uint8_t; typedef unsigned short uint16_t; typedef unsigned int uint32_t;
typedef unsigned long long uint64_t; typedef unsigned char uchar; typedef unsigned short ushort;
typedef unsigned int uint; typedef unsigned long ulong;
#define INFINITY (__int_as_float(0x7f800000))
#define CUDART_INF_F INFINITY
"""
_OTHERS = re.compile(
    r"\b(half\w*|__half\w*|nv_bfloat\w+|__nv_\w+|\w*fp[468]\w*|__pack_\w+|nvcuda|wmma|asm|cuda::\w+|tvm_\w+)"
)


def lean_source(source: str) -> str | None:
    """The kernels of a CUDA source of TVM's with what little they need; None if they may need its headers.

    >>> lean_source('#include <cuda_fp16.h>\\nextern "C" __global__ void k(half* x) { x[0] = x[1]; }') is None
    True
    """
    at = source.find(_KERNELS)
    kernels = source[at:]
    return None if at < 0 or _OTHERS.search(kernels) else _PREAMBLE + kernels


def compile_lean(source: str, arch: str) -> bytes:
    """A cubin of a source that includes nothing, for an architecture such as sm_90a.

    Raises RuntimeError with NVRTC's words if it does not compile.
    """
    from cuda.bindings import nvrtc

    level = os.environ.get("TVM_CUDA_PTXAS_REG_LEVEL", "10")
    options = [
        f"--gpu-architecture={arch}",
        "-default-device",
        "--device-int128",
        "--use_fast_math",
        f"--ptxas-options=--register-usage-level={level}",
    ]
    _, program = nvrtc.nvrtcCreateProgram(source.encode(), b"tvm_kernels.cu", 0, None, None)
    try:
        (result,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if int(result) != 0:
            _, size = nvrtc.nvrtcGetProgramLogSize(program)
            log = bytearray(size)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"NVRTC: {log.decode(errors='replace').strip(chr(0)) or result}")
        _, size = nvrtc.nvrtcGetCUBINSize(program)
        cubin = bytearray(size)
        nvrtc.nvrtcGetCUBIN(program, cubin)
        return bytes(cubin)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


@functools.cache
def compile_kernels() -> None:
    """Have TVM compile in this process by `compile_lean` what needs no headers, the rest as before.

    Nothing changes where TVM_CUDA_COMPILE_MODE says nvcc.
    """
    import tvm_ffi
    from tvm.support import nvcc  # registers TVM's own

    usual: Callable[[str], Any] = nvcc.tvm_callback_cuda_compile

    def compiled(source: str) -> Any:
        lean = lean_source(source) if os.environ.get("TVM_CUDA_COMPILE_MODE", "nvrtc").lower() == "nvrtc" else None
        return usual(source) if lean is None else compile_lean(lean, _arch())

    tvm_ffi.register_global_func(_CALLBACK, compiled, override=True)


def _arch() -> str:
    """The architecture of the target in whose scope TVM compiles; outside of any, as TVM does, of the attached GPU.

    `tvm.compile` enters no scope of its own, whatever target it is given.
    """
    from tvm.support.nvcc import get_target_compute_version

    return f"sm_{get_target_compute_version().replace('.', '')}"  # which says 9.0.a
