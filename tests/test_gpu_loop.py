"""The whole loop on a CUDA target, without a card: the real search and measurer, a device that answers from records."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fake_device
import pynvml
import pytest
from fake_measurer import latency_of
from fake_nvml import H200, FakeNvml
from test_transfer import write_model

from tvmlab import rates, search_process
from tvmlab import run as run_module
from tvmlab.compat import read_database, structural_key
from tvmlab.core import Candidate, Roofline, TrialStatus
from tvmlab.experiment import Ansor, AutoTVM, Droplet, Experiment, Measure, TransferTuning
from tvmlab.frames import trials as frame_of
from tvmlab.measure import local
from tvmlab.measure import watch as watch_module
from tvmlab.measure.builder import Build
from tvmlab.measure.local import LocalMeasurer
from tvmlab.measure.process import WorkerProcess
from tvmlab.measure.watch import NoWatch, Watch
from tvmlab.models import load_model
from tvmlab.records import RunFolder
from tvmlab.session import Session
from tvmlab.targets import target
from tvmlab.tasks import extract, lower

HERE = str(Path(__file__).parent)
POWER_CAP = 0x04


class FakePool:
    """A BuilderPool whose libraries are text files; `gate` holds builds back while it is clear."""

    def __init__(self, target_json, workers, timeout_s, scratch, log, environment):
        self._scratch = scratch
        self._threads = ThreadPoolExecutor(workers)
        self.environment = environment
        self.gate = threading.Event()
        self.gate.set()
        self.built = []
        self.pids = []

    def submit(self, text):
        return self._threads.submit(self._build, text)

    def _build(self, text):
        self.gate.wait(30)
        folder = self._scratch / f"{len(self.built)}-{time.monotonic_ns()}"
        folder.mkdir()
        (folder / "kernel.so").write_text(text)
        self.built.append(text)
        return Build(TrialStatus.OK, str(folder / "kernel.so"), 0.01)

    def close(self):
        self.gate.set()
        self._threads.shutdown(cancel_futures=True)


class FakeDeviceProcess(WorkerProcess):
    def __init__(self, module, arguments, log, environment):
        assert module == "tvmlab.measure.device"
        super().__init__("fake_device", arguments, log, {**environment, "PYTHONPATH": f"{HERE}:{Path(HERE).parent}"})


@pytest.fixture(scope="module")
def h200():
    """An H200 as a target with its device, which is not there."""
    made = target("sm_90a")
    details = {**made.details, "uuid": "GPU-0abc", "memory_bytes": 141 << 30}
    return replace(made, name="cuda:0", device="cuda:0", details=details, _roofline=Roofline(6e4, 4e3))


@pytest.fixture(scope="module")
def tasks(tiny_model, h200):
    return [task for task in extract(tiny_model, h200) if task.info.tunable]


@pytest.fixture
def no_card(monkeypatch):
    """What stands in for the builders, the device's process and the driver."""
    nvml = FakeNvml(H200)
    monkeypatch.setattr(local, "BuilderPool", FakePool)
    monkeypatch.setattr(local, "WorkerProcess", FakeDeviceProcess)
    monkeypatch.setattr(Watch, "open", classmethod(lambda cls, uuid, path: cls(uuid, path, nvml)))
    return nvml


@pytest.fixture
def measurer(no_card, h200, tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "_to_json", lambda module: module if isinstance(module, str) else "default")
    with LocalMeasurer(tasks, h200, Measure(build_workers=2, run_timeout_s=3.0), tmp_path) as made:
        list(made.measure_defaults([tasks[0].key]))
        yield made


class Payload:
    def __init__(self, mod):
        self.mod = mod


def candidates(task, *texts):
    return [Candidate(task.key, text, 0, [number], Payload(text)) for number, text in enumerate(texts)]


def test_candidates_run_in_order_while_the_next_are_built(measurer, tasks):
    assert measurer.overlaps
    measurer._builders.gate.clear()
    first = measurer.measure(candidates(tasks[0], *"0123"))
    second = measurer.measure(candidates(tasks[0], *"4567"))  # before anything is asked of the first
    measurer._builders.gate.set()
    found = list(second)
    assert sorted(measurer._builders.built[1:]) == list("01234567")
    for text, measured in zip("0123", first, strict=True):  # all measured by now
        assert measured.latencies_s[1] == pytest.approx(1e-3 * latency_of(text))
    assert [m.status for m in found] == ["ok"] * 4 and measurer.run_s > 0


