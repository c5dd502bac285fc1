"""The store of past runs: records by task and target, imported databases, runs deleted."""

import itertools
import json
import os
import shutil
from dataclasses import replace

import pytest

import tvmlab
from tvmlab import reuse
from tvmlab.compat import DATABASE_FILES, load_meta_schedule
from tvmlab.core import InputError, RecordError, RunError, TrialStatus
from tvmlab.earlier import PAST_COLUMNS
from tvmlab.past_records import IMPORTED
from tvmlab.records import RunFolder
from tvmlab.reuse import PAST
from tvmlab.targets import Target

CPU = Target("test", "test-cpu", "llvm", {"kind": "llvm", "mcpu": "znver4", "num-cores": 2}, "cpu")
ENVIRONMENT = {"target": {"label": CPU.label, "attrs": CPU.attrs}}
OTHER = {"target": {"label": "other-cpu", "attrs": {**CPU.attrs, "mcpu": "znver5"}}}


@pytest.fixture
def store(make_run):
    """Two runs for one target, one for another; the folder they are in."""
    make_run([("conv2d_relu", 500.0), ("dense", TrialStatus.CRASHED)], environment=ENVIRONMENT)
    make_run([("conv2d_relu", 300.0)], environment=ENVIRONMENT, model="alexnet")
    return make_run([("conv2d_relu", 100.0)], environment=OTHER).path.parent


def test_past_has_every_trial_by_task_and_target_the_fastest_first(store):
    found = tvmlab.past(runs_dir=store)
    assert tuple(found.columns) == PAST_COLUMNS
    found["latency_us"] = found["latency_us"].round(6)
    rows = found[["target", "task", "latency_us", "model"]].values.tolist()
    assert rows[:3] == [
        ["other-cpu", "conv2d_relu", 100.0, "squeezenet"],
        ["test-cpu", "conv2d_relu", 300.0, "alexnet"],
        ["test-cpu", "conv2d_relu", 500.0, "squeezenet"],
    ]
    assert found["status"].tolist()[3] == "crashed" and len(found) == 4
    assert found["when"].dt.year.unique().tolist() == [2023]


def test_past_of_a_target_leaves_other_devices_out(store):
    found = tvmlab.past("conv2d_relu", CPU, store)
    assert found["latency_us"].tolist() == pytest.approx([300.0, 500.0]) and set(found["target"]) == {"test-cpu"}
    assert tvmlab.past(target=replace(CPU, attrs={**CPU.attrs, "num-cores": 4}), runs_dir=store).empty
    assert len(tvmlab.past("b" * 16, runs_dir=store)) == 1
    with pytest.raises(InputError, match="no records of task 'pool': there are of conv2d_relu, dense"):
        tvmlab.past("pool", runs_dir=store)
    with pytest.raises(InputError, match="unknown target 'riscv'"):
        tvmlab.past(target="riscv", runs_dir=store)


def test_a_name_that_several_tasks_have_is_none(make_run):
    """Models count their own kernels: what is called alike need not be alike."""
    make_run([("conv2d_relu", 500.0)], environment=ENVIRONMENT)
    theirs = make_run([("conv2d_relu", 300.0)], environment=ENVIRONMENT, model="alexnet")
    info = next(info for info in theirs.tasks if info.name == "conv2d_relu")
    text = (theirs.path / "tasks.json").read_text().replace(info.key, "f" * 16)
    (theirs.path / "tasks.json").write_text(text)
    (theirs.path / "trials.jsonl").write_text((theirs.path / "trials.jsonl").read_text().replace(info.key, "f" * 16))
    with pytest.raises(InputError, match=r"2 tasks are called 'conv2d_relu', .* pass a key: .*f{16} \(alexnet\)"):
        tvmlab.past("conv2d_relu", CPU, theirs.path.parent)
    assert tvmlab.past("f" * 16, CPU, theirs.path.parent)["latency_us"].tolist() == pytest.approx([300.0])


