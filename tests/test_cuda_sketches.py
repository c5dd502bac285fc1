"""CUDA sketches: what is refused without asking TVM, and that float32 needs no rules of tensor cores."""

import numpy as np
import pytest

from tvmlab.compat import load_meta_schedule, load_wmma
from tvmlab.spaces import sketch
from tvmlab.spaces.sketch import SketchSpace
from tvmlab.targets import target


@pytest.fixture(scope="module")
def space(tiny_tasks):
    task = tiny_tasks["conv2d+relu"]
    return SketchSpace(task.key, task.module, target("sm_80").to_tvm())


def test_no_valid_point_is_refused_beforehand(space, monkeypatch):
    """TVM's own sampler, and its own opinion, of points that were not looked at before."""
    from tvm.s_tir import Trace

    drawn = [space.replay(Trace(space.sketches[seed % len(space)].insts, {}), seed + 1) for seed in range(90)]
    valid = [candidate for candidate in drawn if candidate]
    assert len(valid) >= 3
    assert all(sketch._fits_gpu(candidate.decisions) for candidate in valid)
    rng = np.random.default_rng(0)
    points = [space.random(number % len(space), rng) for number in range(150)]
    refused = [point for point in points if not sketch._fits_gpu(point[1])]
    assert len(refused) > len(points) / 3
    monkeypatch.setattr(sketch, "_fits_gpu", lambda decisions: True)
    assert [point for point in refused if (made := space.realize(point)) and list(made.decisions) == point[1]] == []


def test_valid_points_are_drawn_and_are_the_same_for_a_seed(space):
    first, again = ([space.sample(0, np.random.default_rng(seed)) for seed in range(4)] for _ in range(2))
    assert all(first) and [made.key for made in first] == [made.key for made in again]
    assert len({made.key for made in first}) > 1


@pytest.mark.slow
def test_tensor_core_rules_add_nothing_to_float32(tiny_tasks):
    ours, theirs = [], []
    for kind in ("conv2d+relu", "matmul+add"):
        task = tiny_tasks[kind]
        tvm_target = target("sm_90a").to_tvm()
        ours.append(SketchSpace(task.key, task.module, tvm_target)._shapes)
        meta_schedule = load_meta_schedule("cuda")
        load_wmma()
        context = meta_schedule.TuneContext(
            mod=task.module, target=tvm_target, space_generator="post-order-apply", rand_state=1, num_threads=1
        ).clone()
        theirs.append([sketch._split(found.trace.simplified(True))[0] for found in context.generate_design_space()])
    assert ours == theirs


def test_a_compiled_model_is_a_cuda_graph(tmp_path):
    """Of four layers the two in the middle: the first reads the model's input, the last writes its output."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from tvmlab.models import load_model
    from tvmlab.tasks import compile_model, lower

    rng = np.random.default_rng(0)
    names = ["gpu_0/x", "a", "b", "c", "y"]
    weights = [rng.standard_normal((8, 8, 1, 1), dtype=np.float32) for _ in names[1:]]
    nodes = [helper.make_node("Conv", [names[n], f"w{n}"], [names[n + 1]]) for n in range(4)]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 8, 6, 6]) for name in (names[0], names[-1])]
    constants = [numpy_helper.from_array(weight, f"w{n}") for n, weight in enumerate(weights)]
    graph = helper.make_graph(nodes, "four", values[:1], values[1:], constants)
    path = tmp_path / "four.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    device = target("sm_80")
    lowered, _ = lower(load_model(str(path)), device)
    captured, launched = (compile_model(lowered, device, cuda_graph=wanted).as_text() for wanted in (True, False))
    assert "cuda_graph.run_or_capture" in captured and "cuda_graph" not in launched
