"""CUDA spaces of whole models without a card: every task is served, and a real compiler takes the kernels."""

import contextlib
import itertools
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import stub_driver
from net import Net
from stub_driver import has_nvrtc

from tvmlab import cuda
from tvmlab.compat import idle_passes, load_meta_schedule
from tvmlab.cuda import cuda_compiler, library_folders
from tvmlab.measure.builder import BuilderPool
from tvmlab.models import load_model
from tvmlab.nvrtc import compile_lean, lean_source
from tvmlab.spaces.sketch import SketchSpace
from tvmlab.strategies import template_space
from tvmlab.targets import target
from tvmlab.tasks import default_gpu_schedule, extract

_EM_CUDA = 190  # the machine of an ELF file that a GPU runs

_DRAWS = 4
# Of each model every task has its spaces generated and a candidate drawn; one in so many is built.
EVERY = {"resnet50": 6, "googlenet": 12, "alexnet": 6}


def source_of(candidate, tvm_target, disabled=None):
    """CUDA's source as the build workers make it."""
    import tvm

    disabled = idle_passes("cuda") if disabled is None else disabled
    with tvm_target, tvm.transform.PassContext(disabled_pass=disabled):
        return tvm.driver.build(candidate.payload.mod, target=tvm_target).imports[0].inspect_source()


def machine_codes(source, device, monkeypatch):
    """The machine code by each compiler that is installed: NVRTC from PyPI's wheels, the faster, and nvcc."""
    from tvm.support import nvcc

    if has_nvrtc():
        yield compile_lean(lean_source(source), device.attrs["arch"])
    if shutil.which("nvcc"):
        monkeypatch.setenv("TVM_CUDA_COMPILE_MODE", "nvcc")
        with device.to_tvm():
            yield bytes(nvcc.tvm_callback_cuda_compile(source))


def candidates(task, device):
    """A start of the task's template, None where it has none, and a random point of its sketches.

    Of AlexNet's dense layers few points are valid: one of 4096 to 1000 comes with the second seed only.
    """
    template = template_space(task, device)
    start = template and next((made for index in template.starts() if (made := template.realize(index))), None)
    sketches = SketchSpace(task.key, task.module, device.to_tvm())
    draws = ((number, np.random.default_rng(seed)) for seed in range(_DRAWS) for number in range(len(sketches)))
    return start, next((made for number, rng in draws if (made := sketches.sample(number, rng))), None)


def tunable(model):
    return [task for task in extract(load_model(model), target("sm_90a")) if task.info.tunable]


@pytest.mark.slow
@pytest.mark.skipif(cuda_compiler() is None, reason="needs nvcc or NVRTC")
@pytest.mark.parametrize("arch", ["sm_90a", "sm_80"])
@pytest.mark.parametrize("model", EVERY)
def test_every_task_of_a_model_is_served_and_a_sample_builds(model, arch, monkeypatch):
    """By sketches each, convolutions and dense layers by their template too."""
    device, built = target(arch), 0
    for number, task in enumerate(tunable(model)):
        start, drawn = candidates(task, device)
        about = f"{task.info.name} {task.info.shapes}"
        assert drawn, f"no sketch serves {about}"
        has_template = any(word in task.info.kernel_class for word in ("conv2d", "matmul"))
        assert bool(start) == has_template, f"a template of {about}"
        if number % EVERY[model] == 0:
            for candidate in filter(None, (start, drawn)):
                source = source_of(candidate, device.to_tvm())
                assert lean_source(source) is not None
                codes = list(machine_codes(source, device, monkeypatch))
                assert codes and all(len(code) > 1000 for code in codes)
                built += 1
    assert built >= 4


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(cuda_compiler() is None, reason="needs nvcc or NVRTC")
@pytest.mark.parametrize("model", EVERY)
def test_every_task_of_a_model_builds(model, monkeypatch):
    """For both architectures, by the faster compiler."""
    for device, task in itertools.product([target("sm_90a"), target("sm_80")], tunable(model)):
        for candidate in filter(None, candidates(task, device)):
            source = source_of(candidate, device.to_tvm())
            assert len(next(machine_codes(source, device, monkeypatch))) > 1000, task.info.name


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(cuda_compiler() is None, reason="needs nvcc or NVRTC")
@pytest.mark.parametrize("model", EVERY)
def test_every_default_kernel_of_a_model_builds(model, monkeypatch):
    """TVM's default schedule is what every candidate is checked against, and what an untuned task runs."""
    from tvm.s_tir import Schedule

    meta_schedule, device = load_meta_schedule("cuda"), target("sm_90a")
    verify = meta_schedule.postproc.VerifyGPUCode()
    generator = meta_schedule.space_generator.ScheduleFn(
        lambda schedule: None, sch_rules=[], postprocs=[verify], mutator_probs={}
    )
    for task in extract(load_model(model), device):
        with device.to_tvm():
            scheduled = default_gpu_schedule(task.module)
        context = meta_schedule.TuneContext(
            mod=task.module, target=device.to_tvm(), space_generator=generator, num_threads=1
        )
        assert context.space_generator.postprocs[0].apply(Schedule(scheduled)), task.info.name
        source = source_of(SimpleNamespace(payload=SimpleNamespace(mod=scheduled)), device.to_tvm())
        assert len(next(machine_codes(source, device, monkeypatch))) > 1000, task.info.name


