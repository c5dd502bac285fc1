"""The zoo and users' files: numerics against onnxruntime, weights in range, every way a file can be bad."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, parser
from onnx.numpy_helper import from_array

from tvmlab import zoo
from tvmlab.core import InputError
from tvmlab.models import Model, load_model, models

SMALL = ["squeezenet", "shufflenet", "mobilenet_v2"]
QUICK = [*SMALL, "googlenet", "densenet121", "inception_v2", "resnet18", "resnet50", "yolo3_mobilenet_backbone"]
HEAVY = ["alexnet", "zfnet512", "vgg16", "vgg19", "vgg19_bn", "ssd512_resnet50_backbone"]
ALL = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in HEAVY)]


def reference(model: ModelProto, feeds: dict[str, np.ndarray], outputs: list[str] | None = None) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 2
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(outputs, feeds)


def compiled(model: Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The Relax module's results on the CPU, without any tuning."""
    import tvm
    from tvm import relax

    cpu = tvm.target.codegen.llvm_get_system_cpu()
    target = tvm.target.Target({"kind": "llvm", "mcpu": cpu, "num-cores": 2})
    with target:
        machine = relax.VirtualMachine(tvm.compile(model.module, target), tvm.cpu())
    result = machine["main"](*(tvm.runtime.tensor(feeds[name]) for name in model.inputs))
    return [array.numpy() for array in (result if len(model.outputs) > 1 else [result])]


def assert_close(found: list[np.ndarray], expected: list[np.ndarray], tolerance: float = 2e-5) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


@pytest.mark.parametrize("name", ALL)
def test_prepared_zoo_model_computes_the_same_and_its_activations_are_in_range(name):
    model = load_model(name)
    feeds, others = model.inputs_for(seed=1), model.inputs_for(seed=2)
    weighted = [node.output[0] for node in model.original.graph.node if node.op_type in ("Conv", "Gemm")]
    probed = ModelProto()
    probed.CopyFrom(model.original)
    probed.graph.output.extend(onnx.ValueInfoProto(name=n) for n in weighted if n not in model.outputs)
    results = [*model.outputs]
    activations = reference(probed, feeds, weighted)
    assert_close(reference(model.onnx, feeds), expected := reference(probed, feeds, results))
    # Neither blown up nor vanished anywhere, and the classes neither all alike nor decided by one.
    sizes = [float(np.sqrt(np.mean(values**2))) for values in activations]
    assert min(sizes) > 0.1 and max(sizes) < 10
    assert 0.3 < activations[-1].std() < 5
    changed = reference(probed, others, results)
    assert np.abs(changed[0] - expected[0]).max() > 1e-3 * np.abs(expected[0]).max(), "the input does not matter"
    for array in (*activations, *expected):
        assert np.isfinite(array).all()


@pytest.mark.parametrize(
    "name", [*(pytest.param(n, marks=pytest.mark.slow) for n in [*QUICK[1:], *HEAVY]), "squeezenet"]
)
def test_imported_zoo_model_computes_the_same(name):
    model = load_model(name)
    feeds = model.inputs_for(seed=1)
    assert_close(compiled(model, feeds), reference(model.original, feeds))


SLOW_BATCHES = [
    pytest.param(name, marks=pytest.mark.slow) for name in ("alexnet", "mobilenet_v2", "googlenet", "resnet50")
]


@pytest.mark.parametrize("name", ["squeezenet", "shufflenet", *SLOW_BATCHES])
def test_batch_gives_each_sample_its_own_result(name):
    single, batched = load_model(name), load_model(name, batch=3)
    (data,) = batched.inputs
    assert batched.inputs[data][0] == 3 and {shape[0] for shape in batched.outputs.values()} == {3}
    assert batched.flops == 3 * single.flops and batched.sha256 != single.sha256
    feeds = batched.inputs_for(seed=1)
    rows = [reference(single.original, {data: feeds[data][i : i + 1]})[0] for i in range(3)]
    for graph in (batched.original, batched.onnx):
        assert_close(reference(graph, feeds), [np.concatenate(rows)])


def test_table_matches_what_loading_gives_without_tvm():
    code = "import sys; from tvmlab.models import models; models(); print('tvm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    table = models()
    assert list(table.index) == list(zoo.ZOO) and set(table["source"]) == {
        "onnx model zoo graph",
        "built by tvmlab",
    }
    for name in SMALL:
        model = load_model(name)
        assert (table.loc[name, "parameters"], table.loc[name, "flops"]) == (model.parameters, model.flops)
        assert table.loc[name, "source"] == model.source
    assert table.loc["alexnet", "inputs"] == "data_0: 1x3x224x224"