@pytest.mark.timeout(60)
def test_a_task_whose_default_was_not_measured_here(no_card, h200, tasks, tmp_path, monkeypatch):
    """As in a resumed run, whose defaults are in its records: the device's thread must not wait for itself."""
    monkeypatch.setattr(local, "_to_json", lambda module: module if isinstance(module, str) else "default")
    with LocalMeasurer(tasks, h200, Measure(build_workers=2, run_timeout_s=3.0), tmp_path) as made:
        found = list(made.measure([*candidates(tasks[0], "1", "dies", "2"), *candidates(tasks[1], "3")]))
        assert [m.status for m in found] == ["ok", "crashed", "ok", "ok"]
        assert made._builders.built.count("default") == 2


class Counting(FakePool):
    """Builds that take a while; `most` is how many there were at once."""

    last = None

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.now = self.most = 0
        Counting.last = self

    def _build(self, text):
        self.now += 1
        self.most = max(self.most, self.now)
        time.sleep(0.6)
        try:
            return super()._build(text)
        finally:
            self.now -= 1


@pytest.mark.parametrize("step", [Ansor(max_trials=60, batch_size=4), AutoTVM(kernel_trials=30, batch_size=4)])
def test_builds_fill_the_cores(no_card, h200, tiny_onnx, tmp_path, monkeypatch, step):
    """Sixteen builders, batches of four: several of these are under way, not two."""
    monkeypatch.setattr(search_process, "named_target", lambda name: h200)
    monkeypatch.setattr(local, "BuilderPool", Counting)
    monkeypatch.setattr(rates, "read_cpu", lambda: SimpleNamespace(cores=16))
    asked = Experiment(model=tiny_onnx, target="cuda:0", steps=[step], measure=Measure(build_workers=16))
    folder = RunFolder.create(asked, tmp_path)
    search_process.search(folder, threading.Event())
    assert folder.state.status == "done" and folder.state.trials >= 40
    assert Counting.last.most >= 14


def test_builders_get_the_compiler_and_its_libraries(measurer):
    assert measurer._builders.environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert "LD_LIBRARY_PATH" in measurer._builders.environment


@pytest.mark.parametrize(
    ("fate", "status"),
    [("loses its context", "crashed"), ("dies", "crashed"), ("hangs", "run_timeout"), ("raises", "run_error")],
)
def test_what_a_kernel_does_to_the_device_ends_its_process_not_the_run(measurer, tasks, fate, status):
    assert fate in fake_device.FATES
    before = measurer._device.generation
    found = list(measurer.measure(candidates(tasks[0], "1", fate, "2")))
    assert [m.status for m in found] == ["ok", status, "ok"]
    assert measurer._device.generation == before + (fate != "raises")


def test_what_nobody_waits_for_is_not_run(measurer, tasks):
    measurer._builders.gate.clear()
    given_up = measurer.measure(candidates(tasks[0], *"abcdef"))
    given_up.close()
    measurer._builders.gate.set()
    (kept,) = measurer.measure(candidates(tasks[0], "1"))
    assert kept.status == "ok"
    assert len(measurer._builders.built) <= 1 + 2 + 1  # the default, those that two workers had begun, the last


def test_closing_in_the_middle_leaves_no_process(measurer, tasks):
    measurer.measure(candidates(tasks[0], "hangs", "1", "2"))
    while not measurer._builders.built[1:]:
        time.sleep(0.01)
    measurer.close()
    assert measurer.pids == [] and measurer._device.pid is None


