"""CUDA templates: what they compute (emulated on the CPU), what they refuse, and that real compilers take them."""

import random
import re
import shutil

import cuda_emulator
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tvmlab.compat import load_meta_schedule, structural_key
from tvmlab.models import load_model
from tvmlab.spaces.template import TemplateSpace, template_for
from tvmlab.targets import target
from tvmlab.tasks import arguments, extract

_CHANNELS, _SIZE = 12, 13
# Operators on an input of 12 channels, 13x13: output channels, kernel, stride, padding, groups, batch.
_CONVS = {
    "3x3": (16, 3, 1, 1, 1, 1),
    "5x5 stride 2": (8, 5, 2, 2, 1, 2),
    "3x3 grouped": (24, 3, 1, 1, 3, 1),
    "3x3 without epilogue": (4, 3, 1, 0, 1, 1),
    "1x1": (20, 1, 1, 0, 1, 1),
    "1x1 stride 2": (8, 1, 2, 0, 1, 2),
    "1x1 grouped": (16, 1, 1, 0, 2, 1),
}
_ROWS = {"dense": 1, "dense of a batch": 6}


@pytest.fixture(scope="module")
def sm_80():
    return target("sm_80")


@pytest.fixture(scope="module")
def modules(tmp_path_factory, cpu):
    """The tasks of a model that has every kind of operator with a template, by name."""
    rng = np.random.default_rng(0)
    nodes, constants, outputs, inputs = [], [], [], [(f"x{n}", [n, _CHANNELS, _SIZE, _SIZE]) for n in (1, 2)]

    def constant(name, *shape):
        constants.append(numpy_helper.from_array(rng.standard_normal(shape, dtype="float32"), name))
        return name

    for number, (name, (channels, kernel, stride, pad, groups, batch)) in enumerate(_CONVS.items()):
        operands = [f"x{batch}", constant(f"w{number}", channels, _CHANNELS // groups, kernel, kernel)]
        options = {"strides": [stride] * 2, "pads": [pad] * 4, "group": groups}
        if "without epilogue" in name:
            nodes.append(helper.make_node("Conv", operands, [f"y{number}"], **options))
        else:
            operands.append(constant(f"b{number}", channels))
            nodes.append(helper.make_node("Conv", operands, [f"c{number}"], **options))
            nodes.append(helper.make_node("Relu", [f"c{number}"], [f"y{number}"]))
        size = _outputs(kernel, stride, pad)
        outputs.append((f"y{number}", [batch, channels, size, size]))
    for number, rows in enumerate(_ROWS.values()):
        inputs.append((f"r{number}", [rows, 64]))
        names = [f"r{number}", constant(f"m{number}", 64, 24), constant(f"n{number}", 24)]
        nodes.append(helper.make_node("Gemm", names, [f"z{number}"]))
        outputs.append((f"z{number}", [rows, 24]))
    values = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in group] for group in (inputs, outputs)]
    graph = helper.make_graph(nodes, "every", *values, constants)
    path = tmp_path_factory.mktemp("models") / "every.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    tasks = extract(load_model(str(path)), cpu)
    return {name: _task_of(tasks, *shapes) for name, shapes in _shapes()}


def _outputs(kernel, stride, pad):
    """Rows, and columns, of a convolution's output."""
    return (_SIZE + 2 * pad - kernel) // stride + 1


def _shapes():
    """Each operator's name, and the shapes of its weights and output."""
    for name, (channels, kernel, stride, pad, groups, batch) in _CONVS.items():
        size = _outputs(kernel, stride, pad)
        yield name, ((channels, _CHANNELS // groups, kernel, kernel), (batch, channels, size, size))
    for name, rows in _ROWS.items():
        yield name, ((64, 24), (rows, 24))


def _task_of(tasks, weights, output):
    """The module of the task with these shapes."""
    shapes = {task.key: [shape for shape, _ in arguments(task.module)] for task in tasks}
    (found,) = (task for task in tasks if (shapes[task.key][1], shapes[task.key][-1]) == (weights, output))
    return found.module


@pytest.fixture(scope="module")
def space(modules, sm_80):
    """`space(name)`: the template space of a task."""
    return lambda name: TemplateSpace(structural_key(modules[name]), modules[name], sm_80.to_tvm())


def _valid(space, wanted=lambda values: True, count=1):
    """Valid points drawn with a fixed seed, whose values are `wanted`."""
    rng = random.Random(0)
    drawn = (rng.randrange(len(space)) for _ in range(50_000))
    found = (index for index in drawn if not space.why_not(index) and wanted(space[index]))
    return [next(found) for _ in range(count)]


def _parts(values):
    """How many blocks a reduction is split over."""
    return values["k_parts"] if "k_parts" in values else values["c"][1] if "c" in values else values["k"][0]


def _source(candidate, tvm_target):
    """The CUDA source of a candidate."""
    import tvm

    with tvm_target:
        return tvm.driver.build(candidate.payload.mod, target=tvm_target).imports[0].inspect_source()


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler to emulate a GPU")
@pytest.mark.parametrize("name", [*_CONVS, *_ROWS])
def test_kernels_compute_what_the_task_computes(name, modules, space, sm_80, tmp_path):
    import tvm

    module, points = modules[name], space(name)
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape, dtype="float32") for shape, _ in arguments(module)]
    tensors = [tvm.runtime.tensor(array) for array in arrays]
    tvm.driver.build(module, target=tvm.target.Target("llvm"))["main"](*tensors)
    expected = tensors[-1].numpy()
    assert np.abs(expected).max() > 1  # not a reference of zeros
    for kernels, wanted in ((1, lambda values: _parts(values) == 1), (2, lambda values: _parts(values) > 1)):
        (index,) = _valid(points, wanted)
        candidate = points.realize(index)
        assert len(cuda_emulator.launches(candidate.payload)) == kernels
        folder = tmp_path / str(kernels)
        folder.mkdir()
        source = _source(candidate, sm_80.to_tvm())
        for result in cuda_emulator.run(source, candidate.payload, arrays, folder):
            np.testing.assert_allclose(result, expected, atol=1e-5 * np.abs(expected).max(), err_msg=str(points[index]))