def test_a_device_with_the_same_attributes_is_another_one(store, make_run):
    twin = make_run([("conv2d_relu", 50.0)], environment={"target": {**ENVIRONMENT["target"], "label": "its twin"}})
    old = make_run([("conv2d_relu", 60.0)], environment={"target": {"attrs": CPU.attrs}})  # without a label
    found = tvmlab.past("conv2d_relu", CPU, store)
    assert twin.id not in set(found["run"]) and old.id in set(found["run"])
    compile_only = replace(CPU, label="znver4 (compile only)", device=None)
    assert {twin.id, old.id} < set(tvmlab.past(target=compile_only, runs_dir=store)["run"])


def test_devices_never_interleave(make_run):
    """Not those of one label either: the same CPU with another number of threads."""
    one = {"target": {**ENVIRONMENT["target"], "attrs": {**CPU.attrs, "num-cores": 1}}}
    for latency, environment in enumerate([ENVIRONMENT, one, OTHER] * 2, start=1):
        run = make_run([("conv2d_relu", float(latency)), ("dense", 10.0 - latency)], environment=environment)
    found = tvmlab.past(runs_dir=run.path.parent)
    attrs = {
        folder.name: json.loads((folder / "environment.json").read_text())["target"]
        for folder in run.path.parent.iterdir()
    }
    devices = [str(attrs[name]) for name in found["run"]]
    assert sum(one != other for one, other in itertools.pairwise(devices)) == 2 and len(devices) == 12
    for _, part in found.groupby(["target", found["run"].map(lambda name: str(attrs[name])), "task"]):
        assert part["latency_us"].is_monotonic_increasing


def test_what_a_fork_copied_is_listed_once_as_the_origins(make_run, tmp_path):
    origin = make_run([("conv2d_relu", 5.0), ("dense", TrialStatus.CRASHED)], environment=ENVIRONMENT)
    shutil.copytree(origin.path, origin.path.with_name("fork"))
    fork = RunFolder(origin.path.with_name("fork"))
    own = make_run([("conv2d_relu", 4.0)], environment=ENVIRONMENT)
    with (fork.path / "trials.jsonl").open("a") as lines:
        lines.writelines(line for line in (own.path / "trials.jsonl").open() if '"trial":1,' in line)
    fork.write_json("fork.json", {"run": origin.id, "trials": 2, "elapsed_s": 1.0})
    for started_s, run in enumerate((origin, fork)):
        run.write_state(replace(run.state, started_s=float(started_s)))
    tvmlab.delete_runs(own.path)
    found = tvmlab.past(runs_dir=origin.path.parent)
    assert sorted(found["run"]) == sorted([origin.id, origin.id, "fork"])
    assert found.loc[found["run"] == "fork", "latency_us"].tolist() == pytest.approx([4.0])
    tvmlab.delete_runs(origin.path)
    assert len(tvmlab.past(runs_dir=fork.path.parent)) == 3  # nobody else has them now


