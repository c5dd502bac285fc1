"""What a run takes from earlier runs: where the search begins, what is left out. How much is left: test_reuse_plan."""

import ast
import json
import os
import shutil
import threading
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from fake_measurer import FakeMeasurer, keys, stop_after

import tvmlab
from tvmlab import reuse
from tvmlab import run as running
from tvmlab.core import TrialStatus
from tvmlab.experiment import Ansor, AutoTVM, Droplet, Experiment, LayoutTuning, Selective
from tvmlab.past_records import IMPORTED
from tvmlab.records import RunFolder
from tvmlab.reuse import PAST, Reuse, said_of_reuse
from tvmlab.search_process import search

A, B = "a" * 16, "b" * 16
SMALL = {"population": 16, "generations": 1}


@pytest.fixture
def done(make_folder, cpu, run, tiny_tasks):
    """`done(max_trials=8, ...)` is a run that has ended, from which later ones may take."""

    def make(*, measurer=None, **options):
        folder = make_folder(**options)
        folder.write_json("environment.json", {"target": cpu.as_record()})
        folder.write_json("tasks.json", [asdict(task.info) for task in tiny_tasks.values()])
        run(folder, measurer)
        return folder

    return make


def begun(make_folder, cpu, **options):
    folder = make_folder(**options)
    reuse.begin(folder, cpu)
    return folder


# Runs after runs


def test_a_second_run_measures_the_best_again_and_nothing_else(done, make_folder, run, cpu):
    first = done(max_trials=16)
    before = [trial for trial in first.trials() if trial.trial]
    second = begun(make_folder, cpu, max_trials=16, seed=1)
    trials = run(second)
    assert [trial.strategy for trial in trials] == [PAST, PAST]
    for trial in trials:
        same = [other for other in before if other.task_key == trial.task_key]
        assert trial.key == min(same, key=lambda other: other.latency_s).key
        assert trial.time_s > max(other.time_s for other in before)
    assert (second.state.total_trials, second.state.trials) == (2, 2)
    assert second.state.estimate_s == pytest.approx(first.state.estimate_s)
    assert said_of_reuse(second) == "reused 16 trials of 1 earlier run; reuse=False searches afresh"
    noted = json.loads((second.path / "reuse.json").read_text())
    assert noted["runs"] == {first.id: 18}
    assert {task["best"]["run"] for task in noted["tasks"].values()} == {first.id}
    second.write_json("tasks.json", json.loads((first.path / "tasks.json").read_text()))
    frame = tvmlab.reused(second)
    assert frame["ansor"].sum() == 16 and set(frame["best_run"]) == {first.id} and len(frame) == 2
    assert frame["now_us"].tolist() == pytest.approx(frame["then_us"].tolist())
    assert tvmlab.reused(first).empty
    assert sum(task["ansor"]["trials"] for task in noted["tasks"].values()) == 16


def test_a_larger_budget_goes_on_where_the_earlier_runs_ended(done, make_folder, run, cpu):
    first = done(max_trials=12)
    second = begun(make_folder, cpu, max_trials=20)
    found = run(second)
    assert Counter(trial.strategy for trial in found) == {PAST: 2, "evolution": 8}
    known = set(keys([trial for trial in first.trials() if trial.trial]))
    assert not known & set(keys([trial for trial in found if trial.strategy != PAST]))
    third = begun(make_folder, cpu, max_trials=20)
    second.write_json("environment.json", {"target": cpu.as_record()})
    second.write_json("tasks.json", json.loads((first.path / "tasks.json").read_text()))
    reuse_json = third.path / "reuse.json"
    assert json.loads(reuse_json.read_text())["runs"].keys() == {first.id}  # the second had no target yet
    reuse_json.unlink()
    reuse.begin(third, cpu)
    assert [trial.strategy for trial in run(third)] == [PAST, PAST]
    assert said_of_reuse(third) == "reused 20 trials of 2 earlier runs; reuse=False searches afresh"


def test_the_search_goes_on_from_the_past_and_not_from_chance(done, make_folder, run, cpu, monkeypatch):
    done(max_trials=24)
    from tvmlab import strategies

    given = []
    real = strategies.Evolution
    monkeypatch.setattr(strategies, "Evolution", lambda *args, **knobs: given.append(knobs) or real(*args, **knobs))
    run(begun(make_folder, cpu, max_trials=30))
    assert given and all(len(knobs["records"]) >= 4 and len(knobs["known"]) >= 4 for knobs in given)


