"""The doctor: each check on a healthy and on a sick machine."""

import sys
from collections import namedtuple

import pynvml
import pytest
from fake_nvml import H200, FakeNvml

from tvmlab import doctor as doctor_function
from tvmlab.core import MissingTool
from tvmlab.doctor import Check, Diagnosis, check_versions, pins, require_compiler, require_disk
from tvmlab.hardware import compiler

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
    monkeypatch.setattr(doctor_module, "cuda_compiler", lambda: "nvcc")
    found = doctor_function(**folders, nvml=FakeNvml(H200))
    assert "NVIDIA H200, sm_90a, driver 580" in named(found, "GPU").detail
    assert named(found, "CUDA compiler").status == "ok" and "CUDA runtime" not in {check.name for check in found}
    monkeypatch.setattr(doctor_module, "cuda_compiler", lambda: None)
    quick["cuda"] = False
    found = doctor_function(**folders, nvml=FakeNvml(H200))
    assert named(found, "CUDA compiler").status == named(found, "CUDA runtime").status == "warn"
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
