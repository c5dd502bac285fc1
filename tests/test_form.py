"""The form's presets, steps and estimate: each control does one call of the API, and shows what it gave."""

import html
import sys
import threading
from dataclasses import replace

import pandas as pd
import pytest

import tvmlab
from tvmlab import run as running
from tvmlab.core import InputError, TrialStatus
from tvmlab.experiment import (
    Ansor,
    AutoTVM,
    Droplet,
    Experiment,
    LayoutTuning,
    Measure,
    Repeat,
    Selective,
    TransferTuning,
)
from tvmlab.presets import PRESETS, TimeEstimate
from tvmlab.widgets import forecast
from tvmlab.widgets.forecast import forecast_html
from tvmlab.widgets.form import AS_BELOW, Form
from tvmlab.widgets.groups import every_step_class, step_classes
from tvmlab.widgets.monitor import Monitor


@pytest.fixture
def form(asked):
    """No preset that is chosen is estimated for real."""
    return Form(Experiment(model="alexnet", target="cpu"))


def knobs(form, place=0):
    return form.steps[place].group.knobs


def shows_stale(form):
    return "estimated for other settings" in form.forecast.text.value


# Presets


def test_the_presets_are_offered_with_what_they_are(form):
    assert [value for _, value in form.preset.options] == [AS_BELOW, *PRESETS]
    assert list(form.preset.tooltips)[1:] == list(PRESETS.values())
    assert form.preset.value == AS_BELOW


@pytest.mark.parametrize("name", PRESETS)
def test_choosing_a_preset_fills_in_what_the_call_gives(form, name):
    form.own.knobs["seed"].control.value = "3"
    form.preset.value = name
    assert form.experiment == tvmlab.preset(name, "alexnet", "cpu", seed=3)
    assert [editor.choice.label for editor in form.steps.editors] == [
        type(step).__name__ for step in form.experiment.steps
    ]
    assert html.escape(PRESETS[name]) in form._about.value and not form.start_button.disabled


def test_code_of_a_preset_is_its_call_and_tunes_the_same(form, monkeypatch):
    form.own.knobs["seed"].control.value = "3"
    form.own.knobs["time_limit_s"].control.value = "9.5"
    form.fill("max")
    assert "tvmlab.preset('max', model='alexnet', target='cpu', seed=3, time_limit_s=9.5)" in form.code()
    calls = []
    monkeypatch.setattr(tvmlab, "tune", lambda *given: calls.append(given), raising=False)
    exec(form.code(), {})
    assert calls == [(form.experiment,)]
    knobs(form, 1)["kernel_trials"].control.value = "64"
    exec(form.code(), {})
    assert calls[1] == (form.experiment,) and "AutoTVM(kernel_trials=64" in form.code()


@pytest.mark.parametrize(
    "change",
    [
        lambda form: setattr(knobs(form, 1)["kernel_trials"].control, "value", "47"),
        lambda form: setattr(form.measure.knobs["repeats"].control, "value", "3"),
        lambda form: setattr(form.steps[1].choice, "value", Ansor),
        lambda form: form.steps.add(Droplet()),
        lambda form: form.steps.remove(0),
        lambda form: setattr(knobs(form, 1)["kernel_trials"].control, "value", "many"),
    ],
)
def test_what_differs_from_a_preset_is_none(form, change):
    form.preset.value = "fast"
    change(form)
    assert form.preset.value == AS_BELOW
    assert "fast" not in form.code() if not form.start_button.disabled else form.problem.value


def test_what_a_preset_does_not_decide_leaves_it(form):
    form.preset.value = "fast"
    form.own.knobs["seed"].control.value = "5"
    form.own.knobs["time_limit_s"].control.value = "60"
    assert form.preset.value == "fast"


def test_another_model_gets_the_preset_for_that_model(form, monkeypatch):
    form.preset.value = "fast"
    small = form.experiment.measure

    def best(model, target):
        return Experiment(model=model, steps=[Ansor(trials_per_kernel=9)], measure=Measure(repeats=2))

    monkeypatch.setattr(sys.modules["tvmlab.presets"], "best", best)
    form.own.knobs["model"].control.value = "squeezenet"
    assert form.preset.value == "fast" and form.experiment.steps == (Ansor(trials_per_kernel=9),)
    assert form.experiment.measure == Measure(repeats=2) != small


def test_no_preset_for_a_model_that_is_not_there(form):
    form.preset.value = "fast"
    steps = form.experiment.steps
    form.own.knobs["model"].control.value = "alexnit"
    assert form.preset.value == AS_BELOW and "unknown model" in form._about.value
    assert form.steps.options() == steps
    with pytest.raises(InputError, match="unknown model 'alexnit'"):
        form.fill("fast")
    with pytest.raises(InputError, match="no preset 'slow'"):
        form.fill("slow")


