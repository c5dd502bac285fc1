"""An earlier run that is damaged is left out, and said: it keeps no new one from starting, nor others from the list.

What the search takes from whole earlier runs: test_reuse. What a single damaged file says of itself: test_records.
"""

import threading

import pytest
from fake_measurer import FakeMeasurer

import tvmlab
from tvmlab.core import RecordError
from tvmlab.experiment import Ansor, LayoutTuning, TransferTuning
from tvmlab.reuse import Reuse
from tvmlab.search_process import search
from tvmlab.sources import resolve


def searched(folder):
    search(folder, threading.Event(), lambda tasks, target, where: FakeMeasurer())
    return folder


def add_to(name, more):
    """What adds a field to a JSON object."""
    return lambda folder: folder.write_json(name, {**folder.read_json(name), **more})


def write_to(name, text):
    return lambda folder: (folder.path / name).write_text(text)


def damaged_line(folder):
    lines = (folder.path / "trials.jsonl").read_text().splitlines(keepends=True)
    (folder.path / "trials.jsonl").write_text("".join([*lines[:-1], "{damaged\n", lines[-1]]))


OF_THE_RUN = {
    "an empty environment": (write_to("environment.json", ""), "environment.json is damaged"),
    "an environment that is a list": (write_to("environment.json", "[1]"), "environment.json does not hold"),
    "a state of another version": (add_to("state.json", {"lease_s": 1.0}), "state.json does not hold"),
    "tasks of another version": (write_to("tasks.json", '[{"hue": "red"}]'), "tasks.json does not hold"),
    "an experiment that is a list": (write_to("experiment.json", '{"format": 1, "experiment": []}'), "experiment.json"),
}
OF_ITS_RECORDS = {
    "a damaged trial": (damaged_line, "trials.jsonl is damaged"),
    "a line that is no trial": (write_to("trials.jsonl", '{"trial": 1}\n'), "has a line that is no trial"),
    "a damaged database": (write_to("database_tuning_record.json", "{damaged\n"), "the database of earlier run"),
}


@pytest.mark.parametrize("what", [*OF_THE_RUN, *OF_ITS_RECORDS])
def test_a_new_run_starts_beside_a_damaged_one_and_names_it(make_folder, capsys, what):
    damage, said = {**OF_THE_RUN, **OF_ITS_RECORDS}[what]
    earlier = searched(make_folder(max_trials=4))
    damage(earlier)
    new = searched(make_folder(max_trials=4))
    assert new.status == "done"
    log = capsys.readouterr().out
    assert earlier.id in log and said in log
    assert said.startswith("the database") or new.state.trials == 4  # nothing was taken from it


def test_what_is_damaged_takes_nothing_from_what_is_whole(make_folder):
    """Not its share either: what a fork has of its origin counts as the fork's, where the origin is left out."""
    whole, broken = searched(make_folder(max_trials=4)), searched(make_folder(max_trials=4, reuse=False, seed=1))
    keys = [info.key for info in whole.tasks]
    asked = make_folder(max_trials=8).experiment

    def noted():
        known = Reuse(asked, whole.path.parent, {"runs": {broken.id: 99, whole.id: 99}, "tasks": {}})
        known.take(keys)
        return known.noted["tasks"]

    damaged_line(broken)
    left = noted()
    (broken.path / "trials.jsonl").unlink()
    assert left == noted() and {run for task in left.values() for run in task["runs"]} == {whole.id}


def test_layouts_of_a_damaged_assignment_are_not_taken(make_folder, capsys):
    earlier, step = make_folder(steps=[LayoutTuning()]), LayoutTuning()
    (earlier.path / "assignment.json").write_text("{damaged")
    known = Reuse(earlier.experiment, earlier.path.parent, {"runs": {earlier.id: 1}, "tasks": {}})
    assert known.layouts(step, []) is None
    assert earlier.id in capsys.readouterr().out


@pytest.mark.parametrize("what", OF_THE_RUN)
def test_a_damaged_run_is_listed_as_unreadable(make_run, what):
    damage, said = OF_THE_RUN[what]
    whole, broken = make_run(), make_run()
    damage(broken)
    listed = tvmlab.runs(whole.path.parent)
    assert listed.loc[whole.id, "status"] == "done"
    if what.startswith(("a state", "an experiment")):  # what is listed is of these
        assert listed.loc[broken.id, "status"] == "unreadable" and said in listed.loc[broken.id, "message"]
    with pytest.raises(RecordError, match="restore it from a copy"):
        _ = broken.state, broken.environment, broken.tasks, broken.experiment


def test_a_roofline_of_another_version_says_so(make_run):
    run = make_run(environment={"target": {"roofline": {"peak_tops": 1.0}}})
    with pytest.raises(RecordError, match=r"environment\.json does not hold what it should .*peak_tops"):
        _ = run.roofline


def test_a_damaged_run_is_no_source_of_schedules_nor_of_rates(make_run, cpu, tiny_onnx):
    here = {"environment": {"target": cpu.as_record()}}
    whole, broken = make_run(model="alexnet", **here), make_run(model="googlenet", **here)
    damaged_line(broken)
    parent = whole.path.parent
    assert [run.id for run in resolve(TransferTuning().source, "squeezenet", cpu, parent)] == [whole.id]
    asked = tvmlab.Experiment(model=tiny_onnx, target="cpu", steps=[Ansor(max_trials=8)])
    assert tvmlab.estimate_time(asked, parent).trials == 8