def test_the_search_process_finds_notes_and_says_what_it_reuses(make_folder, capsys):
    """All but the process: from the model to the last word of two runs in a folder."""
    first, second = make_folder(max_trials=8), make_folder(max_trials=12)
    for folder in (first, second):
        search(folder, threading.Event(), lambda tasks, target, where: FakeMeasurer())
        assert folder.status == "done"
    assert not (first.path / "reuse.json").exists() and first.state.message == ""
    said = "reused 8 trials of 1 earlier run; reuse=False searches afresh"
    assert second.state.message == said and said in capsys.readouterr().out
    assert (second.state.trials, second.state.total_trials) == (6, 6)
    assert [trial.strategy for trial in second.trials() if trial.trial][:2] == [PAST, PAST]


def test_layouts_are_chosen_once(make_folder, capsys):
    """The second run has no layout step left, and tunes the tasks of the same assignment."""
    steps = [LayoutTuning(trials_per_variant=2, algorithms=("direct",)), AutoTVM(kernel_trials=2)]
    first, second = make_folder(steps=steps), make_folder(steps=steps)
    for folder in (first, second):
        search(folder, threading.Event(), lambda tasks, target, where: FakeMeasurer())
    assert second.layouts == first.layouts and second.state.steps_done == 2
    assert f"reused the layouts of {first.id} and " in second.state.message
    trials = [trial for trial in second.trials() if trial.trial]
    assert {(trial.step, trial.strategy) for trial in trials} == {(1, PAST)}
    assert len(trials) == second.state.total_trials < first.state.trials


def test_a_run_that_takes_layouts_alone_takes_no_records(make_folder):
    layouts = LayoutTuning(trials_per_variant=2, algorithms=("direct",))
    first = make_folder(steps=[layouts, AutoTVM(kernel_trials=2)])
    second = make_folder(steps=[layouts, AutoTVM(kernel_trials=2, reuse=False)])
    for folder in (first, second):
        search(folder, threading.Event(), lambda tasks, target, where: FakeMeasurer())
    assert said_of_reuse(second) == f"reused the layouts of {first.id}; reuse=False searches afresh"
    assert tvmlab.reused(second).empty and PAST not in {trial.strategy for trial in second.trials()}


def test_reuse_false_searches_afresh(done, make_folder, run, cpu):
    first = done(max_trials=8)
    second = begun(make_folder, cpu, max_trials=8, reuse=False)
    assert not (second.path / "reuse.json").exists() and said_of_reuse(second) == ""
    assert keys(run(second)) == keys([trial for trial in first.trials() if trial.trial])


@pytest.mark.parametrize("other", ["target", "running", "empty", "unreadable", "no task in common"])
def test_what_is_not_taken_from(done, make_folder, run, cpu, other):
    first = done(max_trials=8)
    if other == "target":
        first.write_json("environment.json", {"target": {**cpu.as_record(), "attrs": {**cpu.attrs, "mcpu": "znver1"}}})
    elif other == "running":
        first.write_state(replace(first.state, status="running", started_s=10**12, pid=os.getpid()))
    elif other == "empty":
        (first.path / "trials.jsonl").unlink()
    elif other == "unreadable":
        first.write_json("experiment.json", {"format": 10**6, "experiment": {}})
    else:
        rows = [json.loads(line) for line in (first.path / "trials.jsonl").read_text().splitlines()]
        lines = [json.dumps({**row, "task_key": "0" * 16}) + "\n" for row in rows]
        (first.path / "trials.jsonl").write_text("".join(lines))
        first.write_json("tasks.json", [])
    second = begun(make_folder, cpu, max_trials=8)
    trials = run(second)
    assert len(trials) == 8 and {trial.strategy for trial in trials} == {"evolution"}
    assert said_of_reuse(second) == ""


def test_a_resumed_run_keeps_to_what_it_began_with(done, make_folder, run, cpu):
    first = done(max_trials=8)
    second = begun(make_folder, cpu, max_trials=20)
    stop, measurer = stop_after(5)
    before = run(second, measurer, stop=stop)
    assert 5 <= len(before) <= 6 and second.state.total_trials == 14
    done(max_trials=20, seed=3, reuse=False)  # meanwhile another run is made
    reuse.begin(second, cpu)
    after = run(second)
    assert after[: len(before)] == before and len(after) == 14 == second.state.total_trials
    assert [trial.strategy for trial in after].count(PAST) == 2
    assert json.loads((second.path / "reuse.json").read_text())["runs"].keys() == {first.id}