def test_a_preset_waits_for_a_model_that_is_being_typed(form):
    form.preset.value = "fast"
    for typed in ("", "n", "no.onnx"):
        form.own.knobs["model"].control.value = typed
        assert form.preset.value == AS_BELOW and "<b>" not in form._about.value and form._about.value
    form.own.knobs["model"].control.value = "squeezenet"
    assert form.preset.value == "fast" and form.experiment == tvmlab.preset("fast", "squeezenet", "cpu")


def test_a_preset_does_not_wait_for_who_changed_a_step(form):
    form.preset.value = "fast"
    form.own.knobs["model"].control.value = "alexnit"
    knobs(form, 1)["kernel_trials"].control.value = "7"
    steps = form.steps.options()
    form.own.knobs["model"].control.value = "squeezenet"
    assert form.preset.value == AS_BELOW and form.steps.options() == steps


def test_as_below_keeps_what_was_filled(form):
    form.preset.value = "default"
    filled = form.experiment
    form.preset.value = AS_BELOW
    assert form.experiment == filled and "Experiment(" in form.code()


# Steps


def titles(form):
    return list(form.steps.tabs.titles)


def test_steps_are_added_moved_and_removed_by_buttons(form):
    steps = form.steps
    assert titles(form) == ["1 Ansor"] and steps.remove_button.disabled
    assert steps.earlier_button.disabled and steps.later_button.disabled
    steps.add_button.click()
    steps[1].choice.value = Droplet
    assert titles(form) == ["1 Ansor", "2 Droplet"] and steps.tabs.selected_index == 1
    assert form.experiment.steps == (Ansor(), Droplet())
    steps.earlier_button.click()
    assert form.experiment.steps == (Droplet(), Ansor()) and steps.tabs.selected_index == 0
    assert steps.earlier_button.disabled and not steps.later_button.disabled
    steps.later_button.click()
    assert form.experiment.steps == (Ansor(), Droplet())
    steps.tabs.selected_index = 0
    steps.remove_button.click()
    assert form.experiment.steps == (Droplet(),) and titles(form) == ["1 Droplet"]
    steps.remove(0)  # there is always one
    assert len(steps) == 1


def test_a_step_that_was_moved_keeps_its_knobs_and_is_still_heard(form):
    form.steps.add(TransferTuning("googlenet"))
    form.steps.move(1, -1)
    knobs(form, 0)["trials_per_kernel"].control.value = "5"
    assert form.experiment.steps == (TransferTuning("googlenet", trials_per_kernel=5), Ansor())
    knobs(form, 0)["trials_per_kernel"].control.value = "0"
    assert form.start_button.disabled and "trials_per_kernel" in form.problem.value
    form.steps.remove(0)
    assert not form.start_button.disabled and form.problem.value == ""


def test_steps_that_cannot_be_in_this_order_are_said_where_start_is(form):
    form.steps.add(LayoutTuning())
    assert form.start_button.disabled and form.forecast.button.disabled
    assert "LayoutTuning is not the first step" in form.problem.value
    form.steps.move(1, -1)
    assert not form.start_button.disabled and form.experiment.steps == (LayoutTuning(), Ansor())


def test_another_engine_gets_the_budget_that_corresponds(form):
    knobs(form)["trials_per_kernel"].control.value = "300"
    knobs(form)["early_stopping_threshold"].control.value = "40 %"
    form.steps[0].choice.value = AutoTVM
    assert form.experiment.steps == (AutoTVM(kernel_trials=600, early_stopping_threshold="40 %"),)
    form.steps[0].choice.value = Ansor
    assert form.experiment.steps == (Ansor(trials_per_kernel=300, early_stopping_threshold="40 %"),)
    knobs(form)["trials_per_kernel"].control.value = "many"
    form.steps[0].choice.value = AutoTVM
    assert form.experiment.steps == (AutoTVM(),)


def errors(form):
    """What is said in red, by knob."""
    found = {name: knob.row.children[1] for name, knob in knobs(form).items()}
    assert {name for name, message in found.items() if message.layout.display == ""} == {
        name for name, knob in knobs(form).items() if knob.error
    }
    return {name: message.value for name, message in found.items() if message.layout.display == ""}