@pytest.mark.parametrize("name", ["3x3", "1x1", "dense", "dense of a batch"])
def test_the_work_told_of_a_block_is_that_of_the_kernel(name, space, sm_80):
    points = space(name)
    for index in [points.starts()[0], *_valid(points, count=2)]:
        candidate, work = points.realize(index), points.template.work(points[index])
        source = _source(candidate, sm_80.to_tvm()).split("main_kernel(")[2].split("main_kernel_1(")[0]
        bound = cuda_emulator.launches(candidate.payload)[0]
        threads = bound["threadIdx.x"] * bound.get("threadIdx.y", 1)
        assert (bound["blockIdx.x"], threads) == (work.blocks, work.threads)
        shared = 4 * sum(int(words) for words in re.findall(r"__shared__ alignas\(\d+\) float \w+\[(\d+)\]", source))
        assert shared <= work.shared_bytes <= shared + 4 * 4 * 32, points[index]  # a last row needs no skew


def test_starts_are_valid_cheap_and_the_same_every_time(space):
    points = space("3x3")
    starts = points.starts()
    assert 0 < len(starts) == len(set(starts)) <= 12
    assert starts == space("3x3").starts()
    costs = [points.template.cost(points[index]) for index in starts]
    assert costs == sorted(costs)
    random_costs = [points.template.cost(points[index]) for index in _valid(points, count=50)]
    assert costs[0] <= min(random_costs)


def test_points_that_a_gpu_would_refuse_say_why(space):
    points = space("3x3")
    reasons = {reason for index in range(len(points)) if (reason := points.why_not(index))}
    kinds = {kind for kind in ("threads", "shared memory", "vectors") if any(kind in reason for reason in reasons)}
    assert kinds == {"threads", "vectors"}
    big = {"f": (1, 16, 1), "y": (1, 13, 1), "x": (1, 13, 1), "c": (12, 1), "unroll": True, "vector": 1}
    assert "2704 threads" in points.template.why_not(big)
    assert points.realize(points.index_of(big)) is None


def test_a_row_of_features_has_the_same_length_at_every_point(space):
    for name in ("3x3", "1x1", "dense"):
        points = space(name)
        rows = [points.encode(index) for index in (0, len(points) - 1, points.starts()[0])]
        assert len({row.shape for row in rows}) == 1
        assert all(np.isfinite(row).all() for row in rows)


def test_other_operators_have_no_template(tiny_tasks, sm_80):
    assert template_for(tiny_tasks["reshape"].module, sm_80.to_tvm()) is None
    assert template_for(tiny_tasks["conv2d+relu"].module, sm_80.to_tvm()).name == "conv2d_nchw direct"


def test_a_record_of_a_template_gives_the_same_program_again(modules, space):
    from tvm.s_tir import Schedule, Trace

    for name in ("3x3 grouped", "1x1 stride 2", "dense"):
        candidate = space(name).realize(_valid(space(name), lambda values: _parts(values) > 1)[0])
        again = Schedule(modules[name])
        Trace.apply_json_to_schedule(candidate.payload.trace.as_json(), again)
        assert structural_key(again.mod) == candidate.key


@pytest.mark.slow
@pytest.mark.parametrize("model", ["alexnet", "googlenet", "resnet50"])
@pytest.mark.parametrize("named", ["nvidia/nvidia-h100", "sm_80"])
def test_every_convolution_and_dense_layer_has_points_that_fit_the_gpu(model, named):
    meta_schedule = load_meta_schedule("cuda")
    tvm_target = target(named).to_tvm()
    covered = 0
    for task in extract(load_model(model), target(named)):
        if not any(word in task.info.kernel_class for word in ("conv2d", "matmul")):
            continue
        points = TemplateSpace(task.key, task.module, tvm_target)
        verify = meta_schedule.postproc.VerifyGPUCode()
        generator = meta_schedule.space_generator.ScheduleFn(
            lambda schedule: None, sch_rules=[], postprocs=[verify], mutator_probs={}
        )
        context = meta_schedule.TuneContext(
            mod=task.module, target=tvm_target, space_generator=generator, num_threads=1
        )
        for index in [*points.starts()[:2], *_valid(points)]:
            candidate = points.realize(index)
            assert candidate is not None, (task.info.name, points[index])
            assert context.space_generator.postprocs[0].apply(candidate.payload), (task.info.name, points[index])
        covered += 1
    assert covered >= 8


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("name", ["3x3", "1x1", "dense", "dense of a batch"])
@pytest.mark.parametrize("named", ["nvidia/nvidia-h100", "sm_80"])
def test_nvcc_compiles_the_first_start(name, named, modules, monkeypatch):
    from tvm.support import nvcc

    monkeypatch.setenv("TVM_CUDA_COMPILE_MODE", "nvcc")
    tvm_target = target(named).to_tvm()
    points = TemplateSpace("0" * 16, modules[name], tvm_target)
    source = _source(points.realize(points.starts()[0]), tvm_target)
    with tvm_target:
        assert len(nvcc.tvm_callback_cuda_compile(source)) > 1000