@pytest.mark.parametrize(
    "name, parameters, multiply_adds",
    [
        # torchvision's documentation of its weights: num_params, and GFLOPS, which are multiply-adds.
        ("resnet18", 11_689_512, 1.81e9),
        ("vgg16", 138_357_544, 15.47e9),
        ("vgg19", 143_667_240, 19.63e9),
        ("vgg19_bn", 143_678_248, 19.63e9),
        ("mobilenet_v2", 3_504_872, 0.30e9),
        # Keras's MobileNet without its top, trainable parameters; the paper's 569 M at 224 x 224, its dense layer off.
        ("yolo3_mobilenet_backbone", 3_206_976, (569e6 - 1.024e6) * (416 / 224) ** 2),
        # torchvision's resnet50 without its dense layer; the paper's 3.8 G at 224 x 224.
        ("ssd512_resnet50_backbone", 25_557_032 - 2_049_000, 3.86e9 * (512 / 224) ** 2),
    ],
)
def test_counts_match_the_published_ones(name, parameters, multiply_adds):
    row = models().loc[name]
    assert row["parameters"] == parameters
    assert row["flops"] / 2 == pytest.approx(multiply_adds, rel=0.01)


def test_weights_follow_from_the_seed_and_the_name_only():
    first, again, other = load_model("squeezenet"), load_model("squeezenet"), load_model("squeezenet", seed=1)
    assert first.sha256 == again.sha256 != other.sha256
    weights = {m: {t.name: t.raw_data for t in m.original.graph.initializer} for m in (first, again, other)}
    assert weights[first] == weights[again]
    assert all(weights[first][name] != data for name, data in weights[other].items())
    plan = zoo.blueprint("squeezenet")
    turned = zoo.Blueprint(plan.model, dict(reversed(plan.weights.items())))
    assert {t.name: t.raw_data for t in zoo.fill(turned, 0).graph.initializer} == weights[first]


def test_aliases_and_representations():
    model = load_model("inception_v1")
    assert model.name == "googlenet" and model.sha256 == load_model("googlenet").sha256
    assert "7.0 M parameters" in repr(model) and "data_0: 1x3x224x224 -> prob_1: 1x1000" in repr(model)
    assert "<table>" in model._repr_html_() and "MaxPool" in model._repr_html_()


@pytest.mark.parametrize(
    "name, hint",
    [
        ("resnet5", "'resnet50'"),
        ("MobileNet-V2", "'mobilenet_v2'"),
        ("inceptionv1", "'inception_v1'"),
        ("xyz", "squeezenet"),
    ],
)
def test_unknown_name_is_answered_with_close_ones(name, hint):
    with pytest.raises(InputError, match="unknown model") as caught:
        load_model(name)
    assert hint in caught.value.remedy and "end in .onnx" in caught.value.remedy


@pytest.mark.parametrize("options", [{"batch": 0}, {"batch": 1.5}, {"batch": True}, {"seed": -1}, {"dims": {"T": 3}}])
def test_unusable_options_are_refused(options):
    with pytest.raises(InputError):
        load_model("squeezenet", **options)


# Users' files


def net(text: str = "", *, opset: int = 13, **constants: np.ndarray) -> ModelProto:
    text = text or "g (float[N,4] x) => (float[N,8] z) { y = MatMul (x, w) z = Relu (y) }"
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> {text}')
    constants = constants or {"w": np.random.default_rng(0).standard_normal((4, 8), np.float32)}
    model.graph.initializer.extend(from_array(value, name) for name, value in constants.items())
    return model


def save(model: ModelProto, folder: Path, **options: object) -> Path:
    onnx.save(model, folder / "own.onnx", **options)
    return folder / "own.onnx"


def test_own_file_loads_imports_and_matches(tmp_path):
    path = save(net(), tmp_path)
    model = load_model(path, batch=5)
    assert (model.name, model.source) == ("own", str(path))
    assert (model.inputs, model.outputs) == ({"x": (5, 4)}, {"z": (5, 8)})
    assert (model.parameters, model.flops) == (32, 2 * 5 * 4 * 8)
    assert model.sha256 == load_model(str(path), batch=5).sha256
    feeds = model.inputs_for(seed=3)
    assert feeds["x"].dtype == np.float32 and not np.array_equal(feeds["x"], model.inputs_for(seed=4)["x"])
    assert_close(compiled(model, feeds), reference(model.original, feeds))


def test_several_inputs_of_several_types(tmp_path):
    text = """g (float[N,T,4] x, int64[N,T] ids, bool[T] keep, uint8[4] scale)
        => (float[N,T,4] z, float[N,T,4] e) {
        e = Gather (table, ids)
        s = Cast <to = 1> (scale)
        k = Unsqueeze (keep, axes)
        a = Mul (x, s)
        z = Where (k, a, e) }"""
    table = np.random.default_rng(0).standard_normal((2, 4), np.float32)
    path = save(net(text, table=table, axes=np.array([1])), tmp_path)
    model = load_model(path, batch=2, dims={"T": 3})
    assert {name: dtype.name for name, dtype in model.dtypes.items()} == {
        "x": "float32", "ids": "int64", "keep": "bool", "scale": "uint8", "z": "float32", "e": "float32",
    }  # fmt: skip
    feeds = model.inputs_for(0)
    assert feeds["scale"].max() > 1 >= feeds["ids"].max()
    assert_close(compiled(model, feeds), reference(model.original, feeds))


