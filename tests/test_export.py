"""A compiled model in a file, loaded again in a process that knows nothing of its run."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import tvmlab
from tvmlab.core import InputError, MissingTool, RecordError, RunError
from tvmlab.measure import subjects


@pytest.fixture(scope="module")
def library(tiny_run, tmp_path_factory):
    return tvmlab.export(tiny_run, tmp_path_factory.mktemp("deployed") / "new" / "tiny.so")


@pytest.fixture
def copy(library, tmp_path):
    """The exported model with a description that a test may change."""
    for path in library.parent.iterdir():
        shutil.copy2(path, tmp_path)
    return tmp_path / library.name


def described(path, **changes):
    about = json.loads(path.with_suffix(".json").read_bytes()) | changes
    path.with_suffix(".json").write_text(json.dumps(about))
    return path


def expected(tiny_model):
    import onnxruntime

    session = onnxruntime.InferenceSession(tiny_model.original.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, tiny_model.inputs_for(3))[0]


def test_only_the_library_and_its_description_are_written(library):
    assert sorted(path.name for path in library.parent.iterdir()) == ["tiny.json", "tiny.so"]


def test_another_process_loads_it_and_computes_the_same(library, tiny_model, tmp_path):
    np.save(tmp_path / "x.npy", tiny_model.inputs_for(3)["x"])
    script = """
        import sys, numpy, tvmlab
        model = tvmlab.load(sys.argv[1])
        numpy.save("y.npy", model(numpy.load("x.npy"))["y"])
        assert "onnx" not in sys.modules and "pydantic" not in sys.modules
    """
    command = [sys.executable, "-c", textwrap.dedent(script), library]
    said = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "Scope Loaded" not in said.stderr and said.stdout == ""
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected(tiny_model), rtol=1e-4, atol=1e-5)


def test_tvm_alone_runs_it(library, tiny_model, tmp_path):
    """What docs/howto.md says of a machine without tvmlab."""
    np.save(tmp_path / "x.npy", tiny_model.inputs_for(3)["x"])
    script = """
        import sys, numpy, tvm
        from tvm import relax
        machine = relax.VirtualMachine(tvm.runtime.load_module(sys.argv[1]), tvm.cpu())
        numpy.save("y.npy", machine["main"](tvm.runtime.tensor(numpy.load("x.npy"))).numpy())
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(library)], cwd=tmp_path, check=True)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected(tiny_model), rtol=1e-4, atol=1e-5)


def test_the_description(library, tiny_run):
    about = json.loads(library.with_suffix(".json").read_bytes())
    assert about["inputs"] == {"x": {"shape": [1, 8, 14, 14], "dtype": "float32"}}
    assert (about["outputs"], about["run"], about["model"]) == (["y"], tiny_run.id, "tiny.onnx")
    assert 0 <= about["max_error_over_max_output"] <= 1e-4
    assert about["environment"]["TVM_NUM_THREADS"] == str(tiny_run.folder.environment["target"]["attrs"]["num-cores"])
    assert "/" not in about["model"]


def test_inputs_by_name_and_in_order(library, tiny_model):
    model, x = tvmlab.load(library), tiny_model.inputs_for(3)["x"]
    np.testing.assert_array_equal(model(x)["y"], model(x=x)["y"])
    np.testing.assert_array_equal(model(x)["y"], model.run({"x": x})["y"])
    assert repr(model).startswith(f"Deployed('{library}': tiny.onnx for ")


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({}, "misses its input 'x': it takes x: float32 (1, 8, 14, 14)"),
        ({"x": np.zeros((1, 8, 14, 14), "float64")}, "input 'x' is float64"),
        ({"x": np.zeros((2, 8, 14, 14), "float32")}, r"of shape \(2, 8, 14, 14\)"),
        ({"x": np.zeros((1, 8, 14, 14), "float32"), "z": np.zeros(1)}, "has no input 'z'"),
    ],
)
def test_wrong_inputs_are_refused(library, arrays, said):
    with pytest.raises(InputError, match=said.replace("(1, 8, 14, 14)", r"\(1, 8, 14, 14\)")):
        tvmlab.load(library).run(arrays)


def test_too_many_inputs_are_refused(library):
    with pytest.raises(InputError, match="was given 2 inputs"):
        tvmlab.load(library)(np.zeros(1), np.zeros(1))


def test_a_thread_count_of_the_users_own_stands(library, monkeypatch):
    monkeypatch.setenv("TVM_NUM_THREADS", "1")
    tvmlab.load(library)
    assert os.environ["TVM_NUM_THREADS"] == "1"


def test_a_cpu_that_lacks_its_instructions_is_told(copy):
    with pytest.raises(MissingTool, match="this CPU lacks avx1024f: tune and export on this machine"):
        tvmlab.load(described(copy, flags=["avx1024f"]))


def test_a_gpu_that_is_not_there_is_told_and_cudas_runtime_is_loaded_first(copy, monkeypatch):
    """Where that came as a wheel TVM's own runtime would not find it."""
    loaded = []
    monkeypatch.setattr("tvmlab.deployed.load_runtime", lambda: loaded.append(True))
    with pytest.raises(MissingTool, match="TVM sees no cuda:7 here"):
        tvmlab.load(described(copy, device="cuda:7"))
    assert len(loaded) == 1
    tvmlab.load(described(copy, device="cpu"))
    assert len(loaded) == 1


def test_files_that_are_no_exported_model(copy, tmp_path):
    with pytest.raises(InputError, match=r"there is no .*none\.so"):
        tvmlab.load(tmp_path / "none.so")
    with pytest.raises(RecordError, match=r"of a newer tvmlab \(format 99\)"):
        tvmlab.load(described(copy, format=99))
    described(copy, format=1)
    copy.write_bytes(b"no library")
    with pytest.raises(InputError, match=r"TVM cannot load .*: export the model again"):
        tvmlab.load(copy)
    copy.with_suffix(".json").write_text('{"format"')
    with pytest.raises(RecordError, match="is damaged"):
        tvmlab.load(copy)


def test_a_path_that_is_no_library_is_refused(tiny_run, tmp_path):
    with pytest.raises(InputError, match=r"model.onnx is no name of a library: let it end in \.so"):
        tvmlab.export(tiny_run, tmp_path / "model.onnx")


def test_a_wrong_model_is_not_exported(tiny_run, tmp_path, monkeypatch):
    usual = subjects.ask

    def ask(name, worker, message, timeout_s, **how):
        found = usual(name, worker, message, timeout_s, **how)
        return [output * 1.01 for output in found] if message[0] == "run_library" else found

    monkeypatch.setattr(importlib.import_module("tvmlab.export"), "ask", ask)
    with pytest.raises(RunError, match=r"is off by 0\.01 of its largest output"):
        tvmlab.export(tiny_run, tmp_path / "tiny.so")
    assert list(tmp_path.iterdir()) == []


def test_the_command(tiny_run, tmp_path, capsys):
    from tvmlab.cli import main

    path = tmp_path / "tiny.so"
    assert main(["export", str(tiny_run.folder.path), "-o", str(path)]) == 0
    assert capsys.readouterr().out.strip() == str(path)
    assert path.is_file()
