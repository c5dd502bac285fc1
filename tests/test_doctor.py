"""The doctor: each check on a healthy and on a sick machine."""

import os
import re
import subprocess
import sys
from collections import namedtuple
from types import SimpleNamespace

import pynvml
import pytest
from fake_nvml import H200, T4, FakeNvml

from tvmlab import cuda
from tvmlab import doctor as doctor_function
from tvmlab.core import MissingTool
from tvmlab.doctor import Check, Diagnosis, check_versions, pins, require_compiler, require_disk
from tvmlab.hardware import compiler
from tvmlab.targets import require_gpu, target, targets

doctor_module = sys.modules["tvmlab.doctor"]
NO_NVML = FakeNvml(init_error=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
HEALTHY_TVM = {
    "version": "0.27",
    "attrs": {"mcpu": "znver5"},
    "label": "CPU",
    "note": "",
    "vector_bits": 512,
    "cuda": True,
}
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def quick(monkeypatch):
    """The doctor without its TVM process."""
    answer = dict(HEALTHY_TVM)
    monkeypatch.setattr(doctor_module, "_probe_tvm", lambda: answer)
    return answer


def named(diagnosis, name):
    return next(check for check in diagnosis if check.name == name)


def test_this_machine(tmp_path):
    found = doctor_function(runs_dir=tmp_path / "runs", cache_dir=tmp_path / "cache", nvml=NO_NVML)
    assert {check.name for check in found} >= {
        "Python",
        "versions",
        "TVM",
        "compiler",
        "CPU",
        "GPU",
        "memory",
    }
    assert named(found, "TVM").status == "ok", named(found, "TVM")
    assert named(found, "compiler").status == "ok"
    assert named(found, "GPU").detail == "no NVIDIA GPU attached: CPU only"
    assert named(found, "file locks").status == named(found, "cache folder").status == "ok"
    assert not (tmp_path / "runs").exists() and [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_versions():
    wanted = {"apache-tvm": "1", "apache-tvm-ffi": "0.1.14", "numpy": "2", "scipy": "3"}
    assert all(check.status == "ok" for check in check_versions(wanted, wanted.get))
    installed = {"apache-tvm": "1", "apache-tvm-ffi": "0.1.15", "numpy": "1.9"}
    found = {check.name: check for check in check_versions(wanted, installed.get)}
    assert found["apache-tvm-ffi"].status == "fail" and "crash" in found["apache-tvm-ffi"].detail
    assert found["apache-tvm-ffi"].remedy == 'pip install "apache-tvm-ffi==0.1.14"'
    assert found["numpy"].status == "warn" and found["scipy"].status == "fail"
    assert "1 of 4" in found["versions"].detail
    assert check_versions({}, installed.get)[-1].status == "warn"


def test_pins_are_the_projects_own():
    found = pins()
    assert found["apache-tvm-ffi"] == "0.1.14.post1"
    assert "ruff" not in found  # an extra


def test_the_pins_of_installed_metadata(monkeypatch):
    needs = ["apache-tvm==0.27.0.post1", "ruff==0.1 ; extra == 'dev'", "tomli>=1"]
    monkeypatch.setattr(doctor_module.importlib.metadata, "requires", lambda name: needs)
    assert pins() == {"apache-tvm": "0.27.0.post1"}


@pytest.mark.parametrize(
    ("code", "words"),
    [("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "signal 11"),
     ("raise OSError('no libtvm')", "no libtvm"),
     ("import time; time.sleep(60)", "no answer")],
)  # fmt: skip
def test_a_tvm_that_crashes(monkeypatch, tmp_path, code, words):
    monkeypatch.setattr(doctor_module, "_PROBE", code)
    monkeypatch.setattr(doctor_module, "_PROBE_TIMEOUT_S", 1.0)
    found = doctor_function(runs_dir=tmp_path, cache_dir=tmp_path, nvml=NO_NVML)
    check = named(found, "TVM")
    assert not found.ok and check.status == "fail" and words in check.detail
    assert '"apache-tvm-ffi==0.1.14.post1"' in check.remedy


def test_compiler_missing_and_broken(monkeypatch, tmp_path, quick):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compiler() is None
    with pytest.raises(MissingTool, match="no C compiler: install"):
        require_compiler()
    (tmp_path / "gcc").write_text("#!/bin/sh\necho 'cannot find ld' >&2\nexit 1\n")
    (tmp_path / "gcc").chmod(0o755)
    with pytest.raises(MissingTool, match="cannot find ld"):
        require_compiler()
    assert named(doctor_function(runs_dir=tmp_path, cache_dir=tmp_path, nvml=NO_NVML), "compiler").status == "fail"
    monkeypatch.setenv("CXX", str(tmp_path / "gone"))
    with pytest.raises(MissingTool, match="gone"):
        require_compiler()


def test_a_working_compiler_is_tried_once(monkeypatch):
    assert require_compiler() == compiler()
    monkeypatch.setattr(doctor_module.subprocess, "run", lambda *_, **__: pytest.fail("tried again"))
    require_compiler()


def test_cpu_note(quick, tmp_path):
    quick["note"] = "LLVM knows this CPU only as 'generic'"
    assert named(doctor_function(runs_dir=tmp_path, cache_dir=tmp_path, nvml=NO_NVML), "CPU").status == "warn"


def test_gpu(monkeypatch, tmp_path, quick):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    folders = {"runs_dir": tmp_path, "cache_dir": tmp_path}
    monkeypatch.setattr(cuda, "cuda_compiler", lambda: "nvcc")
    monkeypatch.setattr(doctor_module, "cuda_compiler", lambda: "nvcc")
    monkeypatch.setattr(cuda, "compiled_archs", lambda mode: {"sm_90"})
    monkeypatch.setattr(doctor_module, "compiled_archs", lambda mode: {"sm_90"})
    found = doctor_function(**folders, nvml=FakeNvml(H200))
    assert "NVIDIA H200, sm_90a, driver 580" in named(found, "GPU").detail
    assert named(found, "CUDA compiler").status == "ok" and "CUDA runtime" not in {check.name for check in found}
    quick["cuda"] = False
    found = doctor_function(**folders, nvml=FakeNvml(H200))
    assert named(found, "CUDA runtime").status == "fail" and not found.ok
    found = doctor_function(**folders, nvml=FakeNvml(init_error=pynvml.NVML_ERROR_DRIVER_NOT_LOADED))
    assert named(found, "GPU").status == "warn" and "Driver Not Loaded" in named(found, "GPU").detail


@pytest.mark.parametrize(("free", "status"), [(100e6, "fail"), (1e9, "warn"), (9e9, "ok")])
def test_disk(monkeypatch, tmp_path, quick, free, status):
    monkeypatch.setattr(doctor_module.shutil, "disk_usage", lambda path: Usage(1e12, 1e12 - free, free))
    found = doctor_function(runs_dir=tmp_path / "a" / "b", cache_dir=tmp_path, nvml=NO_NVML)
    assert named(found, "runs folder").status == named(found, "temporary folder").status == status
    if status == "fail":
        with pytest.raises(MissingTool, match=r"100 MB free, 200 MB are needed: free some"):
            require_disk(tmp_path / "not" / "yet")
    else:
        require_disk(tmp_path / "not" / "yet")


def test_locks_that_do_not_hold(monkeypatch, tmp_path, quick):
    class Loose:
        def __init__(self, *_, **__): ...
        def __enter__(self): ...
        def __exit__(self, *_): ...
        def acquire(self): ...

    monkeypatch.setattr(doctor_module, "FileLock", Loose)
    found = doctor_function(runs_dir=tmp_path, cache_dir=tmp_path, nvml=NO_NVML)
    assert named(found, "file locks").status == "fail" and "do not hold" in named(found, "file locks").detail


def test_cache_folder_that_cannot_be_written(tmp_path, quick):
    (tmp_path / "file").write_text("")
    found = doctor_function(runs_dir=tmp_path, cache_dir=tmp_path / "file" / "x", nvml=NO_NVML)
    assert named(found, "cache folder").status == "warn" and found.ok


def test_a_check_that_raises_does_not_hide_the_others(monkeypatch, tmp_path, quick):
    def boom():
        raise ValueError("boom")

    monkeypatch.setattr(doctor_module, "_check_memory", boom)
    found = doctor_function(runs_dir=tmp_path, cache_dir=tmp_path, nvml=NO_NVML)
    assert named(found, "memory").status == "fail" and "boom" in named(found, "memory").detail
    assert named(found, "notebook").status == "ok"


def test_diagnosis_shows_the_remedy():
    sick = Diagnosis([Check("disk", "ok", "9 GB"), Check("C<C", "fail", "none", "install one")])
    assert not sick.ok and repr(sick).splitlines()[-1].strip() == "-> install one"
    assert "C&lt;C" in sick._repr_html_()


SICK = [
    (FakeNvml(H200, cuda=12040), "fail", "supports CUDA 12.4, TVM's runtime needs 13.0", "580 or newer"),
    (FakeNvml(H200, free=[0.5]), "warn", "0.5 of its 141 GiB of memory free", "nvidia-smi"),
    (FakeNvml(H200, processes=[[1, 1]]), "warn", "in use by 1 other process", "wait for their end"),
    (FakeNvml(("Tesla V100", (7, 0), 16)), "fail", "nvcc does not know sm_70", "knows up to sm_90"),
    (FakeNvml(H200, T4), "warn", "cuda:0 is NVIDIA H200; cuda:1 is Tesla T4", "name the target"),
    (FakeNvml(H200, broken=(0,)), "warn", "GPU 0 does not answer", "nvidia-smi"),
]  # fmt: skip


@pytest.fixture
def nvcc(monkeypatch):
    """A compiler for sm_75 to sm_90."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(cuda, "cuda_compiler", lambda: "nvcc")
    monkeypatch.setattr(cuda, "load_runtime", lambda: True)
    monkeypatch.setattr(cuda, "compiled_archs", lambda mode: frozenset({"sm_75", "sm_80", "sm_90"}))


@pytest.mark.parametrize(("nvml", "status", "words", "remedy"), SICK)
def test_what_is_wrong_with_a_gpu(monkeypatch, tmp_path, quick, nvcc, nvml, status, words, remedy):
    found = doctor_function(runs_dir=tmp_path, cache_dir=tmp_path, nvml=nvml)
    (check,) = (check for check in found if words in check.detail)
    assert check.status == status and remedy in check.remedy
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with pytest.warns(RuntimeWarning, match=re.escape(words)) as warned:
        targets(cache_dir=tmp_path)
    assert len(warned) == 1  # one message for one fault
    if status == "fail":
        with pytest.raises(MissingTool, match=re.escape(words)):
            require_gpu("cuda:0")
    else:
        require_gpu("cuda:0")


def test_a_healthy_gpu_is_not_complained_of(monkeypatch, tmp_path, quick, nvcc):
    healthy = FakeNvml(H200, H200, processes=[[os.getpid()], []])
    found = doctor_function(runs_dir=tmp_path, cache_dir=tmp_path, nvml=healthy)
    assert [check.status for check in found if check.name == "GPU"] == ["ok", "ok"]
    silent = FakeNvml(H200, processes=None)  # NVML may refuse to list processes
    assert cuda.nvidia_gpus(silent)[0][0].others == 0


def test_no_runtime_library_for_a_gpu(monkeypatch, tmp_path, quick, nvcc):
    """torch for CUDA 12 beside tvmlab without its extra: a compiler, and no libcudart.so.13."""
    monkeypatch.setattr(cuda, "load_runtime", lambda: False)
    found = doctor_function(runs_dir=tmp_path, cache_dir=tmp_path, nvml=FakeNvml(H200))
    (check,) = (check for check in found if "libcudart.so.13, is not found" in check.detail)
    assert check.status == "fail" and check.remedy == "pip install -e '.[cuda]' in tvmlab's checkout"
    assert not [check for check in found if check.name == "CUDA runtime"]  # one message for one fault
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(H200))
    with pytest.raises(MissingTool, match="libcudart"):
        require_gpu("cuda:0")


def test_the_runtime_library_is_that_of_the_wheels(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda, "library_folders", lambda: [str(tmp_path)])
    loaded = []

    def load(path):
        loaded.append(path)
        if not path.startswith(str(tmp_path)):
            raise OSError("no such library")

    monkeypatch.setattr(cuda.ctypes, "CDLL", load)
    assert cuda.load_runtime() and loaded == [f"{tmp_path}/libcudart.so.13"]
    monkeypatch.setattr(cuda, "library_folders", lambda: [])
    assert not cuda.load_runtime() and loaded[-1] == "libcudart.so.13"


def test_no_compiler_for_a_gpu(monkeypatch, tmp_path, quick, nvcc):
    monkeypatch.setattr(cuda, "cuda_compiler", lambda: None)
    found = doctor_function(runs_dir=tmp_path, cache_dir=tmp_path, nvml=FakeNvml(H200))
    (check,) = (check for check in found if "no CUDA compiler" in check.detail)
    assert check.status == "fail" and check.remedy == "pip install -e '.[cuda]' in tvmlab's checkout"
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(H200))
    with pytest.raises(MissingTool, match=r"no CUDA compiler.*pip install -e '\.\[cuda\]' in tvmlab's checkout"):
        require_gpu("cuda:0")


@pytest.fixture
def fresh_compilers(monkeypatch):
    """What the compilers said is forgotten, before and after."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    cuda.compiled_archs.cache_clear()
    yield
    cuda.compiled_archs.cache_clear()


@pytest.mark.parametrize(
    ("mode", "words", "remedy"),
    [
        ("nvcc", "CUDA compiler nvcc does not answer", "on the PATH"),
        ("nvrtc", "CUDA compiler nvrtc does not answer", ".[cuda]"),
        ("foo", "TVM_CUDA_COMPILE_MODE says 'foo'", "'nvrtc' or 'nvcc'"),
    ],
)
def test_a_compiler_that_does_not_answer(monkeypatch, tmp_path, quick, fresh_compilers, mode, words, remedy):
    """nvcc is asked for where there is none, cuda-bindings installed without NVRTC's library, no such mode known."""

    def no_library():
        raise RuntimeError("Failure finding libnvrtc.so")

    monkeypatch.setenv("TVM_CUDA_COMPILE_MODE", mode)
    monkeypatch.setenv("PATH", str(tmp_path))
    without = SimpleNamespace(nvrtcGetSupportedArchs=no_library)
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", without)
    nvml = FakeNvml(H200)
    found = doctor_function(runs_dir=tmp_path, cache_dir=tmp_path, nvml=nvml)
    (check,) = (check for check in found if words in check.detail)
    assert check.status == "fail" and remedy in check.remedy
    assert "CUDA compiler" not in {check.name for check in found}
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with pytest.warns(RuntimeWarning, match=re.escape(words)):
        targets(cache_dir=tmp_path)
    with pytest.raises(MissingTool, match=re.escape(words)):
        require_gpu("cuda:0")


def test_a_card_without_a_driver(monkeypatch, tmp_path, quick):
    slot = tmp_path / "pci" / "0000:01:00.0"
    slot.mkdir(parents=True)
    (slot / "vendor").write_text("0x10de\n")
    (slot / "class").write_text("0x040300\n")  # its sound
    assert cuda.gpu_problems([], tmp_path / "pci") == []
    (slot / "class").write_text("0x030200\n")
    (problem,) = cuda.gpu_problems([], tmp_path / "pci")
    assert "no driver is loaded" in problem.text and "580" in problem.remedy
    monkeypatch.setattr(cuda, "gpu_problems", lambda gpus: [problem])
    monkeypatch.setattr(doctor_module, "gpu_problems", lambda gpus: [problem])
    monkeypatch.setattr(sys.modules["tvmlab.targets"], "gpu_problems", lambda gpus: [problem])
    monkeypatch.setitem(sys.modules, "pynvml", NO_NVML)
    found = doctor_function(runs_dir=tmp_path, cache_dir=tmp_path, nvml=NO_NVML)
    assert named(found, "GPU").status == "warn" and "no driver" in named(found, "GPU").detail
    with pytest.raises(MissingTool, match=r"none is attached .*no driver is loaded"):
        target("cuda")


@pytest.mark.parametrize(
    ("said", "known"),
    [("sm_75\nsm_80\nsm_90\n", {"sm_75", "sm_80", "sm_90"}), ("", set()), (None, set())],
)
def test_the_architectures_of_nvcc(monkeypatch, said, known):
    def run(command, **_):
        assert command == ["nvcc", "--list-gpu-code"]
        if said is None:
            raise FileNotFoundError
        return subprocess.CompletedProcess(command, 0, said)

    monkeypatch.setattr(cuda.subprocess, "run", run)
    assert cuda.compiled_archs.__wrapped__("nvcc") == known