WHOLE = """
from tvmlab.models import load_model
from tvmlab.nvrtc import compile_kernels
from tvmlab.targets import target
from tvmlab.tasks import compile_model, lower
compile_kernels()
device = target("sm_90a")
lowered, _ = lower(load_model(model), device)
built = compile_model(lowered, device)
assert "cuda_graph.run_or_capture" in built.as_text()
built.export_library(f"{folder}/model.so")
"""


@stub_driver.needed
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("model", EVERY)
def test_a_whole_model_is_compiled_to_one_program(model, tmp_path):
    """All of its kernels through NVRTC at once, as a comparison loads it."""
    stub_driver.output_of(f"model, folder = {model!r}, {str(tmp_path)!r}\n{WHOLE}", tmp_path)
    assert cubins(tmp_path / "model.so") == 1


@pytest.mark.slow
def test_a_kernel_of_the_first_layer_of_resnet50_is_valid_cuda(monkeypatch):
    """Its input is called gpu_0/data_0."""
    device = target("sm_80")
    task = next(task for task in extract(load_model("resnet50"), device) if "1x3x224x224" in task.info.shapes)
    source = source_of(candidates(task, device)[0], device.to_tvm())
    assert "gpu_0_data_0" in source and "/data_0" not in source
    assert all(len(code) > 1000 for code in machine_codes(source, device, monkeypatch))


def test_a_vector_in_a_common_subexpression_is_no_obstacle(tmp_path):
    """TVM names common subexpressions that are vectors and then fails on them: an odd image, loaded in vectors."""
    import tvm

    net = Net(1, 16, 27, 27)
    device, tvm_target = target("sm_90a"), target("sm_90a").to_tvm()
    model = net.model(tmp_path, net.conv("x", 16, 32, kernel=3, pads=[1] * 4))
    (task,) = [task for task in extract(model, device) if task.info.tunable]
    template = template_space(task, device)
    points = (number for number in range(len(template)) if template[number]["vector"] == 4)
    made = (candidate for number in points if (candidate := template.realize(number)))
    found = list(itertools.islice(made, 12))
    refused = 0
    for candidate in found:
        assert "__global__" in source_of(candidate, tvm_target)
        with contextlib.suppress(tvm.error.InternalError):
            source_of(candidate, tvm_target, disabled=[])
            continue
        refused += 1
    assert len(found) == 12 and refused > 0


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


def cubins(library):
    """How many GPU programs there are in a shared library."""
    content = Path(library).read_bytes()
    starts = [found.start() for found in re.finditer(b"\x7fELF", content)]
    return sum(int.from_bytes(content[at + 18 : at + 20], "little") == _EM_CUDA for at in starts)


ROOFLINE = """
import tvm
from tvmlab.roofline import _cuda_copy, _cuda_fma, _cuda_kernel
from tvmlab.targets import target
card = target("sm_90a").to_tvm()
assert tvm.target.Target.current() is None
for name, function in (("fma", _cuda_fma(8, 256, 8, 1 << 14)), ("copy", _cuda_copy(8, 256))):
    _cuda_kernel(function, card).export_library(f"{folder}/{name}.so")
"""


@stub_driver.needed
def test_the_kernels_of_the_roofline_compile_for_real(tmp_path):
    """The compiler asks the target's scope for the architecture, and `tvm.compile` enters none."""
    stub_driver.output_of(f"folder = {str(tmp_path)!r}\n{ROOFLINE}", tmp_path)
    assert [cubins(tmp_path / f"{name}.so") for name in ("fma", "copy")] == [1, 1]


def wheel_headers():
    return [path for path in cuda.wheel_roots() if (path / "include" / "cuda_fp16.h").exists()]


@pytest.fixture
def no_toolkit(monkeypatch, tmp_path):
    """A machine with the wheels only."""
    folders = [folder for folder in os.environ["PATH"].split(os.pathsep) if not (Path(folder) / "nvcc").exists()]
    monkeypatch.setenv("PATH", os.pathsep.join(folders))
    monkeypatch.setattr(cuda, "_TOOLKIT", tmp_path / "none", raising=False)
    for name in ("CUDA_PATH", "TVM_CUDA_COMPILE_MODE", "TVM_CUDA_NVRTC_EXTRA_OPTS"):
        monkeypatch.delenv(name, raising=False)


