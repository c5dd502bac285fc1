"""The form and the monitor, driven headless: a fake search writes trials into a real run folder."""

import importlib
import itertools
import json
import subprocess
import sys
import threading
import time

import pytest

import tvmlab
from tvmlab.core import InputError, RunError, TaskInfo, Trial, TrialStatus
from tvmlab.experiment import Ansor, AutoTVM, Experiment, LayoutTuning, Measure, unit_of
from tvmlab.records import RunFolder, TrialWriter
from tvmlab.widgets import monitor as monitor_module
from tvmlab.widgets.form import Form
from tvmlab.widgets.groups import step_classes
from tvmlab.widgets.monitor import Monitor

running = importlib.import_module("tvmlab.run")
TASKS = [
    TaskInfo("0" * 16, "conv2d_relu", "conv2d+relu", 3, 1e9, 1e6, True, "1x3x8x8"),
    TaskInfo("1" * 16, "<softmax>", "softmax", 1, 1e6, 1e5, True, "1x1000"),
]


class FakeRun:
    """What tvmlab.tune returns, without TVM: a thread of this process appends the trials."""

    def __init__(self, folder, total=6, pause_s=0.1):
        self.folder, self.id, self.total = folder, folder.id, total
        self._pause_s, self._halt, self._locked = pause_s, threading.Event(), threading.Event()
        folder.write_json("tasks.json", TASKS)
        self.write_state("running", 0)
        self._thread = threading.Thread(target=self._search, daemon=True)
        self._thread.start()
        self._locked.wait()

    def write_state(self, status, trials):
        state = self.folder.read_json("state.json")
        self.folder.write_json(
            "state.json", {**state, "status": status, "trials": trials, "total_trials": self.total, "pid": 1}
        )

    def _search(self):
        lock = self.folder.acquire()  # a FileLock belongs to its thread
        self._locked.set()
        writer = TrialWriter(self.folder)
        done = sum(row["trial"] > 0 for row in self.folder.rows())
        if not done:
            for task in TASKS:
                writer.append(self.trial(task, 0, 5e-3))
        while done < self.total and not self._halt.wait(self._pause_s):
            done += 1
            writer.append(self.trial(TASKS[done % 2], done, 5e-3 / (done + 1)))
            self.write_state("running", done)
        self.write_state("stopped" if self._halt.is_set() else "done", done)
        writer.close()
        lock.release()

    @staticmethod
    def trial(task, number, latency_s):
        return Trial(
            task.key,
            0,
            "evolution",
            number,
            f"{number:016x}",
            0,
            [],
            TrialStatus.OK,
            [latency_s],
            elapsed_s=number,
        )

    @property
    def status(self):
        return self.folder.status

    @property
    def progress(self):
        state = self.folder.state
        known = {"estimate_ms": 1.25, "untuned_ms": 20.0, "seconds_left": 7.0, "phase": "searching"}
        return running.Progress(state.status, state.trials, state.total_trials, 61.0, 2.0, **known, message="")

    def stop(self, *, wait=True):
        self._halt.set()
        self._thread.join()

    def wait(self, timeout=None):
        self._thread.join(timeout)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Put the fake in the place of tune and resume; returns tune, and ends what it started."""
    started = []

    def tune(experiment, runs_dir=None, **slower):
        started.append(FakeRun(RunFolder.create(experiment, runs_dir or tmp_path), **slower))
        return started[-1]

    def resume(run, runs_dir=None):
        started.append(FakeRun(RunFolder.open(run)))
        return started[-1]

    monkeypatch.setattr(running, "tune", tune)
    monkeypatch.setattr(running, "resume", resume)
    yield tune
    for run in started:
        run.stop()


def until(condition, timeout_s=30.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the widget did not change in time"
        time.sleep(0.02)


def controls(form):
    return {**form.own.knobs, **form.steps[0].group.knobs, **form.measure.knobs}


def test_every_knob_has_a_control_with_its_help_and_default():
    form = Form(Experiment(model="alexnet"))
    assert form.experiment == Experiment(model="alexnet")
    for options in (Experiment, Ansor, Measure):
        for name, field in options.model_fields.items():
            if name not in ("kind", "steps", "measure"):
                knob = controls(form)[name]
                assert field.description in knob.control.tooltip
                texts = [w.value for w in knob.row.children[0].children if w is not knob.control]
                assert texts == [text for text in (name, unit_of(field)) if text]


def test_a_new_step_class_appears_by_itself(monkeypatch):
    class Droplet(Ansor):
        """Descend."""

    monkeypatch.setattr(Experiment.model_fields["steps"], "annotation", tuple[Ansor | Droplet, ...])
    assert step_classes() == (Ansor, Droplet)
    form = Form(Experiment(model="alexnet", steps=[Ansor(max_trials=5)]))
    form.steps[0].choice.value = Droplet
    assert type(form.experiment.steps[0]) is Droplet
    assert form.experiment.steps[0].max_trials is None


def test_autotvm_can_be_chosen_and_its_tuner_too():
    form = Form(Experiment(model="alexnet"))
    step = form.steps[0]
    assert [label for label, _ in step.choice.options] == [cls.__name__ for cls in step_classes()]
    step.choice.value = AutoTVM
    knobs = step.group.knobs
    assert tuple(knobs["tuner"].control.options) == ("xgb", "genetic", "random", "grid", "droplet")
    assert list(knobs) == [name for name in AutoTVM.model_fields if name != "kind"]
    knobs["tuner"].control.value = "genetic"
    knobs["kernel_trials"].control.value = "64"
    assert form.experiment.steps == (AutoTVM(kernel_trials=64, tuner="genetic"),)
    assert "AutoTVM(kernel_trials=64, tuner='genetic')" in form.code()
    assert "from tvmlab import AutoTVM, Experiment" in form.code()
    assert not form.start_button.disabled


def test_layout_tuning_can_be_chosen_and_its_blocks_too():
    form = Form(Experiment(model="alexnet"))
    step = form.steps[0]
    step.choice.value = LayoutTuning
    knobs = step.group.knobs
    assert list(knobs) == [name for name in LayoutTuning.model_fields if name != "kind"]
    assert knobs["blocks"].control.value == "" and knobs["blocks"].value is None
    knobs["blocks"].control.value = "8, 16"
    knobs["algorithms"].control.value = "direct"
    assert form.experiment.steps == (LayoutTuning(blocks=(8, 16), algorithms=("direct",)),)
    knobs["blocks"].control.value = "many"
    assert "blocks" in knobs["blocks"].error and form.start_button.disabled


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("max_trials", "64", 64),
        ("max_trials", "", None),
        ("time_limit_s", "1.5", 1.5),
        ("time_limit_s", "2", 2.0),
        ("check", False, False),
        ("seed", " 7 ", 7),
        ("dims", "tokens=128, width = 3", {"tokens": 128, "width": 3}),
        ("warm_start", "runs/a, runs/b", ("runs/a", "runs/b")),
        ("model", "my model.onnx", "my model.onnx"),
        ("model", "squeezenet", "squeezenet"),
        ("target", "cuda", "cuda"),
    ],
)
def test_controls_set_the_experiment(name, text, value):
    form = Form(Experiment(model="alexnet"))
    controls(form)[name].control.value = text
    found = form.experiment
    for options in (found, found.steps[0], found.measure):
        if name in type(options).model_fields:
            assert getattr(options, name) == value
    assert not form.start_button.disabled


@pytest.mark.parametrize(
    ("options", "name", "text", "value"),
    [
        (Ansor, "trials_per_kernel", "0", 0),
        (Ansor, "trials_per_kernel", "", None),
        (Ansor, "trials_per_kernel", "1.5", 1.5),
        (Ansor, "max_trials", "many", "many"),
        (Measure, "slow_factor", "0.5", 0.5),
        (Measure, "run_timeout_s", "nan", float("nan")),
        (Experiment, "seed", "-1", -1),
        (Experiment, "dims", "n=0", {"n": 0}),
        (Experiment, "dims", "n", {"n": None}),
        (Experiment, "model", "", ""),
    ],
)
def test_bad_values_are_refused_with_the_message_of_the_api(options, name, text, value):
    form = Form(Experiment(model="alexnet"))
    knob = controls(form)[name]
    with pytest.raises(InputError) as refused:
        options(**{**({"model": "alexnet"} if options is Experiment else {}), name: value})
    good = knob.control.value
    knob.control.value = text
    message = knob.row.children[1]
    assert knob.error == str(refused.value)
    assert message.layout.display != "none"
    assert str(refused.value).replace("'", "&#x27;") in message.value
    assert form.start_button.disabled
    with pytest.raises(InputError, match=name):
        form.start()
    knob.control.value = good
    assert message.layout.display == "none"
    assert not form.start_button.disabled


@pytest.mark.parametrize("runs_dir", [None, "elsewhere"])
def test_code_runs_and_tunes_the_same_experiment(monkeypatch, runs_dir):
    experiment = Experiment(
        model="alexnet",
        target="llvm-x",
        dims={"n": 2},
        seed=3,
        time_limit_s=9.5,
        steps=[Ansor(max_trials=64, warm_start=["a"]), Ansor(population=16)],
        measure=Measure(check=False, repeats=2),
    )
    calls = []
    monkeypatch.setattr(tvmlab, "tune", lambda *a, **k: calls.append((a, k)), raising=False)
    exec(Form(experiment, runs_dir).code(), {})
    assert calls == [((experiment,), {} if runs_dir is None else {"runs_dir": runs_dir})]


def test_start_follows_the_run_to_its_end(start, tmp_path):
    form = Form(Experiment(model="alexnet"), runs_dir=tmp_path)
    blank = form.monitor.curve.value
    assert form.run is None
    run = form.start()
    assert form.run is run and run.folder.path.parent == tmp_path
    assert run.folder.experiment == form.experiment
    until(lambda: form.monitor.status == "done")
    assert bytes(form.monitor.curve.value)[1:4] == b"PNG" and len(form.monitor.curve.value) > 10 * len(blank)
    for word in (
        "done",
        "6 of 6 trials",
        "2 trials/s",
        "model estimate <b>1.25 ms",
        "untuned 20 ms",
        "1:01",
        run.id,
    ):
        assert word in form.monitor.status_line.value
    assert "conv2d_relu" in form.monitor.table.value and "&lt;softmax&gt;" in form.monitor.table.value
    assert not form.start_button.disabled and form.monitor.stop_button.disabled


def test_buttons_stop_and_resume(start):
    form = Form(Experiment(model="alexnet"))
    form.start_button.click()
    until(lambda: "of 6" in form.monitor.status_line.value)
    assert form.start_button.disabled and not form.monitor.stop_button.disabled
    form.monitor.stop_button.click()
    until(lambda: form.monitor.status == "stopped")
    assert not form.monitor.resume_button.disabled
    first = form.run
    form.monitor.resume_button.click()
    assert form.run is not first and form.run.id == first.id
    until(lambda: form.monitor.status == "done")
    assert sum(trial.trial > 0 for trial in form.run.folder.trials()) == 6
    assert form.monitor.resume_button.disabled


def test_a_refused_start_says_why(monkeypatch):
    def refuse(*_, **__):
        raise InputError("unknown model <x>", remedy="see tvmlab.models()")

    monkeypatch.setattr(running, "tune", refuse)
    form = Form(Experiment(model="alexnet"))
    form.start_button.click()
    assert "unknown model &lt;x&gt;: see tvmlab.models()" in form.monitor.message.value
    assert form.run is None and not form.start_button.disabled


def test_a_double_click_starts_one_search(start, tmp_path, monkeypatch):
    """The second click waits in the kernel until the first was heeded, and comes although the button is grey."""
    form = Form(Experiment(model="alexnet"), runs_dir=tmp_path)
    was_disabled = []

    def slowly(*args, **options):
        was_disabled.append(form.start_button.disabled)
        return start(*args, **options, total=10_000)

    monkeypatch.setattr(running, "tune", slowly)
    form.start_button.click()
    form.start_button.click()
    assert was_disabled == [True] and len(list(tmp_path.glob("*/experiment.json"))) == 1
    assert form.start_button.disabled and form.monitor.status == "running"


def test_stop_without_a_run_is_refused():
    with pytest.raises(RunError, match="press Start"):
        Form(Experiment(model="alexnet")).stop()


def test_the_monitor_shows_a_run_that_another_process_ended(start, tmp_path):
    run = start(Experiment(model="alexnet"))
    run.wait()
    view = Monitor(run)
    until(lambda: view.status == "done")
    assert "6 of 6" in view.status_line.value


def test_a_run_that_is_shown_again_is_watched_once(start):
    run = start(Experiment(model="alexnet"), total=10_000)
    shown = [running.Run(RunFolder(run.folder.path))._repr_mimebundle_() for _ in range(3)]
    names = [thread.name for thread in threading.enumerate()]
    assert names.count(f"tvmlab-monitor-{run.id}") == 1
    assert len({str(each["application/vnd.jupyter.widget-view+json"]) for each in shown}) == 1


def test_closing_ends_the_watching_and_not_the_run(start):
    run = start(Experiment(model="alexnet"), total=10_000, pause_s=0.01)
    view = Monitor(run)
    until(lambda: view.status_line.value.count("trials"))
    view.close()
    name = f"tvmlab-monitor-{run.id}"
    until(lambda: name not in [thread.name for thread in threading.enumerate()])
    assert run.status == "running"


def test_a_run_that_cannot_be_read_is_said(start):
    run = start(Experiment(model="alexnet"), total=10_000, pause_s=0.01)
    view = Monitor(run)
    until(lambda: view.status_line.value.count("trials"))
    run.stop()
    (run.folder.path / "trials.jsonl").write_text("{damaged\n")
    (run.folder.path / "state.json").write_text("{damaged\n")
    until(lambda: "damaged" in view.message.value)


def test_it_redraws_only_what_changed_and_not_too_often(start, monkeypatch):
    drawn = []
    real = monitor_module.plots.latency_png

    def counting(*args, **kwargs):
        drawn.append(time.monotonic())
        return real(*args, **kwargs)

    monkeypatch.setattr(monitor_module.plots, "latency_png", counting)
    run = start(Experiment(model="alexnet"), total=40, pause_s=0.05)
    view = Monitor(run)
    until(lambda: view.status == "done")
    pauses = [after - before for before, after in itertools.pairwise(drawn)]
    assert len(drawn) >= 3 and min(pauses) >= 0.25
    count = len(drawn)
    time.sleep(1.0)
    assert len(drawn) == count


def test_a_new_kernel_shows_an_attached_run_live(start):
    """After a kernel restart nothing has imported the widgets yet."""
    run = start(Experiment(model="alexnet"))
    run.wait()
    code = (
        "import ipykernel, tvmlab, json, sys\n"
        f"shown = tvmlab.attach({str(run.folder.path)!r})._repr_mimebundle_()\n"
        "json.dump({kind: str(value) for kind, value in shown.items()}, sys.stdout)"
    )
    shown = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert "application/vnd.jupyter.widget-view+json" in shown
    assert run.id in shown["text/html"] and run.id in shown["text/plain"]
