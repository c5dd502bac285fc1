"""Targets: what is attached, by name, as a record; with fake machines (files) and a fake NVML."""

import json
import os
import pickle
import subprocess
import sys

import pynvml
import pytest
from fake_nvml import H200, T4, FakeNvml

from tvmlab import llvm
from tvmlab.core import InputError, MissingTool, RecordError, Roofline
from tvmlab.cuda import nvidia_gpus
from tvmlab.hardware import read_cpu
from tvmlab.roofline import child_env
from tvmlab.targets import Target, TargetList, gpu_targets, target, targets

AVX512 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
V3 = {"sse4_1", "sse4_2", "ssse3", "cx16", "lahf_lm", "popcnt", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma",
      "abm", "movbe"}  # fmt: skip


def machine(root, cpus=4, *, threads_per_core=1, flags=AVX512 | V3, files=()):
    """A fake /proc and /sys with so many logical CPUs; siblings are numbered next to each other."""
    first = f"model name\t: Fast(R) Core(TM) CPU 9\nflags\t\t: {' '.join(sorted(flags))}"
    written = {"proc/cpuinfo": f"{first}\n\nmodel name : other"}
    for cpu in range(cpus):
        top = f"sys/devices/system/cpu/cpu{cpu}"
        core = cpu // threads_per_core
        written |= {
            f"{top}/topology/physical_package_id": "0\n", f"{top}/topology/core_id": f"{core}\n",
            f"{top}/cache/index0/level": "1", f"{top}/cache/index0/size": "32K",
            f"{top}/cache/index0/shared_cpu_list": str(core),
            f"{top}/cache/index3/level": "3", f"{top}/cache/index3/size": "16384K",
            f"{top}/cache/index3/shared_cpu_list": "0-1" if cpu < 2 else "2-3",
        }  # fmt: skip
    for name, text in {**written, **dict(files)}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_cpu_of_a_fake_machine(tmp_path):
    cpu = read_cpu(machine(tmp_path), allowed=range(4))
    assert (cpu.name, cpu.cores, cpu.bind_threads) == ("Fast Core 9", 4, True)
    assert cpu.cache_bytes == 2 * 16384 * 1024  # two last-level caches, each counted once
    assert cpu.extensions[0] == "AVX-512"


def test_affinity_and_siblings(tmp_path):
    root = machine(tmp_path, threads_per_core=2)
    both = read_cpu(root, allowed=range(4))
    assert (both.cores, both.bind_threads) == (2, False)  # CPUs 0 and 1 are one core: TVM must not pin there
    assert read_cpu(root, allowed={2, 3}).cores == 1
    assert not read_cpu(machine(tmp_path), allowed={2, 3}).bind_threads


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "150000 100000"}, 1),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "max 100000"}, 4),
        ({"proc/self/cgroup": "0::/gone", "sys/fs/cgroup/cpu.max": "200000 100000"}, 2),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "5000 100000"}, 1),
        ({"proc/self/cgroup": "4:cpu,cpuacct:/x", "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us": "300000",
          "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us": "100000"}, 3),
        ({"proc/self/cgroup": "1:cpu:/", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
          "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 4),
    ],
)  # fmt: skip
def test_cgroup_quota(tmp_path, files, cores):
    assert read_cpu(machine(tmp_path, files=files.items()), allowed=range(4)).cores == cores