def test_a_throttled_batch_is_marked(measurer, no_card, tasks, tmp_path):
    no_card.looks = [(1980, 300, 40, 0), (1200, 700, 80, POWER_CAP), (1980, 310, 41, 0x01)]
    cool, hot, idle = measurer.measure(candidates(tasks[0], "1", "2", "3"))
    assert (cool.message, idle.message) == ("", "")
    assert hot.message == "measured while the GPU was throttled: power cap"
    list(measurer.measure(candidates(tasks[0], "4")))
    measurer._turn.submit(lambda: None).result()  # after the note of the last batch
    throttled, full = RunFolder(tmp_path).batches()
    assert throttled["throttled"] == ["power cap"] and throttled["candidates"] == throttled["looks"] == 3
    assert (throttled["sm_mhz"], throttled["power_w"], throttled["temperature_c"]) == ([1200, 1980], 700.0, 80)
    assert full["throttled"] == [] and full["tasks"] == [tasks[0].key]


def test_a_driver_that_tells_nothing_does_not_stop_the_run(tmp_path, capsys):
    refusing = FakeNvml(H200, looks=[pynvml.NVML_ERROR_NOT_SUPPORTED])
    watch = Watch.open("GPU-0abc", tmp_path / "device.jsonl", refusing)
    assert type(watch) is NoWatch and watch.look() == ""
    watch.note({})
    assert "not recorded: NVML says" in capsys.readouterr().out and not list(tmp_path.iterdir())
    lost = FakeNvml(H200, looks=[(1980, 300, 40, 0), pynvml.NVML_ERROR_GPU_IS_LOST])
    watch = Watch.open("GPU-0abc", tmp_path / "device.jsonl", lost)
    assert watch.look() == ""
    watch.close()


def test_the_share_of_time_in_which_the_gpu_is_busy_is_sampled_between_candidates_too(tmp_path, monkeypatch):
    """Seconds of measuring are no GPU time: loading, copies and checks are in them."""
    monkeypatch.setattr(watch_module, "_SAMPLE_S", 0.01)
    nvml = FakeNvml(H200, busy=[100, 60, 20, 0])
    watch = Watch.open("GPU-0abc", tmp_path / "device.jsonl", nvml)
    while len(nvml.busy) > 1 or len(watch._percent) < 5:
        time.sleep(0.01)
    watch.look()
    seen = len(watch._percent)
    watch.note({})
    watch.look()
    while len(watch._percent) < 3:
        time.sleep(0.01)
    watch.note({})
    watch.close()
    first, second = RunFolder(tmp_path).batches()
    assert first["busy"] == pytest.approx(1.8 / seen, abs=0.05) and second["busy"] == 0.0
    assert not watch._sampler.is_alive()


def test_a_driver_that_does_not_tell_how_busy_the_gpu_is_tells_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(watch_module, "_SAMPLE_S", 0.01)
    watch = Watch.open("GPU-0abc", tmp_path / "device.jsonl", FakeNvml(H200, busy=[-1]))
    time.sleep(0.05)
    watch.look()
    watch.note({})
    watch.close()
    (row,) = RunFolder(tmp_path).batches()
    assert row["busy"] is None and row["sm_mhz"] == [1980, 1980]


def test_a_run_on_a_gpu_from_start_to_end(no_card, h200, tiny_onnx, tmp_path, monkeypatch):
    no_card.looks = [(1980, 300, 40, 0)] * 5 + [(1500, 650, 70, POWER_CAP)] * 3 + [(1980, 300, 40, 0)]
    monkeypatch.setattr(search_process, "named_target", lambda name: h200)
    step = Ansor(max_trials=12, population=16, generations=1, batch_size=4)
    asked = Experiment(model=tiny_onnx, target="cuda:0", steps=[step], measure=Measure(build_workers=2))
    folder = RunFolder.create(asked, tmp_path)
    with folder.acquire():
        search_process.search(folder, threading.Event())
    assert folder.state.status == "done" and folder.state.trials == 12
    found = frame_of(folder)
    assert (found["status"] == "ok").all() and found["latency_us"].gt(0).all()
    batches = folder.batches()
    assert sum(row["candidates"] for row in batches) == 12
    assert 1 <= sum(bool(row["throttled"]) for row in batches) < len(batches)
    assert f"of {len(batches)} batches were measured on a throttled GPU (power cap)" in folder.state.message
    assert folder.environment["target"]["attrs"]["arch"] == "sm_90a"
    slow = folder.read_json("refine.json", missing={"set_aside": []})["set_aside"]
    assert len(slow) == (found["latency_us"] > 1000).sum()  # slower than the default schedule