def test_an_earlier_run_that_was_deleted_meanwhile_still_counts(done, make_folder, run, cpu, capsys):
    first = done(max_trials=8)
    second = begun(make_folder, cpu, max_trials=12)
    stop, measurer = stop_after(3)
    run(second, measurer, stop=stop)
    shutil.rmtree(first.path)
    assert len(run(second)) == 6
    assert f"earlier run {first.id} cannot be read any more" in capsys.readouterr().out


def test_a_fork_and_its_origin_count_once(done, make_folder, run, cpu):
    first = done(max_trials=8)
    copy = RunFolder(first.path.with_name("copy"))
    shutil.copytree(first.path, copy.path)
    second = begun(make_folder, cpu, max_trials=8)
    assert len(run(second)) == 2
    noted = json.loads((second.path / "reuse.json").read_text())["tasks"].values()
    assert sum(task["ansor"]["trials"] for task in noted) == 8
    assert [task["ansor"]["share"] for task in noted] == [4.0, 4.0]


def test_the_other_engines_trials_are_not_counted_but_its_best_is_measured(done, make_folder, run, cpu):
    """Without templates for it, the tiny model's AutoTVM searches sketches; what counts is who searched."""
    first = done(max_trials=10)
    second = begun(make_folder, cpu, steps=[AutoTVM(kernel_trials=4)])
    trials = run(second)
    assert len(trials) == 2 * 4 + 2
    best = {min((t for t in first.trials() if t.task_key == key and t.trial), key=lambda t: t.latency_s).key
            for key in {trial.task_key for trial in trials}}  # fmt: skip
    assert best == {trial.key for trial in trials if trial.strategy == PAST}


def test_failures_count_and_are_not_tried_again(done, make_folder, run, cpu):
    broken = FakeMeasurer(fails=lambda candidate: TrialStatus.BUILD_ERROR)
    first = done(max_trials=10, measurer=broken)
    second = begun(make_folder, cpu, max_trials=16)
    found = run(second)
    assert [trial.strategy for trial in found] == ["evolution"] * 6  # nothing to measure again
    assert not set(keys(found)) & set(keys([trial for trial in first.trials() if trial.trial]))


