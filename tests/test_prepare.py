"""Graph preparation and shapes, checked by running the graph before and after with onnxruntime."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, parser
from onnx.numpy_helper import from_array

from tvmlab.core import InputError
from tvmlab.prepare import MIN_OPSET, prepare, with_identifiers
from tvmlab.shapes import infer_shapes, set_shapes, shapes_of


def run(model: ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Otherwise onnxruntime does itself what is tested here.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def graph(text: str, opset: int = 13, ir: int = 8, **constants: np.ndarray) -> ModelProto:
    """A model from onnx's text format, with initialisers."""
    model = parser.parse_model(f'<ir_version: {ir}, opset_import: ["" : {opset}]> {text}')
    model.graph.initializer.extend(from_array(value, name) for name, value in constants.items())
    return model


def kinds(model: ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def assert_same(model: ModelProto, seed: int = 0, tolerance: float = 1e-5) -> ModelProto:
    """Prepare the model and compare its results with the original's on random inputs."""
    prepared = prepare(model)
    onnx.checker.check_model(prepared, full_check=True)
    rng = np.random.default_rng(seed)
    shapes = shapes_of(model)
    feeds = {v.name: rng.standard_normal(shapes[v.name], np.float32) for v in prepared.graph.input}
    for expected, found in zip(run(model, feeds), run(prepared, feeds), strict=True):
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())
    return prepared


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