def test_initialisers_listed_as_inputs_are_no_inputs(tmp_path):
    model = net()
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 8]))
    loaded = load_model(save(model, tmp_path))
    assert list(loaded.inputs) == ["x"] and [value.name for value in loaded.original.graph.input] == ["x"]


def external(folder: Path, location: str = "own.data") -> Path:
    """A file whose weights are in a file of their own."""
    path = save(net(), folder, save_as_external_data=True, location="own.data", size_threshold=0)
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    path.write_bytes(model.SerializeToString())
    return path


def test_external_data_is_read_from_the_models_folder(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    path = external(tmp_path / "model")
    inside = save(net(), tmp_path)
    monkeypatch.chdir(tmp_path)
    model = load_model("model/own.onnx", batch=2)
    feeds = model.inputs_for(0)
    assert_close(reference(model.original, feeds), reference(load_model(inside, batch=2).original, feeds))
    (path.parent / "own.data").write_bytes(np.ones((4, 8), np.float32).tobytes())
    assert load_model(path, batch=2).sha256 != model.sha256, "the digest covers the external data"


def test_external_data_elsewhere_is_refused_before_it_is_read(tmp_path):
    (tmp_path / "model").mkdir()
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(4 * 8 * 4))
    (tmp_path / "model" / "link.bin").symlink_to(secret)
    for location in ("../secret.bin", str(secret), "link.bin", "sub/../../secret.bin", ""):
        path = external(tmp_path / "model", location)
        with pytest.raises(InputError, match="outside its own folder"):
            load_model(path)


def test_external_data_that_is_missing_or_short_is_named(tmp_path):
    path = external(tmp_path)
    (tmp_path / "own.data").write_bytes(bytes(100))
    with pytest.raises(InputError, match="'w'"):
        load_model(path)
    (tmp_path / "own.data").unlink()
    with pytest.raises(InputError, match=r"'own\.data', which is missing"):
        load_model(path)


def test_damaged_and_foreign_files_are_refused(tmp_path):
    good = save(net(), tmp_path).read_bytes()
    cases = {
        "empty": (b"", "is empty"),
        "half": (good[: len(good) // 2], "truncated or not an ONNX model"),
        "text": (b"not a model at all\n" * 9, "not an ONNX model"),
        "zip": (b"PK\x03\x04" + bytes(200), "not an ONNX model"),
        "nograph": (ModelProto(ir_version=8).SerializeToString(), "holds no graph"),
    }
    for name, (content, problem) in cases.items():
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(content)
        with pytest.raises(InputError, match=problem) as caught:
            load_model(path)
        assert str(path) in str(caught.value)
    for cut in range(1, len(good)):  # wherever it is torn
        (tmp_path / "cut.onnx").write_bytes(good[:cut])
        with pytest.raises(InputError):
            load_model(tmp_path / "cut.onnx")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(InputError, match="is a directory"):
        load_model(tmp_path / "folder.onnx")
    with pytest.raises(InputError, match=r"absent\.onnx .*No such file"):
        load_model(tmp_path / "absent.onnx")


def test_invalid_graph_is_refused(tmp_path):
    model = net()
    model.graph.node[0].input[0] = "nowhere"
    with pytest.raises(InputError, match="not a valid ONNX model"):
        load_model(save(model, tmp_path))


def test_unsupported_operators_are_all_named_before_the_import(tmp_path, monkeypatch):
    text = """g (float[2,8] x) => (float[2,8] z) {
        a = Lecun (x)
        b = Relu (a)
        yes = Constant <value = bool {1}> ()
        z = If (yes) <then_branch = t () => (float[2,8] r) { r = Bernoulli (b) },
                      else_branch = e () => (float[2,8] s) { s = Neg (b) }> }"""
    model = net(text, w=np.zeros(1, np.float32))
    model.graph.node[0].domain = "my.domain"
    model.opset_import.append(helper.make_operatorsetid("my.domain", 1))
    model.opset_import[0].version = 15
    import tvm.relax.frontend.onnx

    monkeypatch.setattr(tvm.relax.frontend.onnx, "from_onnx", lambda *args, **kwargs: pytest.fail("imported"))
    with pytest.raises(InputError, match="cannot import: Bernoulli, Lecun"):
        load_model(save(model, tmp_path))


def test_import_failure_names_the_model_and_the_operator(tmp_path):
    """TVM's importer has a converter for CumSum, but none for an axis that is an input."""
    text = "g (float[2,8] x, int32 axis) => (float[2,8] z) { y = Relu (x) z = CumSum (y, axis) }"
    model = load_model(save(net(text, w=np.zeros(1, np.float32)), tmp_path))
    with pytest.raises(InputError, match=r"'own' at operator CumSum \(z\)"):
        _ = model.module


def test_symbolic_dimensions_are_asked_for_by_name(tmp_path):
    path = save(net("g (float[N,T,4] x) => (float[N,T,8] z) { z = MatMul (x, w) }"), tmp_path)
    with pytest.raises(InputError, match=r"without a size: T.*dims=\{'T': 128\}"):
        load_model(path)
    assert load_model(path, batch=2, dims={"T": 6}).outputs == {"z": (2, 6, 8)}