def test_a_reading_that_was_refuted_later_is_not_the_best(done, make_folder, run, cpu):
    """A descent measures what looked fast again: the later reading stands, here as in warm_start."""
    first = done(max_trials=8)
    rows = [json.loads(line) for line in (first.path / "trials.jsonl").read_text().splitlines()]
    lucky = next(row for row in rows if row["trial"])
    lucky["latencies_s"] = [1e-9]
    again = {**lucky, "trial": 9, "latencies_s": [1.0]}
    (first.path / "trials.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, again]))
    known = Reuse.forecast(begun(make_folder, cpu).experiment, first.path.parent, cpu)
    known.take([lucky["task_key"]])
    assert known.best(lucky["task_key"]).trial.latency_s > 1e-9
    assert known.best(lucky["task_key"]).trial.key != lucky["key"]
    (task,) = known.noted["tasks"].values()
    assert task["ansor"]["trials"] == len(
        {row["key"] for row in rows if row["trial"] and row["task_key"] == lucky["task_key"]}
    )


def test_records_of_another_device_with_the_same_attributes_are_left_out(done, make_folder, run, cpu):
    """Two cards may have equal attributes and not the same speed; where there is no device the attributes decide."""
    first = done(max_trials=8)
    for label, device, taken in (("another card", "cuda:0", 0), (cpu.label, "cpu", 8), ("imported", None, 8)):
        first.write_json("environment.json", {"target": {**cpu.as_record(), "label": label, "device": device}})
        known = Reuse.forecast(begun(make_folder, cpu).experiment, first.path.parent, cpu)
        known.take([info.key for info in first.tasks])
        assert known.counted == taken


def test_what_selective_searched_counts_as_its_engines(done, make_folder, cpu):
    """And what was only shared counts for none: a later AutoTVM has not searched that task."""
    first = done(max_trials=8)
    found = json.loads((first.path / "experiment.json").read_text())
    found["experiment"]["steps"] = [Selective(engine="autotvm").model_dump(mode="json")]
    first.write_json("experiment.json", found)
    rows = [json.loads(line) for line in (first.path / "trials.jsonl").read_text().splitlines()]
    searched, shared = dict.fromkeys(row["task_key"] for row in rows if row["trial"])
    for row in rows:
        if row["trial"] and row["task_key"] == shared:
            row["strategy"] = "transfer"
    (first.path / "trials.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = Counter(row["task_key"] for row in rows if row["trial"])
    asked = begun(make_folder, cpu, steps=[AutoTVM(kernel_trials=20)])
    known = Reuse.forecast(asked.experiment, first.path.parent, cpu)
    known.take([searched, shared])
    noted = known.noted["tasks"]
    assert noted[searched]["autotvm"] == {
        "trials": counts[searched],
        "share": float(counts[searched]),
        "since": noted[searched]["autotvm"]["since"],
    }
    assert "autotvm" not in noted[shared] and noted[shared]["best"]
    assert known.plan(0, [searched, shared]).limits == {searched: 21 - counts[searched], shared: 21}


def test_imported_records_do_not_say_that_a_search_was_in_vain(done, make_folder, cpu):
    """The 256 fastest are there, in no order: the last 200 of them without an improvement stop nothing."""
    first = done(max_trials=8)
    rows = [json.loads(line) for line in (first.path / "trials.jsonl").read_text().splitlines()]
    slower = [{**row, "strategy": IMPORTED, "latencies_s": [1e-3 * row["trial"]]} for row in rows if row["trial"]]
    (first.path / "trials.jsonl").write_text("".join(json.dumps(row) + "\n" for row in slower))
    asked = begun(make_folder, cpu, steps=[Ansor(trials_per_kernel=50, early_stopping_threshold=2)])
    known = Reuse.forecast(asked.experiment, first.path.parent, cpu)
    known.take([info.key for info in first.tasks])
    assert {task["ansor"]["since"] for task in known.noted["tasks"].values()} == {0} and known.counted == 8
    assert known.plan(0, list(known.noted["tasks"])).total == 2 * 50 - 8 + 2


def test_an_exhausted_template_is_noted_and_not_planned_again(make_folder, cpu):
    """Of a packed dense layer's few points not all are valid, so no number of trials ever met its kernel_trials."""
    steps = [AutoTVM(kernel_trials=2000, tuner="grid", early_stopping_threshold="100 %")]
    tries = {"broken": 0}

    def fails(candidate):
        tries["broken"] += 1
        return TrialStatus.RUN_TIMEOUT if tries["broken"] % 3 == 0 else None

    first, second, third = (make_folder(steps=steps) for _ in range(3))
    search(first, threading.Event(), lambda tasks, target, where: FakeMeasurer(fails=fails))
    spaces = json.loads((first.path / "exhausted.json").read_text())
    assert spaces and first.state.trials < sum(spaces.values())
    assert {trial.ok for trial in first.trials()} == {True, False}
    search(second, threading.Event(), lambda tasks, target, where: FakeMeasurer())
    again = [trial for trial in second.trials() if trial.trial]
    exhausted = [trial for trial in again if trial.task_key in spaces]
    assert {trial.strategy for trial in exhausted} == {PAST} and len(exhausted) == len(spaces)
    assert second.state.total_trials == second.state.trials
    grown = {key: size + 1 for key, size in spaces.items()}  # as if the templates were others now
    for folder in (first, second):
        folder.write_json("exhausted.json", grown)
    reuse.begin(third, cpu)
    known = Reuse.of(third)
    known.take(spaces, spaces)
    assert known.plan(0, list(spaces)).total > len(spaces)


def test_records_measured_the_same_way_are_preferred(done, make_folder, run, cpu):
    first = done(max_trials=8)
    cold = make_folder(max_trials=8, seed=5, reuse=False)
    for name in ("environment.json", "tasks.json"):
        cold.write_json(name, json.loads((first.path / name).read_text()))
    found = json.loads((cold.path / "experiment.json").read_text())
    found["experiment"]["measure"]["cold_weights"] = True
    cold.write_json("experiment.json", found)
    run(cold, FakeMeasurer(dict.fromkeys((key for key, _ in keys(first.trials())), 1e-6)))
    second = begun(make_folder, cpu, max_trials=8)
    run(second)
    noted = json.loads((second.path / "reuse.json").read_text())["tasks"].values()
    assert {task["best"]["run"] for task in noted} == {first.id} and {len(task["runs"]) for task in noted} == {2}


def test_a_stop_while_the_best_are_measured_again(done, make_folder, run, cpu):
    done(max_trials=8)
    second = begun(make_folder, cpu, max_trials=12)
    stop, measurer = stop_after(1)
    assert {trial.strategy for trial in run(second, measurer, stop=stop)} == {PAST}
    after = run(second)
    assert Counter(trial.strategy for trial in after) == {PAST: 2, "evolution": 4}


# Layouts


def layout_run(make_folder, cpu, sites, **options):
    folder = make_folder(steps=[LayoutTuning(**options)])
    folder.write_json("environment.json", {"target": cpu.as_record()})
    rows = [{"site": name, "about": about, "packing": "NCHW16c"} for name, about in sites]
    folder.write_json("assignment.json", {"finished": True, "cut_short": False, "sites": rows})
    (folder.path / "trials.jsonl").write_text("{}\n")
    folder.write_state(replace(folder.state, status="done"))
    return folder


def test_layouts_chosen_by_the_same_knobs_are_taken(make_folder, cpu):
    sites = [("conv0", "conv2d 1x8x14x14 16x8x3x3"), ("dense0", "dense 1x3136 10x3136")]
    earlier = layout_run(make_folder, cpu, sites, trials_per_variant=16)
    step = LayoutTuning(warm_start=["another"])
    folder = begun(make_folder, cpu, steps=[step])
    for other, there in (
        (LayoutTuning(blocks=(8,)), sites),
        (LayoutTuning(trials_per_variant=32), sites),
        (LayoutTuning(reuse=False), sites),
        (step, sites[:1]),
    ):
        assert reuse.take_layouts(folder, other, there) is None
    assert not (folder.path / "assignment.json").exists() and said_of_reuse(folder) == ""
    forecast = Reuse.forecast(folder.experiment, folder.path.parent, cpu)
    assert forecast.layouts(step, sites) == (earlier.id, earlier.layouts)
    assert reuse.take_layouts(folder, step, sites) == earlier.layouts == folder.layouts
    assert said_of_reuse(folder) == f"reused the layouts of {earlier.id}; reuse=False searches afresh"


@pytest.mark.parametrize("noted", [True, False])
def test_layouts_that_the_time_limit_cut_short_are_not_taken(make_folder, cpu, noted):
    """Of before it was noted nobody knows it of a run with a limit."""
    sites = [("conv0", "conv2d 1x8x14x14 16x8x3x3")]
    earlier = layout_run(make_folder, cpu, sites)
    found = earlier.layouts
    if noted:
        earlier.write_json("assignment.json", found | {"cut_short": True})
    else:
        del found["cut_short"]
        earlier.write_json("assignment.json", found)
        asked = json.loads((earlier.path / "experiment.json").read_text())
        asked["experiment"]["time_limit_s"] = 20.0
        earlier.write_json("experiment.json", asked)
    assert reuse.take_layouts(begun(make_folder, cpu, steps=[LayoutTuning()]), LayoutTuning(), sites) is None


# Who never reuses


def test_forks_studies_and_benchmarks_begin_afresh(done, make_folder, run, cpu, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "_check", lambda experiment, runs_dir: None)
    monkeypatch.setattr(running, "_launch", lambda folder: folder)
    origin = done(max_trials=4)
    forked = running.fork(origin, [Ansor(max_trials=4), Droplet(), AutoTVM()], name="forked")
    assert [getattr(stage, "reuse", None) for stage in forked.experiment.stages] == [True, False, None, False]
    asked = Experiment(model="alexnet", steps=[LayoutTuning(), AutoTVM()])
    assert running.begin(asked, tmp_path, "cell").experiment == asked.afresh()  # a study's cell is begun by this call
    assert running.tune(asked, tmp_path).experiment == asked


def test_no_benchmark_tunes_with_what_another_run_found():
    """But for the one that measures what reuse brings. `begin` reuses nothing by itself."""
    calls = {}
    for path in (Path(tvmlab.__file__).parent.parent / "benchmarks").glob("*.py"):
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        tuned = [node.args[0] for node in nodes if getattr(node.func, "attr", "") == "tune"]
        calls |= {(path.stem, node.lineno): ast.unparse(node) for node in tuned}
    assert len(calls) >= 5
    assert {name for (name, _), asked in calls.items() if not asked.endswith(".afresh()")} == {"reuse"}


def test_said_and_read_where_there_is_nothing(make_folder):
    folder = make_folder()
    known = Reuse.of(folder)
    known.take(["x"])
    assert said_of_reuse(folder) == "" and known.runs == [] and known.best("x") is None
    assert known.trials("x") == [] and known.keys("x") == set() and known.plan(0, ["x", "y"]).total == 16