def statistics(channels: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    names = ("gamma", "beta", "mean", "variance")
    return {name: (rng.random(channels) + 0.5).astype(np.float32) for name in names}


@settings(max_examples=15, deadline=None)
@given(
    groups=st.sampled_from([1, 2, 4]),
    spatial=st.integers(1, 3),
    bias=st.booleans(),
    affine=st.lists(st.sampled_from(["Mul", "Add"]), max_size=3),
    scalar=st.booleans(),
    epsilon=st.sampled_from([1e-5, 0.1]),
    seed=st.integers(0, 1000),
)
def test_batch_norm_folds_into_conv(groups, spatial, bias, affine, scalar, epsilon, seed):
    """Any Conv, BatchNormalization and per-channel Mul and Add become one Conv with the same result."""
    rng = np.random.default_rng(seed)
    constants = {"w": rng.standard_normal((8, 4 // groups, *[2] * spatial), np.float32)}
    if bias:
        constants["b"] = rng.standard_normal(8, np.float32)
    nodes = [helper.make_node("Conv", ["x", *constants], ["y0"], group=groups)]
    constants |= statistics(8, seed)
    nodes.append(
        helper.make_node("BatchNormalization", ["y0", "gamma", "beta", "mean", "variance"], ["y1"], epsilon=epsilon)
    )
    for i, kind in enumerate(affine, start=1):
        constants[f"c{i}"] = rng.standard_normal(() if scalar else (8, *[1] * spatial), np.float32)
        nodes.append(helper.make_node(kind, [f"c{i}", f"y{i}"], [f"y{i + 1}"]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4, *[5] * spatial])
    y = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)
    initializers = [from_array(value, name) for name, value in constants.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], initializers),
        opset_imports=[helper.make_operatorsetid("", 13)],
        ir_version=8,
    )
    assert kinds(assert_same(model, seed, tolerance=1e-4)) == ["Conv"]


Y = "float[1,8,5,5]"
BATCH_NORM = "BatchNormalization (y, gamma, beta, mean, variance)"


@pytest.mark.parametrize(
    "text, left",
    [
        # The convolution's own result is wanted too, by another operator or as an output.
        (
            f"(float[1,4,5,5] x) => (float[1,8,5,5] z) {{ y = Conv (x, w) n = {BATCH_NORM} z = Add (y, n) }}",
            4,
        ),
        (
            f"(float[1,4,5,5] x) => ({Y} y, {Y} n) {{ y = Conv (x, w) n = {BATCH_NORM} }}",
            3,
        ),
        # The weights are computed.
        (
            f"(float[1,4,5,5] x, float[8,4,1,1] v) => ({Y} n) {{ y = Conv (x, v) n = {BATCH_NORM} }}",
            3,
        ),
    ],
)
def test_batch_norm_stays_apart_as_mul_and_add(text, left):
    prepared = assert_same(graph(f"g {text}", w=normal(8, 4, 1, 1), **statistics(8)))
    assert "BatchNormalization" not in kinds(prepared)
    assert len(kinds(prepared)) == left


def test_shared_weights_fold_apart():
    """Two convolutions with one weight tensor and different normalisations."""
    model = graph(
        """g (float[1,4,5,5] x) => (float[1,8,5,5] z) {
            y = Conv (x, w)
            n = BatchNormalization (y, gamma, beta, mean, variance)
            y2 = Conv (x, w)
            n2 = BatchNormalization (y2, beta, gamma, mean, variance)
            z = Add (n, n2) }""",
        w=normal(8, 4, 1, 1),
        **statistics(8),
    )
    assert kinds(assert_same(model)) == ["Conv", "Conv", "Add"]


def test_mul_along_the_image_is_not_folded():
    """A constant of shape (8,) multiplies the columns, not the channels."""
    model = graph("g (float[1,4,8,8] x) => (float[1,8,8,8] z) { y = Conv (x, w) z = Mul (y, c) }",
                  w=normal(8, 4, 1, 1), c=normal(8))  # fmt: skip
    assert kinds(assert_same(model)) == ["Conv", "Mul"]


@pytest.mark.parametrize("terms, expected", [(1, ["Relu"]), (2, ["Add", "Relu"]), (4, ["Add", "Add", "Add", "Relu"])])
def test_sum_becomes_a_chain_of_add(terms, expected):
    names = [f"x{i}" for i in range(terms)]
    inputs = ", ".join(f"float[2,3] {name}" for name in names)
    model = graph(f"g ({inputs}) => (float[2,3] z) {{ y = Sum ({', '.join(names)}) z = Relu (y) }}")
    assert kinds(assert_same(model)) == expected


def test_identity_dropout_and_constants_vanish():
    model = graph(
        """g (float[2,6] x) => (float[3,4] z) {
            ratio = Constant <value_float = 0.5> ()
            training = Constant <value = bool {0}> ()
            a = Identity (x)
            b = Dropout (a, ratio, training)
            shape = Constant <value = int64[2] {3, 4}> ()
            c = Reshape (b, shape)
            z = Relu (c) }""",
        unused=normal(5),
    )
    prepared = assert_same(model)
    assert kinds(prepared) == ["Reshape", "Relu"]
    assert [tensor.name for tensor in prepared.graph.initializer] == ["shape"]
    assert shapes_of(prepared)["c"] == (3, 4)


def test_shape_computed_from_the_input_becomes_a_constant():
    """What PyTorch exports for x.view(x.shape[0], -1, 2): scalars gathered from a shape."""
    model = graph(
        """g (float[2,6] x) => (float[2,3,2] z) {
            s = Shape (x)
            zero = Constant <value = int64 {0}> ()
            n = Gather (s, zero)
            axes = Constant <value = int64[1] {0}> ()
            n1 = Unsqueeze (n, axes)
            rest = Constant <value = int64[2] {-1, 2}> ()
            target = Concat <axis = 0> (n1, rest)
            y = Reshape (x, target)
            z = Relu (y) }"""
    )
    assert kinds(assert_same(model)) == ["Reshape", "Relu"]


def test_dropout_in_training_or_with_its_mask_used_is_kept():
    text = "g (float[2,6] x) => (float[2,6] z, bool[2,6] mask) { z, mask = Dropout (x) }"
    assert kinds(assert_same(graph(text))) == ["Dropout"]


def test_identity_to_an_output_and_names_inside_branches_survive():
    model = graph("g (float[2,3] x) => (float[2,3] z) { y = Relu (x) z = Identity (y) }")
    assert kinds(assert_same(model)) == ["Relu", "Identity"]
    branch = "{{ r = {} (a) }}"
    model = graph(
        f"""g (float[2,3] x) => (float[2,3] z) {{
            a = Identity (x)
            yes = Constant <value = bool {{1}}> ()
            z = If (yes) <then_branch = t () => (float[2,3] r) {branch.format("Relu")},
                          else_branch = e () => (float[2,3] r) {branch.format("Neg")}> }}"""
    )
    assert kinds(assert_same(model)) == ["Identity", "If"]


def test_inputs_are_named_as_identifiers():
    """TVM names a CUDA kernel's parameters after them, whatever they are: ResNet-50's is gpu_0/data_0."""
    text = "agraph (float[2] a, float[2] b, float[2] c) => (float[2] y) { s = Add(a, b) y = Mul(s, c) }"
    model = graph(text)
    for place, name in enumerate(("gpu_0/data", "0", "gpu_0_data")):
        model.graph.input[place].name = name
    model.graph.node[0].input[:] = ["gpu_0/data", "0"]
    model.graph.node[1].input[1] = "gpu_0_data"
    made = with_identifiers(prepare(model))
    assert [value.name for value in made.graph.input] == ["gpu_0_data_", "input_0", "gpu_0_data"]
    values = [np.array(pair, np.float32) for pair in ([1, 2], [3, 4], [5, 6])]
    (found,) = run(made, dict(zip(["gpu_0_data_", "input_0", "gpu_0_data"], values, strict=True)))
    assert found.tolist() == [20.0, 36.0]
    assert [value.name for value in model.graph.input] == ["gpu_0/data", "0", "gpu_0_data"]  # the original is as it was


def test_an_input_that_a_branch_reads_is_renamed_there_too():
    text = (
        "agraph (float[2] a, bool c) => (float[2] y) { y = If(c) <then_branch = t () => (float[2] u) { u = Neg(a) }, "
    )
    model = graph(text + "else_branch = e () => (float[2] v) { v = Abs(a) }> }")
    model.graph.input[0].name = "a/1"
    for attribute in model.graph.node[0].attribute:
        attribute.g.node[0].input[0] = "a/1"
    made = with_identifiers(prepare(model))
    assert made.graph.input[0].name == "a_1"
    (found,) = run(made, {"a_1": np.array([-1, 2], np.float32), "c": np.array(True)})
    assert found.tolist() == [1.0, -2.0]


def test_old_opset_is_converted():
    """Opset 6: BatchNormalization and Dropout with is_test, Softmax over all axes after the first."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"], kernel_shape=[1, 1]),
        helper.make_node("BatchNormalization", ["y", "gamma", "beta", "mean", "variance"], ["n"], is_test=1),
        helper.make_node("Dropout", ["n"], ["d"], ratio=0.5, is_test=1),
        helper.make_node("Softmax", ["d"], ["z"], axis=1),
    ]
    constants = {"w": normal(8, 4, 1, 1), **statistics(8)}
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, c.shape) for name, c in constants.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 3, 3])
    z = helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 8, 3, 3])
    initializers = [from_array(value, name) for name, value in constants.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x, *values], [z], initializers),
        opset_imports=[helper.make_operatorsetid("", 6)],
        ir_version=3,
    )
    prepared = prepare(model)
    assert prepared.opset_import[0].version == MIN_OPSET
    assert kinds(prepared)[0] == "Conv" and not {"BatchNormalization", "Dropout"} & set(kinds(prepared))
    feed = normal(1, 4, 3, 3)
    (found,) = run(prepared, {"x": feed})
    scale = constants["gamma"] / np.sqrt(constants["variance"] + 1e-5)
    shift = constants["beta"] - scale * constants["mean"]
    logits = np.einsum("oi,nihw->nohw", constants["w"][:, :, 0, 0], feed) * scale[:, None, None] + shift[:, None, None]
    expected = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_local_functions_are_inlined():
    function = helper.make_function(
        "mine",
        "Twice",
        ["a"],
        ["b"],
        [helper.make_node("Add", ["a", "a"], ["b"])],
        [helper.make_operatorsetid("", 13)],
    )
    model = graph("g (float[2,3] x) => (float[2,3] z) { z = Relu (x) }")
    model.graph.node.insert(0, helper.make_node("Twice", ["x"], ["y"], domain="mine"))
    model.graph.node[1].input[0] = "y"
    model.functions.append(function)
    model.opset_import.append(helper.make_operatorsetid("mine", 1))
    assert kinds(assert_same(model)) == ["Add", "Relu"]


def test_symbolic_dimensions_get_their_sizes():
    model = graph(
        "g (float[N,T,4] x, float[T,4] m, float[K,4] k) => (float[N,T,4] z) { y = Add (x, m) z = Add (y, k) }"
    )
    model.graph.input[2].type.tensor_type.shape.dim[0].Clear()
    set_shapes(model, batch=1, dims={"T": 7})
    shapes = shapes_of(model)
    assert (shapes["x"], shapes["m"], shapes["k"], shapes["z"]) == ((1, 7, 4), (7, 4), (1, 4), (1, 7, 4))


SYMBOLIC = "g (float[N,T,4] x, float[N,4] m) => (float[N,T,4] z) { z = Relu (x) }"


@pytest.mark.parametrize(
    "dims, problem, remedy",
    [
        ({}, "without a size: T, m[1]", "dims={'T': 128, 'm[1]': 128}"),
        ({"T": 7, "m[1]": 4, "S": 2}, "no symbolic dimension 'S'", "free dimensions are N, T, m[1]"),
        ({"T": 0, "m[1]": 4}, "dims gives 'T' the size 0", "at least 1"),
        ({"T": True, "m[1]": 4}, "dims gives 'T' the size True", "at least 1"),
    ],
)
def test_dimensions_that_are_missing_or_unknown_are_named(dims, problem, remedy):
    model = graph(SYMBOLIC)
    model.graph.input[1].type.tensor_type.shape.dim[1].Clear()  # no name
    with pytest.raises(InputError) as caught:
        set_shapes(model, batch=2, dims=dims)
    assert problem in caught.value.problem and remedy in caught.value.remedy


def test_sizes_that_do_not_fit_each_other_are_refused():
    model = graph("g (float[N,T] x, float[N,S] y) => (float[N,T] z) { z = Add (x, y) }")
    with pytest.raises(InputError, match="do not fit"):
        set_shapes(model, dims={"T": 3, "S": 4})


def test_fixed_batch_is_replaced_through_reshapes():
    model = graph(
        """g (float[2,6] x) => (float[2,12] z) {
            a = Reshape (x, s)
            b = Transpose <perm = [0, 2, 1]> (a)
            c = Concat <axis = 2> (b, b)
            z = Reshape (c, t) }""",
        s=np.array([2, 2, 3]),
        t=np.array([2, -1]),
    )
    one = np.stack([run(model, {"x": np.stack([row, row])})[0][0] for row in normal(5, 6)])
    set_shapes(model, batch=5)
    assert shapes_of(infer_shapes(model))["z"] == (5, 12)
    np.testing.assert_array_equal(run(model, {"x": normal(5, 6)})[0], one)


@pytest.mark.parametrize(
    "text, named",
    [
        ("(float[2,6] x) => (float[12] z) { z = Reshape (x, s) }", "Reshape"),
        ("(float[2,6] x) => (float[6,2] z) { z = Transpose <perm = [1, 0]> (x) }", "'z' (Transpose)"),
        ("(float[2,6] x) => (float[2,6] z) { z = Add (x, c) }", "Add"),
        ("(float[2,6] x, float[3,6] y) => (float[2,6] z) { z = Relu (x) }", "first dimensions differ"),
    ],
)
def test_batch_that_cannot_be_replaced_is_refused(text, named):
    model = graph(f"g {text}", s=np.array([12]), c=normal(2, 6))
    with pytest.raises(InputError, match="cannot set batch=4") as caught:
        set_shapes(model, batch=4)
    assert named in caught.value.problem and "symbolic batch" in caught.value.remedy


def test_skeletons_keep_big_models_from_being_serialised():
    """A model beyond protobuf's 2 GB would fail in onnx's own passes; here none of them sees the weights."""
    model = graph("g (float[1,N] x) => (float[1,512] z) { z = MatMul (x, w) }", w=normal(512, 512))
    bare = infer_shapes(model)
    assert bare.ByteSize() < 1000 < model.ByteSize()
