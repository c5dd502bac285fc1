"""CUDA spaces of whole models without a card: every task is served, and a real compiler takes the kernels."""

import shutil

import numpy as np
import pytest

from tvmlab.cuda import cuda_compiler
from tvmlab.models import load_model
from tvmlab.nvrtc import compile_lean, lean_source
from tvmlab.spaces.sketch import SketchSpace
from tvmlab.strategies import template_space
from tvmlab.targets import target
from tvmlab.tasks import extract

# Of each model every task has its spaces generated and a candidate drawn; one in so many is built.
EVERY = {"resnet50": 6, "googlenet": 12, "alexnet": 6}


def has_nvrtc():
    try:
        from cuda.bindings import nvrtc  # noqa: F401
    except ImportError:
        return False
    return True


def source_of(candidate, tvm_target):
    import tvm

    with tvm_target:
        return tvm.driver.build(candidate.payload.mod, target=tvm_target).imports[0].inspect_source()


def machine_codes(source, device, monkeypatch):
    """The machine code by each compiler that is installed: nvcc, and NVRTC from PyPI's wheels."""
    from tvm.support import nvcc

    if shutil.which("nvcc"):
        monkeypatch.setenv("TVM_CUDA_COMPILE_MODE", "nvcc")
        with device.to_tvm():
            yield bytes(nvcc.tvm_callback_cuda_compile(source))
    if has_nvrtc():
        yield compile_lean(lean_source(source), device.attrs["arch"])


def candidates(task, device):
    """A start of the task's template and a random point of its sketches, as far as there are any."""
    template = template_space(task, device)
    if template is not None:
        yield next((made for index in template.starts() if (made := template.realize(index))), None)
    sketches = SketchSpace(task.key, task.module, device.to_tvm())
    rng = np.random.default_rng(0)
    yield next((made for number in range(len(sketches)) if (made := sketches.sample(number, rng))), None)


@pytest.mark.slow
@pytest.mark.skipif(cuda_compiler() is None, reason="needs nvcc or NVRTC")
@pytest.mark.parametrize("model", EVERY)
def test_every_task_of_a_model_is_served_and_builds(model, monkeypatch):
    devices = [target("sm_90a"), target("sm_80")]
    tasks = [task for task in extract(load_model(model), devices[0]) if task.info.tunable]
    built = 0
    for number, task in enumerate(tasks):
        device = devices[number // EVERY[model] % 2]
        found = [candidate for candidate in candidates(task, device) if candidate]
        assert found, f"nothing serves {task.info.name} {task.info.shapes}"
        if number % EVERY[model] == 0:
            for candidate in found:
                source = source_of(candidate, device.to_tvm())
                assert lean_source(source) is not None
                codes = list(machine_codes(source, device, monkeypatch))
                assert codes and all(len(code) > 1000 for code in codes)
                built += 1
    assert built >= 4


@pytest.mark.slow
def test_a_kernel_of_the_first_layer_of_resnet50_is_valid_cuda(monkeypatch):
    """Its input is called gpu_0/data_0."""
    device = target("sm_80")
    task = next(task for task in extract(load_model("resnet50"), device) if "1x3x224x224" in task.info.shapes)
    source = source_of(next(candidates(task, device)), device.to_tvm())
    assert "gpu_0_data_0" in source and "/data_0" not in source
    assert all(len(code) > 1000 for code in machine_codes(source, device, monkeypatch))


@pytest.mark.skipif(not has_nvrtc(), reason="needs cuda-bindings and NVRTC")
def test_nvrtc_compiles_without_headers_and_says_what_is_wrong():
    kernel = 'extern "C" __global__ void k(float* x, uint n) { if (threadIdx.x < n) x[threadIdx.x] = INFINITY; }'
    assert len(compile_lean(lean_source(kernel), "sm_80")) > 500
    with pytest.raises(RuntimeError, match="NVRTC"):
        compile_lean(lean_source(kernel.replace("INFINITY", "nothing")), "sm_80")


@pytest.mark.parametrize("body", ["half h;", "__nv_bfloat16 b;", "nvcuda::wmma::mma_sync(a);", 'asm("exit;");'])
def test_what_needs_headers_is_left_to_tvm(body):
    assert lean_source('#include <cuda.h>\nextern "C" __global__ void k(float* x) { x[0] = 1; ' + body + "}") is None


def test_lean_source_leaves_out_what_stands_before_the_kernels():
    lean = lean_source('#include <cuda_fp16.h>\nstruct half2;\nextern "C" __global__ void k(float* x) { x[0] = 1; }')
    assert "half2" not in lean and "#include" not in lean and lean.rstrip().endswith("x[0] = 1; }")
    assert lean_source("int x;") is None
