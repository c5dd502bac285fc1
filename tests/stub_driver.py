"""A libcuda.so.1 that knows no device: with it TVM's CUDA runtime loads, so that kernels are compiled for real."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tvmlab.cuda import library_folders

_FAILS = (
    "cuDeviceGetName cuFuncSetAttribute cuLaunchKernelEx cuModuleGetFunction cuModuleLoadData cuModuleUnload "
    "cuTensorMapEncodeTiled"
)
_SOURCE = """
int cuGetErrorName(int error, const char** text) { *text = "CUDA_ERROR_NO_DEVICE"; return 0; }
int cuGetErrorString(int error, const char** text) { *text = "no CUDA-capable device is detected"; return 0; }
""" + "\n".join(f"int {name}(void) {{ return 100; }}" for name in _FAILS.split())


def has_nvrtc():
    return bool(importlib.util.find_spec("cuda") and importlib.util.find_spec("cuda.bindings"))


needed = pytest.mark.skipif(
    not (has_nvrtc() and library_folders() and shutil.which("cc")),
    reason="needs NVRTC, CUDA's runtime library and a C compiler",
)


def environment(folder):
    """What a process needs beside this one's environment to load TVM's CUDA runtime; the stub is put into `folder`."""
    (folder / "stub.c").write_text(_SOURCE)
    library = folder / "libcuda.so.1"
    command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", str(library), str(folder / "stub.c")]
    subprocess.run(command, check=True)
    paths = os.pathsep.join([str(folder), *library_folders()])
    return {"LD_LIBRARY_PATH": paths, "TVM_CUDA_COMPILE_MODE": "nvrtc", "CUDA_VISIBLE_DEVICES": ""}


def output_of(script, folder):
    """What a Python script prints in a process where TVM's CUDA runtime loads."""
    root = str(Path(__file__).parents[1])
    env = {**os.environ, **environment(folder), "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