def test_cgroup_memory(tmp_path):
    files = {"proc/self/cgroup": "0::/a", "sys/fs/cgroup/a/memory.max": str(1 << 30)}
    assert read_cpu(machine(tmp_path, files=files.items()), allowed=range(4)).memory_bytes == 1 << 30


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
def test_real_affinity_is_respected():
    code = "import os; os.sched_setaffinity(0, {0}); from tvmlab.hardware import *; print(read_cpu().cores)"
    done = subprocess.run([sys.executable, "-c", code], env=child_env({}), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def test_no_gpu_is_no_problem():
    assert nvidia_gpus(FakeNvml(init_error=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)) == ([], [])
    assert nvidia_gpus(FakeNvml()) == ([], [])


def test_broken_driver_is_told():
    gpus, problems = nvidia_gpus(FakeNvml(H200, init_error=pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH))
    assert gpus == [] and "does not answer" in problems[0].text
    nvml = FakeNvml(H200, T4, broken=(0,))
    gpus, problems = nvidia_gpus(nvml)
    assert [(gpu.index, gpu.name) for gpu in gpus] == [(1, "Tesla T4")]  # it keeps CUDA's number
    assert "GPU 0" in problems[0].text and nvml.open == 0


def test_two_kinds_of_gpu(tmp_path):
    found = gpu_targets(nvidia_gpus(FakeNvml(H200, T4))[0], tmp_path)
    assert [item.name for item in found] == ["cuda:0", "cuda:1"]
    first, second = found
    assert first.attrs["arch"] == "sm_90a" and second.attrs["arch"] == "sm_75"
    tag = target("nvidia/nvidia-h100").attrs
    for name in (
        "max_threads_per_block",
        "registers_per_block",
        "max_shared_memory_per_block",
        "thread_warp_size",
    ):
        assert first.attrs[name] == tag[name]
    assert first.details["shared_memory_optin_bytes"] == 227 * 1024
    assert first.details["driver"] == "580.65.06" and "141 GiB" in first.label
    assert first.to_tvm().kind.name == "cuda" and first.vector_bits == 128


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        ("1", ["Tesla T4"]), ("1,0", ["Tesla T4", "NVIDIA H200"]), ("", []), ("-1", []),
        ("0,7,1", ["NVIDIA H200"]),
        ("GPU-1", ["Tesla T4"]), ("GPU-", []),
    ],
)  # fmt: skip
def test_cuda_visible_devices(visible, names):
    gpus, _ = nvidia_gpus(FakeNvml(H200, T4), visible)
    assert [gpu.name for gpu in gpus] == names
    assert [gpu.index for gpu in gpus] == list(range(len(names)))


def test_a_new_compute_capability_still_makes_a_target(tmp_path):
    (only,) = gpu_targets(nvidia_gpus(FakeNvml(("NVIDIA X", (14, 2), 8)))[0], tmp_path)
    assert only.attrs == {"kind": "cuda", "arch": "sm_142a"}


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(H200, T4))


@pytest.fixture
def no_gpu(monkeypatch):
    fake = FakeNvml(init_error=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    monkeypatch.setitem(sys.modules, "pynvml", fake)


def test_names_with_gpus(two_gpus, tmp_path):
    assert [item.name for item in targets(cache_dir=tmp_path)] == ["cuda:0", "cuda:1", "cpu"]
    assert target("auto").device == target("cuda").device == "cuda:0"
    assert target("cuda:1").attrs["arch"] == "sm_75"
    same = target('{"kind": "cuda", "arch": "sm_75", "max_threads_per_block": 256}', cache_dir=tmp_path)
    assert same.device == "cuda:1" and same.attrs["max_threads_per_block"] == 256
    with pytest.raises(InputError, match="attached are cuda:0, cuda:1, cpu"):
        target("cuda:2")


def test_names_without_gpu(no_gpu):
    assert target("auto").device == target("cpu").device == "cpu"
    with pytest.raises(MissingTool, match=r"none is attached.*compile only"):
        target("cuda")


def test_a_worker_runs_as_many_threads_as_the_target_has_cores(no_gpu):
    """Left alone, TVM takes half the logical CPUs on x86."""
    code = "import tvm, tvm_ffi; print(tvm_ffi.get_global_func('runtime.NumThreads')())"
    one = target(json.dumps({**target("cpu").attrs, "num-cores": 1}))
    for item in (target("cpu"), one):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=child_env(item.worker_env()), capture_output=True, text=True, check=True)
        assert done.stdout.strip() == str(item.attrs["num-cores"])


def test_the_attached_cpu(no_gpu):
    cpu = target("cpu")
    assert cpu.attrs["mcpu"] not in ("", "generic", "x86-64") and cpu.attrs["num-cores"] == read_cpu().cores
    env = cpu.worker_env()
    assert env["TVM_NUM_THREADS"] == str(cpu.attrs["num-cores"])
    assert str(cpu.to_tvm().attrs["mcpu"]) == cpu.attrs["mcpu"]
    assert json.loads(json.dumps(cpu.details)) == cpu.details


@pytest.mark.parametrize(
    ("name", "bits"),
    [("cpu:znver5", 512), ("cpu:haswell", 256), ("cpu:nehalem", 128), ("sm_80", 128),
     ("nvidia/geforce-rtx-4090", 128),
     ('{"kind": "llvm", "mcpu": "cortex-a72", "mtriple": "aarch64-linux-gnu"}', 128),
     ('{"kind": "cuda", "arch": "sm_80"}', 128)],
)  # fmt: skip
def test_compile_only(no_gpu, name, bits):
    named = target(name)
    assert named.device is None and named.roofline is None and named.vector_bits == bits
    assert named.name == name and json.loads(json.dumps(named.attrs)) == named.attrs
    assert named.to_tvm().kind.name == named.kind
    if named.kind == "cuda":
        assert named.attrs["max_shared_memory_per_block"] == 49152


