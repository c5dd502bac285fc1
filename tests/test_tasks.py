"""Tasks: what a model is cut into, and what is said of each piece."""

import math

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tvmlab import tasks as tasks_frame
from tvmlab.core import InputError, Roofline
from tvmlab.models import load_model
from tvmlab.tasks import _stem, arguments, compile_model, extract, lower, require_tunable


def conv_net(path, *, layers):
    """An ONNX file of 3x3 convolutions with relu, each `(channels in, channels out)`, on 12x12."""
    rng = np.random.default_rng(0)
    nodes, weights, last = [], [], "x"
    for number, (inputs, outputs) in enumerate(layers):
        weight = rng.standard_normal((outputs, inputs, 3, 3), dtype=np.float32) * 0.1
        weights.append(numpy_helper.from_array(weight, f"w{number}"))
        nodes.append(helper.make_node("Conv", [last, f"w{number}"], [f"c{number}"], pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [f"c{number}"], [f"r{number}"]))
        last = f"r{number}"
    shapes = ([1, layers[0][0], 12, 12], [1, layers[-1][1], 12, 12])
    graph = helper.make_graph(
        nodes,
        "convs",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shapes[0])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, shapes[1])],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return load_model(str(path))


@pytest.fixture(scope="module")
def convs(tmp_path_factory):
    """Four convolutions, two of them the same work."""
    path = tmp_path_factory.mktemp("convs") / "convs.onnx"
    return conv_net(path, layers=[(4, 8), (8, 8), (8, 8), (8, 16)])


def test_the_tiny_model_has_its_three_tasks(tiny_tasks):
    assert {name: task.info.tunable for name, task in tiny_tasks.items()} == {
        "conv2d+relu": True,
        "matmul+add": True,
        "reshape": False,
    }


def test_flops_and_bytes_are_exact(tiny_tasks):
    conv, gemm, reshape = (tiny_tasks[name].info for name in ("conv2d+relu", "matmul+add", "reshape"))
    outputs = 16 * 14 * 14
    assert conv.flops == 2 * 8 * 3 * 3 * outputs + outputs  # multiply and add; and the relu
    assert conv.bytes_moved == 4 * (8 * 14 * 14 + 16 * 8 * 3 * 3 + outputs)
    assert gemm.flops == 2 * 3136 * 10 + 10
    assert gemm.bytes_moved == 4 * (3136 + 3136 * 10 + 10 + 10)
    assert reshape.flops == 0
    assert conv.intensity == pytest.approx(conv.flops / conv.bytes_moved)
    assert conv.shapes == "1x8x14x14 16x8x3x3 1x16x14x14"


def test_kernel_classes_hold_no_ordinals(convs, cpu):
    found = extract(convs, cpu)
    assert [task.info.kernel_class for task in found] == ["conv2d+relu"] * 3
    assert len({task.info.name for task in found}) == 3


def test_weights_count_how_often_the_work_occurs(convs, cpu):
    weights = {task.info.shapes: task.info.weight for task in extract(convs, cpu)}
    assert weights["1x8x12x12 8x8x3x3 1x8x12x12"] == 2
    assert sum(weights.values()) == 4  # one each for the four convolutions with their relu


def test_keys_are_distinct_and_the_same_every_time(convs, cpu):
    first, second = ([task.key for task in extract(convs, cpu)] for _ in range(2))
    assert first == second
    assert len(set(first)) == len(first)
    assert all(len(key) == 16 and int(key, 16) >= 0 for key in first)


def test_the_same_work_has_the_same_key_in_another_model(convs, cpu, tmp_path):
    other = conv_net(tmp_path / "other.onnx", layers=[(8, 8), (8, 4)])
    shared = {task.key for task in extract(convs, cpu)} & {task.key for task in extract(other, cpu)}
    assert len(shared) == 1


def test_the_frame_shares_sum_to_one(tiny_model, cpu):
    frame = tasks_frame(tiny_model, cpu)
    assert frame["share"].sum() == pytest.approx(1)
    assert list(frame["share"]) == sorted(frame["share"], reverse=True)
    assert frame.loc["reshape", "share"] == 0 and not frame.loc["reshape", "tunable"]
    limit = Roofline(peak_gflops=1e4, bandwidth_gbs=1e3)
    row = frame.loc[frame["kernel_class"] == "conv2d+relu"].iloc[0]
    assert row["roofline_us"] == pytest.approx(limit.latency_s(row["flops"], row["bytes"]) * 1e6)


def test_without_a_device_there_is_no_roofline(tiny_model):
    frame = tasks_frame(tiny_model, "cpu:znver4")
    assert frame["roofline_us"].isna().all()
    assert frame["share"].sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("conv2d", "conv2d"),
        ("conv2d15", "conv2d"),
        ("log2", "log2"),
        ("log21", "log2"),
        ("log2_relu", "log2_relu"),
        ("add7", "add"),
        ("max_pool2d3", "max_pool2d"),
        ("atan2", "atan"),  # not an operator of this model: the digit is TVM's ordinal
        ("matmul", "matmul"),
    ],
)
def test_ordinals_go_and_digits_of_operators_stay(name, stem):
    assert _stem(name, {"conv2d", "log2", "log", "add", "max_pool2d", "matmul"}) == stem


def test_arguments_are_inputs_then_output(tiny_tasks):
    assert arguments(tiny_tasks["matmul+add"].module) == [
        ((1, 3136), "float32"),
        ((3136, 10), "float32"),
        ((10,), "float32"),
        ((1, 10), "float32"),
    ]


def test_the_compiled_model_computes_what_onnxruntime_does(tiny_model, cpu):
    import onnxruntime
    import tvm
    from tvm import relax

    inputs = tiny_model.inputs_for(3)
    session = onnxruntime.InferenceSession(tiny_model.original.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run(None, inputs)[0]
    machine = relax.VirtualMachine(compile_model(lower(tiny_model, cpu)[0], cpu), tvm.cpu())
    found = machine["main"](*[tvm.runtime.tensor(array) for array in inputs.values()])
    found = (found if hasattr(found, "numpy") else found[0]).numpy()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    assert math.isfinite(np.abs(expected).max()) and np.abs(expected).max() > 0


def test_a_model_of_reshapes_has_nothing_to_tune(tiny_tasks, tiny_model):
    with pytest.raises(InputError, match="'tiny' has nothing to tune"):
        require_tunable([tiny_tasks["reshape"]], tiny_model)
    assert require_tunable(list(tiny_tasks.values()), tiny_model) == [
        task for task in tiny_tasks.values() if task.info.tunable
    ]


def test_unknown_model_and_target():
    with pytest.raises(InputError, match="unknown model 'nosuchnet'"):
        tasks_frame("nosuchnet")
    with pytest.raises(InputError, match="unknown target 'nosuchtarget'"):
        tasks_frame("squeezenet", "nosuchtarget")