HALF = """
import os
exists = os.path.exists
os.path.exists = lambda path: not str(path).startswith("/usr/local/cuda") and exists(path)  # as on such a machine
import tvm
from tvm import te
from tvmlab.nvrtc import compile_kernels
from tvmlab.tasks import default_gpu_schedule
compile_kernels()
x = te.placeholder((64,), "float16", name="x")
function = te.create_prim_func([x, te.compute((64,), lambda i: te.exp(x[i]))])
card = tvm.target.Target({"kind": "cuda", "arch": "sm_90"})
with card:
    built = tvm.driver.build(default_gpu_schedule(tvm.IRModule({"main": function})), target=card)
assert "half" in built.imports[0].inspect_source()
built.export_library(f"{folder}/half.so")
"""


@stub_driver.needed
@pytest.mark.skipif(not wheel_headers(), reason="needs the headers of the wheels")
def test_float16_is_compiled_with_the_headers_of_the_wheels(no_toolkit, monkeypatch, tmp_path):
    """TVM's callback looks for them where a toolkit is installed, and the C++ library not where the wheel has it."""
    for name, value in target("sm_90").worker_env().items():
        monkeypatch.setenv(name, value)
    stub_driver.output_of(f"folder = {str(tmp_path)!r}\n{HALF}", tmp_path)
    assert cubins(tmp_path / "half.so") == 1


@pytest.mark.skipif(not wheel_headers(), reason="needs the headers of the wheels")
def test_a_toolkit_or_what_the_user_says_comes_before_the_headers_of_the_wheels(no_toolkit, monkeypatch, tmp_path):
    wheels = target("sm_90").worker_env()
    assert Path(wheels["CUDA_PATH"], "include", "cuda_fp16.h").exists()
    monkeypatch.setenv("TVM_CUDA_NVRTC_EXTRA_OPTS", "--ftz=false")
    assert target("sm_90").worker_env()["TVM_CUDA_NVRTC_EXTRA_OPTS"].endswith("/cccl --ftz=false")
    monkeypatch.setenv("CUDA_PATH", "/opt/cuda")
    assert not {"CUDA_PATH", "TVM_CUDA_NVRTC_EXTRA_OPTS"} & target("sm_90").worker_env().keys()
    monkeypatch.delenv("CUDA_PATH")
    (tmp_path / "none" / "bin").mkdir(parents=True)
    (tmp_path / "none" / "bin" / "nvcc").touch()
    assert "CUDA_PATH" not in target("sm_90").worker_env()


@stub_driver.needed
def test_a_build_worker_makes_a_library_with_machine_code_that_loads(tiny_model, tmp_path):
    """All but the launch: the real workers compile for sm_90a; the host's part loads and knows its GPU program."""
    import tvm

    device = target("sm_90a")
    task = next(task for task in extract(tiny_model, device) if "conv2d" in task.info.kernel_class)
    with device.to_tvm():
        scheduled = default_gpu_schedule(task.module)
    environment = stub_driver.environment(tmp_path)
    pool = BuilderPool(device.attrs, 1, 120.0, tmp_path, tmp_path / "log.txt", environment)
    try:
        build = pool.submit(tvm.ir.save_json(scheduled)).result()
    finally:
        pool.close()
    assert build.status == "ok", build.message
    assert cubins(build.path) == 1
    script = f"import tvm; made = tvm.runtime.load_module({build.path!r}); print(made['main'], made.imports[0].kind)"
    assert stub_driver.output_of(script, tmp_path).split()[-1] == "cuda"


LOADED = """
from tvmlab.cuda import load_runtime
assert load_runtime()
import tvm
assert tvm.get_global_func("device_api.cuda", allow_missing=True) is not None
print(*{line.split()[-1] for line in open("/proc/self/maps") if "libcudart" in line})
"""


@stub_driver.needed
def test_tvms_cuda_runtime_takes_cudas_that_was_loaded_first(tmp_path, monkeypatch):
    """As `tvmlab.load` does in a user's process, whose loader knows no folder of the wheels, or another CUDA's."""
    environment = stub_driver.environment(tmp_path) | {"LD_LIBRARY_PATH": str(tmp_path)}  # the driver's stub alone
    monkeypatch.setattr(stub_driver, "environment", lambda folder: environment)
    wanted = Path(library_folders()[0], "libcudart.so.13").resolve()
    assert [Path(found) for found in stub_driver.output_of(LOADED, tmp_path).split()] == [wanted]


@stub_driver.needed
def test_the_process_of_a_device_without_a_driver_says_what_cuda_said(tmp_path):
    request = ("default", "key", [([4], "float32")], "", {})
    script = f"from tvmlab.measure.device import Device; print(Device('cuda:0').answer({request}))"
    assert "cudaErrorInsufficientDriver" in stub_driver.output_of(script, tmp_path)