def test_tags_come_back_from_their_attributes(no_gpu):
    import tvm

    for tag in ("nvidia/nvidia-h100", "aws/cpu/c5.large", "nvidia/jetson-agx-xavier"):
        assert str(target(tag).to_tvm()) == str(tvm.target.Target(tag))


def test_json_of_the_attached_cpu_runs_on_it(no_gpu):
    mcpu = target("cpu").attrs["mcpu"]
    one = target(json.dumps({**target("cpu").attrs, "num-cores": 1}))
    assert one.device == "cpu" and one.attrs == {**target("cpu").attrs, "num-cores": 1, "mcpu": mcpu}
    assert one.worker_env()["TVM_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("gpu", "attached are cpu"), ("", "attached are cpu"), ("llvm", "attached are cpu"),
        ("sm_77", "sm_80"),
        ("nvidia/nvidia-h200", "did you mean 'nvidia/nvidia-h100'"), ("cpu:skylake-avx51", "skylake-avx512"),
        ("cpu:", "generic"), ('{"kind": "llvm"}', "generic"),
        ('{"kind": "cuda"}', "names no CUDA architecture"),
        ("{oops", "not JSON"), ('{"kind": "llvm", "mcpu": "znver5", "colour": 1}', "colour"),
        ('{"kind": "llvm", "mcpu": 7}', "LLVM knows no CPU 7"), ("apple/m1-gpu", "kind 'metal'"),
        ('{"kind": "vulkan"}', "kind 'vulkan'"), ('{"kind": "cuda", "arch": "sm_80", "colour": 1}', "colour"),
    ],
)  # fmt: skip
def test_unknown_names_are_refused(no_gpu, name, problem):
    with pytest.raises(InputError) as caught:
        target(name)
    assert problem in str(caught.value) and "\n" not in str(caught.value)


def test_a_cpu_that_llvm_does_not_know():
    mcpu, mattr, note = llvm.host_code("generic", frozenset(AVX512 | V3))
    assert (mcpu, mattr) == ("x86-64-v4", []) and "generic" in note
    assert llvm.host_code("x86-64", frozenset(V3))[0] == "x86-64-v3"
    assert llvm.host_code("nehalem", frozenset(AVX512 | V3))[0] == "x86-64-v4"  # narrower than the CPU is


def test_instructions_hidden_by_a_hypervisor():
    mcpu, mattr, note = llvm.host_code("znver5", frozenset(V3))
    assert mcpu == "znver5" and "-avx512f" in mattr and "hypervisor" in note
    known = llvm.features({"kind": "llvm", "mcpu": mcpu, "mattr": mattr})
    assert llvm.vector_bits(known) == 256 and "avx2" in known
    assert llvm.host_code("haswell", frozenset(V3)) == ("haswell", [], "")


def test_record_round_trip(no_gpu, tmp_path):
    cpu = target("cpu", cache_dir=tmp_path)
    object.__setattr__(cpu, "_roofline", Roofline(100.0, 10.0))
    record = json.loads(json.dumps(cpu.as_record()))
    again = Target.from_record(record)
    assert again == cpu and again.as_record() == record and again.roofline == Roofline(100.0, 10.0)
    # A record made elsewhere is never measured here.
    assert Target.from_record({**record, "roofline": None}).roofline is None
    with pytest.raises(RecordError, match="kind"):
        Target.from_record({key: value for key, value in record.items() if key != "kind"})
    assert pickle.loads(pickle.dumps(cpu)).roofline == cpu.roofline


def test_tables():
    shown = Target(
        "cpu",
        "<Fast> 2",
        "llvm",
        {"mcpu": "znver5"},
        "cpu",
        {"memory_bytes": 8 << 30},
        Roofline(1234.5, 9.87),
    )
    text = repr(TargetList([shown]))
    assert text.splitlines()[0].split() == ["name", "label", "peak", "GFLOP/s", "GB/s", "arch", "memory"]
    for cell in ("1,23", "9.9", "znver5", "8 GiB"):
        assert cell in text
    assert "&lt;Fast&gt;" in shown._repr_html_() and "<Fast>" not in TargetList([shown])._repr_html_()


def test_a_roofline_that_cannot_be_measured_is_a_warning():
    def fails():
        raise MissingTool("no luck", remedy="run tvmlab doctor")

    broken = Target("cpu", "x", "llvm", {}, "cpu", {}, None, fails)
    with pytest.warns(RuntimeWarning, match="no luck"):
        assert broken.roofline is None
    assert broken.roofline is None  # and it is not tried again