@pytest.mark.timeout(120)
def test_a_run_on_a_gpu_is_resumed_and_forked(no_card, h200, tiny_onnx, tmp_path, monkeypatch):
    monkeypatch.setattr(search_process, "named_target", lambda name: h200)
    monkeypatch.setattr(run_module, "_check", lambda *_: None)
    monkeypatch.setattr(run_module, "_launch", lambda folder: folder)
    step = Ansor(max_trials=12, population=16, generations=1, batch_size=4)
    asked = Experiment(model=tiny_onnx, target="cuda:0", steps=[step], measure=Measure(build_workers=2))
    folder = RunFolder.create(asked, tmp_path)
    stop, record = threading.Event(), Session.record

    def counted(self, *about):
        trial = record(self, *about)
        if trial.trial == 4:
            stop.set()
        return trial

    with monkeypatch.context() as patched, folder.acquire():
        patched.setattr(Session, "record", counted)
        search_process.search(folder, stop)
    assert folder.state.status == "stopped" and 4 <= folder.state.trials < 12
    with folder.acquire():
        search_process.search(folder, threading.Event())
    assert folder.state.status == "done" and folder.state.trials == 12
    forked = run_module.fork(folder, [Droplet(max_trials=8)])
    with forked.acquire():
        search_process.search(forked, threading.Event())
    descent = [trial for trial in forked.trials() if trial.step == 1]
    assert forked.state.status == "done" and descent and all(trial.ok for trial in descent)


def test_descents_and_transfers_go_by_the_traces_of_a_gpu(no_card, h200, tmp_path, monkeypatch):
    """Real CUDA schedules: neighbours of the best, another model's schedules adapted, and neighbours of these."""
    monkeypatch.setattr(search_process, "named_target", lambda name: h200)
    search = Ansor(max_trials=8, population=16, generations=1, batch_size=4)

    def run(model, *steps):
        asked = Experiment(model=model, target="cuda:0", steps=steps, measure=Measure(build_workers=2)).afresh()
        folder = RunFolder.create(asked, tmp_path / "runs")
        with folder.acquire():
            search_process.search(folder, threading.Event())
        return folder, [trial for trial in folder.trials() if trial.trial]

    source, trials = run(write_model(tmp_path / "source", 12, 16), search, Droplet(max_trials=8))
    in_database = {structural_key(r.workload.mod) for r in read_database(source.path, "cuda").get_all_tuning_records()}
    assert in_database == {info.key for info in source.tasks}  # what was searched is the task, not its default schedule
    descent = [trial for trial in trials if trial.step == 1]
    assert 4 <= len(descent) <= 8 and all(trial.ok and trial.rival for trial in descent)
    folder, trials = run(write_model(tmp_path / "target", 10, 24), TransferTuning(source.id), Droplet(max_trials=8))
    moved = [trial for trial in trials if trial.step == 0]
    assert {trial.strategy for trial in moved} == {"transfer"} and all(trial.ok for trial in moved)
    assert f"transferred from {source.id}" in folder.state.message
    fastest = {key: min((t for t in moved if t.task_key == key), key=lambda t: t.latency_s).key
               for key in {trial.task_key for trial in moved}}  # fmt: skip
    for key, program in fastest.items():
        beside = [trial.rival for trial in trials if trial.step == 1 and trial.task_key == key]
        assert beside[:1] in ([], [program])
    assert any(trial.step == 1 and trial.ok for trial in trials)
    assert set(_scheduled_by(folder, h200)) == {info.name for info in folder.tasks if info.key in fastest}


def _scheduled_by(folder, target):
    """The kernels that a compiled model takes from the records of a run."""
    from tvm.relax import transform

    lowered, _ = lower(load_model(folder.experiment.model), target)
    with target.to_tvm(), read_database(folder.path, target.kind):
        applied = transform.MetaScheduleApplyDatabase()(lowered)
    return [
        name.name_hint
        for name, function in applied.functions.items()
        if function.attrs and "tirx.is_scheduled" in function.attrs
    ]