def test_a_knob_is_judged_beside_what_the_others_say_now(form):
    form.steps[0].choice.value = AutoTVM
    knobs(form)["exploration_trials"].control.value = "100"
    knobs(form)["random_trials"].control.value = "50"
    assert errors(form) == {} and knobs(form)["random_trials"].error == "" and not form.start_button.disabled
    knobs(form)["exploration_trials"].control.value = "20"
    assert list(errors(form)) == ["random_trials"] and "exploration_trials=20" in errors(form)["random_trials"]
    knobs(form)["batch_size"].control.value = "many"  # one knob's fault is not said of another, nor hides it
    assert set(errors(form)) == {"random_trials", "batch_size"} and form.start_button.disabled
    knobs(form)["random_trials"].control.value = "20"
    assert list(errors(form)) == ["batch_size"]
    form.steps[0].choice.value = Selective
    knobs(form)["engine"].control.value = "ansor"
    knobs(form)["population"].control.value = "64"
    assert errors(form) == {} and not form.start_button.disabled
    knobs(form)["engine"].control.value = "autotvm"
    assert list(errors(form)) == ["population"] and form.start_button.disabled


def test_a_repetition_is_kept_and_can_be_changed_in_number():
    asked = Experiment(model="alexnet", steps=[Repeat(3, [Ansor(max_trials=8), Droplet()]), Droplet()])
    form = Form(asked)
    assert form.experiment == asked and titles(form) == ["1 Repeat", "2 Droplet"]
    knobs(form)["times"].control.value = "5"
    assert form.experiment.steps[0] == Repeat(5, [Ansor(max_trials=8), Droplet()])
    assert "from tvmlab import" in form.code() and "Repeat" in form.code().split("\n")[1]
    assert Repeat not in step_classes() and Repeat in every_step_class()


def test_every_step_can_be_chosen_and_is_made_as_its_defaults_say(form):
    for cls in step_classes():
        form.steps[0].choice.value = cls
        assert form.experiment.steps == (cls(),)
        assert list(knobs(form)) == [name for name in cls.model_fields if name != "kind"]


# The estimate, and what is reused

FOUND = TimeEstimate(
    1500.0, 1234, 56, "ansor 2 trials/s (1 past run here)", "run-7",
    pd.DataFrame([{"task": "<conv>", "task_key": "a" * 16, "ansor": 56, "autotvm": 0, "runs": "run-7",
                   "best_run": "run-7", "best_trial": 3, "then_us": 12.25}]),
)  # fmt: skip


@pytest.fixture
def asked(monkeypatch):
    """What estimate_time was called with; it answers FOUND when `go` is set, which it is."""
    calls, go = [], threading.Event()
    go.set()

    def estimate(experiment, runs_dir=None):
        calls.append((experiment, runs_dir))
        assert go.wait(30)
        return FOUND

    monkeypatch.setattr(forecast, "estimate_time", estimate)
    yield calls, go
    go.set()


def test_the_estimate_is_the_call_and_is_shown(asked, tmp_path):
    form = Form(Experiment(model="alexnet"), runs_dir=tmp_path)
    assert "25 min" not in form.forecast.text.value
    assert form.estimate() is FOUND
    assert asked[0] == [(form.experiment, tmp_path)]
    said = form.forecast.text.value
    assert "<b>25 min</b>" in said and "1,234 trials" in said and "ansor 2 trials/s (1 past run here)" in said
    assert "The layouts of run-7 are taken. 56 trials of earlier runs count, of 1 task;" in said
    assert "&lt;conv&gt;" in said and "12.2" in said


def test_the_button_estimates_without_blocking(asked, form):
    calls, go = asked
    go.clear()
    form.forecast.button.click()  # returns at once
    assert "Estimating" in form.forecast.text.value and "25 min" not in form.forecast.text.value
    form.forecast.button.click()  # nothing more while one is under way
    go.set()
    form.forecast.wait()
    assert "25 min" in form.forecast.text.value and len(calls) == 1
    form.forecast.button.click()
    form.forecast.wait()
    assert len(calls) == 2


def test_an_estimate_of_other_settings_is_grey(asked, form):
    form.estimate()
    assert not shows_stale(form)
    knobs(form)["max_trials"].control.value = "64"
    assert shows_stale(form)
    knobs(form)["max_trials"].control.value = ""
    assert not shows_stale(form)
    knobs(form)["max_trials"].control.value = "0"
    assert shows_stale(form) and form.forecast.button.disabled


def test_a_preset_that_is_chosen_is_estimated_without_a_click(asked, form):
    calls, go = asked
    go.clear()
    form.preset.value = "fast"
    fast = form.experiment
    form.preset.value = "default"  # while the first is estimated
    form.preset.value = "max"
    assert "Estimating" in form.forecast.text.value  # and the form did not wait
    go.set()
    form.forecast.wait()
    assert [experiment for experiment, _ in calls] == [fast, form.experiment]  # the last that was chosen
    assert "25 min" in form.forecast.text.value and not shows_stale(form)
    form.fill("fast")  # a call says when it wants to know
    form.monitor.status = "running"
    form.preset.value = "default"
    assert len(calls) == 2