def test_a_refuted_reading_is_not_listed(make_run):
    run = make_run([("conv2d_relu", 1.0), ("conv2d_relu", 8.0), ("conv2d_relu", 9.0)], environment=ENVIRONMENT)
    rows = [json.loads(line) for line in (run.path / "trials.jsonl").read_text().splitlines()]
    rows[-1]["key"] = next(row for row in rows if row["trial"] == 1)["key"]  # measured again, and slower
    (run.path / "trials.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert tvmlab.past(runs_dir=run.path.parent)["latency_us"].tolist() == pytest.approx([8.0, 9.0])


def test_an_empty_store_has_no_past(tmp_path):
    assert tvmlab.past(runs_dir=tmp_path).empty
    with pytest.raises(InputError, match="there are of none at all"):
        tvmlab.past("conv2d", runs_dir=tmp_path)


def test_delete_removes_what_is_named_and_never_a_running_run(store):
    first, second, third = sorted(path.name for path in store.iterdir())
    running = RunFolder(store / second)
    running.write_state(replace(running.state, status="running", started_s=10**12, pid=os.getpid()))
    with pytest.raises(RunError, match=f"run {second} is running: stop it first; nothing was deleted"):
        tvmlab.delete_runs([first, second], store)
    with pytest.raises(RecordError, match="no run 'nowhere'"):
        tvmlab.delete_runs([first, "nowhere"], store)
    assert len(list(store.iterdir())) == 3
    assert tvmlab.delete_runs([first, store / third, store / first, third], store) == [first, third]
    assert [path.name for path in store.iterdir()] == [second]
    (store / "notes").mkdir()
    with pytest.raises(RecordError):
        tvmlab.delete_runs(store / "notes", store)
    assert (store / "notes").is_dir()


def test_a_run_itself_is_deleted(store):
    first, second, third = sorted(store.iterdir())
    assert tvmlab.delete_runs(RunFolder(first)) == [first.name]
    assert tvmlab.delete_runs(tvmlab.Run(RunFolder(second))) == [second.name]
    assert tvmlab.delete_runs(tvmlab.runs(store).index, store) == [third.name]  # any iterable of runs
    assert not list(store.iterdir())


# Imported databases


@pytest.fixture
def database(make_folder, run, tmp_path):
    """A folder with nothing but TVM's database of a run, with all repeats as upstream writes them."""
    folder = make_folder(max_trials=12)
    run(folder)
    path = tmp_path / "foreign"
    path.mkdir()
    for name in DATABASE_FILES:
        shutil.copy(folder.path / name, path)

    def repeated(line):
        (latency,) = line[1][1]
        line[1][1] = [latency * 1.1, latency, latency * 0.9]  # FakeMeasurer's
        return line

    rewrite(path, repeated)
    return path, [trial for trial in folder.trials() if trial.trial]


def test_an_imported_database_is_taken_from_like_a_run(database, make_folder, run, cpu, tmp_path):
    path, trials = database
    store = tmp_path / "store"
    (imported,) = tvmlab.import_records(path, runs_dir=store)
    assert imported.environment["target"]["attrs"] == cpu.attrs  # it was found out
    assert {(t.task_key, t.key): t.latencies_s for t in imported.trials()} == {
        (t.task_key, t.key): t.latencies_s for t in trials
    }
    assert "12 records of 2 tasks, imported from foreign" in imported.state.message
    listed = tvmlab.runs(store)
    assert listed.index.tolist() == [imported.id] and listed["status"].tolist() == ["done"]
    found = tvmlab.past(target=cpu, runs_dir=store)
    assert len(found) == 12 and set(found["strategy"]) == {IMPORTED}

    shutil.move(store / imported.id, tmp_path)
    later = make_folder(max_trials=16)
    reuse.begin(later, cpu)
    again = run(later)
    assert [trial.strategy for trial in again].count(PAST) == 2 and len(again) == 2 + 4
    assert not {t.key for t in again if t.strategy != PAST} & {t.key for t in trials}


def test_the_fastest_of_each_task_are_imported(database, tmp_path):
    path, trials = database
    (imported,) = tvmlab.import_records(path, most=2, runs_dir=tmp_path / "store")
    for key in {trial.task_key for trial in trials}:
        fastest = sorted(t.latency_s for t in trials if t.task_key == key)[:2]
        assert sorted(t.latency_s for t in imported.trials() if t.task_key == key) == fastest


def test_the_fastest_of_each_target_are_imported(database, tmp_path):
    """Two CPUs in one database, one of them slower throughout: its records are its fastest all the same."""
    path, trials = database
    lines = [json.loads(line) for line in (path / DATABASE_FILES[1]).read_text().splitlines()]
    slower = json.loads(json.dumps(lines))
    for line in slower:
        line[1][1] = [10 * seconds for seconds in line[1][1]]
        line[1][2] = {"kind": "llvm", "mcpu": "znver1"}
    (path / DATABASE_FILES[1]).write_text("".join(json.dumps(line) + "\n" for line in [*lines, *slower]))
    found = tvmlab.import_records(path, most=2, runs_dir=tmp_path / "store")
    tasks = {trial.task_key for trial in trials}
    assert [len(list(run.trials())) for run in found] == [2 * len(tasks)] * 2
    assert sum(run.environment["target"]["attrs"].get("mcpu") == "znver1" for run in found) == 1


@pytest.mark.parametrize("most", [0, -1, 2.5])
def test_fewer_than_one_record_of_a_task_is_refused(tmp_path, most):
    with pytest.raises(InputError, match=rf"most={most} records of a task .*: most should be a whole number from 1 on"):
        tvmlab.import_records(tmp_path, most=most, runs_dir=tmp_path / "store")
    assert not (tmp_path / "store").exists()


def rewrite(path, change):
    records = path / DATABASE_FILES[1]
    records.write_text(
        "".join(json.dumps(change(json.loads(line))) + "\n" for line in records.read_text().splitlines())
    )


def to_mcpu(mcpu, **more):
    def change(line):
        line[1][2] = {"kind": "llvm", "mcpu": mcpu, **more}
        return line

    return change


def test_records_of_another_device_stay_apart(database, cpu, tmp_path):
    path, _ = database
    rewrite(path, to_mcpu("znver1"))
    with pytest.raises(InputError, match=r"znver1.*not for cpu: leave target out"):
        tvmlab.import_records(path, cpu, runs_dir=tmp_path / "store")
    (imported,) = tvmlab.import_records(path, runs_dir=tmp_path / "store")
    assert imported.environment["target"]["attrs"]["mcpu"] == "znver1"
    assert tvmlab.past(target=cpu, runs_dir=tmp_path / "store").empty


def test_records_of_the_same_device_with_other_attributes_count_if_that_is_said(database, cpu, tmp_path):
    path, trials = database
    rewrite(path, to_mcpu(cpu.attrs["mcpu"], **{name: cpu.attrs[name] for name in ("mattr",) if name in cpu.attrs}))
    (own,) = tvmlab.import_records(path, runs_dir=tmp_path / "own")
    assert own.environment["target"]["attrs"] != cpu.attrs
    (ours,) = tvmlab.import_records(path, cpu, runs_dir=tmp_path / "ours")
    assert len(tvmlab.past(target=cpu, runs_dir=tmp_path / "ours")) == len(trials)
    assert ours.environment["target"]["attrs"] == cpu.attrs


def test_records_that_do_not_fit_their_task_are_left_out_and_counted(database, tmp_path):
    path, _ = database

    def misname(line):
        """A block that the task does not have, in the traces of the first task."""
        for instruction in line[1][0][0]:
            if instruction[0] == "GetSBlock" and line[0] == 0:
                instruction[2][0] = "nowhere"
        return line

    rewrite(path, misname)
    (imported,) = tvmlab.import_records(path, runs_dir=tmp_path / "store")
    kept = len(list(imported.trials()))
    assert 0 < kept < 12 and f"; {12 - kept} more cannot be made again here" in imported.state.message
    assert len(imported.tasks) == 1


def test_what_failed_where_it_was_made_is_left_out(database, tmp_path):
    """TVM's own search writes 10^10 seconds for it."""
    path, _ = database
    failed = iter(range(1000))

    def fail(line):
        if next(failed) % 2 == 0:
            line[1][1] = [1e10]
        return line

    rewrite(path, fail)
    (imported,) = tvmlab.import_records(path, runs_dir=tmp_path / "store")
    found = list(imported.trials())
    assert len(found) == 6 and all(trial.latency_s < 1 for trial in found)


@pytest.mark.parametrize("damage", ["missing", "empty", "torn", "no folder"])
def test_what_is_no_database_is_refused_and_leaves_nothing(database, tmp_path, damage):
    path, _ = database
    records = path / DATABASE_FILES[1]
    if damage == "missing":
        records.unlink()
    elif damage == "empty":
        records.write_text("")
    elif damage == "torn":
        records.write_text("{not json\n")
    else:
        path = tmp_path / "nowhere"
    said = {"torn": "is no TVM database", "empty": "no record in .* is of a schedule that ran"}.get(
        damage, "is missing"
    )
    with pytest.raises((InputError, RecordError), match=said):
        tvmlab.import_records(path, runs_dir=tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_the_imported_database_is_tvms_own(database, tiny_tasks, tmp_path):
    (imported,) = tvmlab.import_records(database[0], runs_dir=tmp_path / "store")
    found = load_meta_schedule().database.JSONDatabase(work_dir=str(imported.path))
    assert len(found) == 12 and found.has_workload(tiny_tasks["conv2d+relu"].module)