def test_a_start_waits_for_the_estimate_under_way_and_drops_the_next(asked, form, monkeypatch):
    calls, go = asked
    go.clear()
    order = []
    monkeypatch.setattr(running, "tune", lambda *_, **__: order.append(len(calls)))
    monkeypatch.setattr(form.monitor, "follow", lambda run: None)
    form.preset.value = "fast"
    form.preset.value = "max"  # waits for the first
    threading.Timer(0.2, go.set).start()
    form.start()
    assert order == [1] and len(calls) == 1 and "25 min" in form.forecast.text.value


def test_settings_that_changed_meanwhile_make_the_estimate_one_of_others(asked, form):
    _, go = asked
    go.clear()
    form.forecast.button.click()
    knobs(form)["max_trials"].control.value = "64"
    go.set()
    form.forecast.wait()
    assert "25 min" in form.forecast.text.value and shows_stale(form)


@pytest.mark.parametrize(
    "error", [InputError("unknown model <x>", remedy="see models()"), ZeroDivisionError("oh <no>")]
)
def test_an_estimate_that_fails_says_why(monkeypatch, form, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(forecast, "estimate_time", fail)
    form.forecast.button.click()
    form.forecast.wait()
    assert "unknown model &lt;x&gt;" in form.forecast.text.value or "oh &lt;no&gt;" in form.forecast.text.value
    with pytest.raises(type(error)):
        form.estimate()


def test_nothing_is_estimated_beside_a_search(form):
    form.monitor.status = "running"  # it would take a core from what is measured
    assert form.forecast.button.disabled and form.start_button.disabled
    form.monitor.status = "done"
    assert not form.forecast.button.disabled and not form.start_button.disabled


def test_an_estimate_without_past_records_says_so():
    text = forecast_html(replace(FOUND, reused=0, layouts="", past=FOUND.past.iloc[:0]))
    assert "No trials of earlier runs count." in text and "<details" not in text and "layouts" not in text


def test_an_estimate_with_records_of_the_other_engine_alone_says_what_they_are_for():
    text = forecast_html(replace(FOUND, reused=0, layouts="", past=FOUND.past.assign(ansor=0)))
    said = "No trials of earlier runs count; the best schedule of 1 task is measured again first."
    assert said in text and "Past records of 1 task<" in text


def test_the_estimate_of_a_real_model_with_past_records(tiny_onnx, tiny_tasks, make_run, cpu):
    infos = [replace(task.info, name=name) for name, task in tiny_tasks.items()]
    trials = [(name, 9.0 + number) for number in range(4) for name in ("conv2d+relu", "matmul+add")]
    run = make_run(trials, tasks=infos, defaults={}, model=tiny_onnx, environment={"target": cpu.as_record()})
    form = Form(
        Experiment(model=tiny_onnx, target="cpu", steps=[Ansor(trials_per_kernel=40)]), runs_dir=run.path.parent
    )
    found = form.estimate()
    assert found == tvmlab.estimate_time(form.experiment, run.path.parent) and found.reused == 8
    assert found.past["ansor"].tolist() == [4, 4] and found.past["then_us"].tolist() == [9.0, 9.0]
    assert set(found.past["best_run"]) == {run.id} and not found.layouts
    assert "8 trials of earlier runs count, of 2 tasks" in form.forecast.text.value
    knobs(form)["reuse"].control.value = False
    assert form.estimate().past.empty
    assert "No trials of earlier runs count." in form.forecast.text.value and "<details" not in form.forecast.text.value


# Failed trials, in the monitor


def test_the_monitor_says_what_to_do_about_failed_trials(make_run):
    run = make_run(
        [("conv2d_relu", 500.0), *[("conv2d_relu", TrialStatus.BUILD_TIMEOUT)] * 2, ("dense", TrialStatus.WRONG_RESULT)]
    )
    view = Monitor()
    view._show(sys.modules["tvmlab.run"].attach(run.path), "done", threading.Event(), redraw=True)
    assert view.failed.titles == ("3 failed trials (2 build_timeout, 1 wrong_result): what to do",)
    assert view.failed.layout.display == ""
    for status in (TrialStatus.BUILD_TIMEOUT, TrialStatus.WRONG_RESULT):
        assert status in view.failures.value and status.remedy.partition("(")[0] in view.failures.value


def test_no_failures_no_pane(make_run):
    view = Monitor()
    view._show(sys.modules["tvmlab.run"].attach(make_run().path), "done", threading.Event(), redraw=True)
    assert view.failed.layout.display == "none"
