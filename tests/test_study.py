"""Studies carried out: their runs are made once, in order, however often the study is interrupted."""

from __future__ import annotations

import builtins
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from test_study_design import ARMS, LONG, SHORT, design

import tvmlab
from tvmlab import Ansor, Measure, Study, StudyFolder, TransferTuning
from tvmlab.core import InputError, RecordError, RunError
from tvmlab.records import RunFolder
from tvmlab.run import Run
from tvmlab.study_design import plan

driver = sys.modules[tvmlab.study.__module__]  # the public function hides its module


class Fake:
    """Stands for begin, fork, resume and compare_runs: runs that are done at once, and what they were asked for."""

    def __init__(self, monkeypatch):
        self.made, self.timed, self.fail = [], [], set()
        for name in ("begin", "fork", "resume", "compare_runs"):
            monkeypatch.setattr(driver, name, getattr(self, name))
        monkeypatch.setattr(driver, "check_experiment", lambda experiment: None)

    def begin(self, experiment, runs_dir, name):
        self.made.append(name)
        for step in experiment.stages:  # what it transfers from is there
            assert all(RunFolder.open(source, runs_dir).status == "done" for source in getattr(step, "source", ()))
        folder = RunFolder.create(experiment, runs_dir)
        path = runs_dir / name
        folder.path.rename(path)
        return self._finish(RunFolder(path), 10.0, 100.0)

    def fork(self, run, steps, *, time_limit_s, name):
        self.made.append(name)
        origin = RunFolder.open(run)
        asked = origin.experiment
        folder = RunFolder.create(asked.model_copy(update={"steps": (*asked.steps, *steps)}), origin.path.parent)
        folder.path.rename(origin.path.parent / name)
        state = origin.state
        return self._finish(RunFolder(origin.path.parent / name), state.elapsed_s + 5, state.estimate_s * 800)

    def resume(self, folder):
        self.made.append(folder.id)
        return self._finish(folder, 11.0, 90.0)

    def _finish(self, folder, elapsed_s, estimate_ms):
        failed = folder.id in self.fail
        state = folder.read_json("state.json")
        folder.write_json("state.json", {
            **state, "status": "failed" if failed else "done", "elapsed_s": elapsed_s, "wall_s": 2 * elapsed_s,
            "trials": 4, "estimate_s": estimate_ms / 1e3, "untuned_s": 1.0, "message": "on purpose" if failed else "",
            "heartbeat_s": state["started_s"] + 2 * elapsed_s,
        })  # fmt: skip
        folder.write_json("environment.json", {"target": {"label": "test"}})
        return Run(folder)

    def compare_runs(self, runs, baselines, *, repeats):
        self.timed.append(sorted(runs))
        if "timing" in self.fail:
            raise RunError("the runtime died", remedy="start it again")
        latencies = {name: [run.state.estimate_s * 1e3 + n for n in range(repeats)] for name, run in runs.items()}
        latencies |= {"untuned": [1000.0] * repeats, "onnxruntime": [50.0] * repeats}
        return {
            "subjects": {name: {"samples_ms": values} for name, values in latencies.items()},
            "numerics": dict.fromkeys(latencies, 1e-6), "threads": 2, "repeats": repeats,
        }  # fmt: skip


@pytest.fixture
def fake(monkeypatch):
    return Fake(monkeypatch)


def test_each_run_is_made_once_and_timed_with_the_others_of_its_model_and_seed(fake, tmp_path, capsys):
    asked = design(seeds=[0, 1])
    done = tvmlab.study(tmp_path / "s", asked)
    assert fake.made == [cell.name for cell in plan(asked)]
    assert [len(names) for names in fake.timed] == [4, 4, 4, 4]
    assert done.is_done and done.problems == []
    said = capsys.readouterr().err
    assert "0 of 16 done, about" in said.splitlines()[0] and "16 of 16 done, about 0 s left" in said.splitlines()[-1]
    before = list(fake.made)
    assert tvmlab.study(tmp_path / "s").is_done and tvmlab.study(tmp_path / "s", asked).is_done
    assert fake.made == before and len(fake.timed) == 4


def test_the_frame_says_what_each_cell_cost_and_gave(fake, tmp_path):
    done = tvmlab.study(tmp_path / "s", design(), progress=False)
    frame = done.frame().set_index(["model", "source", "arm"])
    assert len(frame) == 8
    row = frame.loc["alexnet", "squeezenet", "transfer+droplet"]
    assert (row["status"], row["seed"], row["trials"], row["repeats"]) == ("done", 0, 4, 3)
    assert (row["estimate_ms"], row["untuned_estimate_ms"]) == (80.0, 1000.0)
    assert (row["end_to_end_ms"], row["untuned_ms"], row["onnxruntime_ms"]) == (81.0, 1000.0, 50.0)
    assert (row["speedup"], row["vs_onnxruntime"]) == (pytest.approx(1000 / 81), pytest.approx(81 / 50))
    assert row["max_error"] == 1e-6
    assert (row["search_s"], row["source_search_s"]) == (30.0, 20.0)  # it branches from one that transfers
    assert frame.loc["alexnet", "squeezenet", "transfer"]["source_search_s"] == 20.0
    assert row["transferred"] == 0 and np.isnan(frame.loc["alexnet", "", "search"]["transferred"])
    rows = [{"key": "", "outcome": "not valid"}, {"key": "a", "outcome": "tried"}, {"key": "b", "outcome": "tried"}]
    done.run_of(next(cell for cell in done.plan if cell.name == row["run"])).write_json("transfer.json", {"rows": rows})
    assert done.frame().set_index("run").loc[row["run"], "transferred"] == 2
    samples = done.samples()
    assert set(samples["arm"]) == {*ARMS, "untuned", "onnxruntime"} and len(samples) == 2 * (4 + 2) * 3
    assert samples.query("arm == 'search' and model == 'alexnet'")["latency_ms"].tolist() == [100.0, 101.0, 102.0]


def test_a_study_that_failed_halfway_goes_on_without_repeating_what_is_done(fake, tmp_path, capsys):
    fake.fail = {"alexnet-s0-search"}
    halfway = tvmlab.study(tmp_path / "s", design())
    status = halfway.frame().set_index("run")["status"]
    assert status["squeezenet-s0-search"] == "done" and status["squeezenet-s0-search+droplet"] == "done"
    assert (status == "failed").sum() == 4  # all that need the one that failed, one way or the other
    assert any("it needs alexnet-s0-search" in said for said in halfway.problems)
    assert not halfway.is_done and "on purpose" in capsys.readouterr().err
    fake.fail, fake.made = {"timing"}, []
    again = tvmlab.study(tmp_path / "s")
    assert "squeezenet-s0-search" not in fake.made and fake.made[0] == "alexnet-s0-search" and len(fake.made) == 4
    assert again.problems == ["alexnet, seed 0 could not be timed: the runtime died: start it again",
                              "squeezenet, seed 0 could not be timed: the runtime died: start it again"]  # fmt: skip
    kept = {"subjects": {"onnxruntime": {"samples_ms": [50.0]}}}
    again.write_comparison("alexnet", 0, kept)  # as of the arms that were done before
    assert len(tvmlab.study(tmp_path / "s").problems) == 2
    assert again.comparison("alexnet", 0) == {**kept, "error": "the runtime died: start it again"}
    fake.fail, fake.made = set(), []
    assert tvmlab.study(tmp_path / "s").is_done and fake.made == []
    assert len(fake.timed[-1]) == 4


def test_a_study_is_not_done_while_an_arm_was_not_timed(fake, tmp_path):
    """As if it was killed when an arm that had failed was made, before all were timed again."""
    study = tvmlab.study(tmp_path / "s", design())
    found = study.comparison("alexnet", 0)
    del found["subjects"]["alexnet-s0-search+droplet"]
    study.write_comparison("alexnet", 0, found)
    assert not study.is_done and study.problems == []
    assert tvmlab.study(tmp_path / "s").is_done and len(fake.timed) == 3


def test_a_notebook_has_one_line_that_changes(fake, tmp_path, monkeypatch, capsys):
    """What tqdm overwrites is kept in a saved notebook, a line for every half second."""
    shown = []

    class Cell:
        def update(self, data, raw):
            assert raw
            shown.append(data["text/plain"])

    monkeypatch.setattr(builtins, "display", lambda data, raw, display_id: Cell(), raising=False)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    tvmlab.study(tmp_path / "terminal", design())
    assert shown == [] and "8 of 8 done" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ipykernel", object())
    tvmlab.study(tmp_path / "s", design())
    assert shown[0].startswith("0 of 8 done, about") and shown[-1].startswith("8 of 8 done, about 0 s left\n")
    assert capsys.readouterr().err == ""


def test_an_interrupt_stops_the_run_under_way(fake, tmp_path, monkeypatch):
    class Running:
        status, progress, stopped = "running", "half done", False

        def stop(self):
            self.stopped = True

    running = Running()
    monkeypatch.setattr(driver, "begin", lambda *_: running)
    monkeypatch.setattr(driver.time, "sleep", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tvmlab.study(tmp_path / "s", design())
    assert running.stopped
    with StudyFolder.open(tmp_path / "s").lock():  # it let go of the folder
        pass


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seeds": [0, 1]}, r"seeds is \(0,\) there, \(0, 1\) here: use another folder"),
        ({"arms": {**ARMS, "search": [LONG]}}, "arm 'search' is"),
        ({"arms": {"search": [SHORT]}}, r"arm 'search\+droplet' is .* there, missing here"),
    ],
)
def test_a_study_that_was_changed_halfway_is_refused(fake, tmp_path, changed, said):
    tvmlab.study(tmp_path / "s", design())
    made = list(fake.made)
    with pytest.raises(InputError, match=said):
        tvmlab.study(tmp_path / "s", design(**changed))
    assert fake.made == made


def test_a_study_of_before_keeps_its_number_of_repeats(fake, tmp_path):
    """Until 2026-11-22 there always was a number; a call that names none goes on with it."""
    made = tvmlab.study(tmp_path / "s", design())
    assert tvmlab.study(tmp_path / "s", design(repeats=None)).definition == made.definition
    with pytest.raises(InputError, match="repeats is 3 there, 9 here"):
        tvmlab.study(tmp_path / "s", design(repeats=9))


def test_what_cannot_be_a_studys_folder_is_refused(fake, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="exists and is not a study"):
        tvmlab.study(tmp_path / "full", design())
    with pytest.raises(InputError, match="is not a study: pass its definition"):
        tvmlab.study(tmp_path / "none")
    with pytest.raises(InputError, match="a definition and knobs"):
        tvmlab.study(tmp_path / "s", design(), seeds=[1])
    with pytest.raises(RecordError, match="is not a study"):
        StudyFolder.open(tmp_path / "full")
    tvmlab.study(tmp_path / "s", design())
    about = json.loads((tmp_path / "s" / "study.json").read_text())
    (tmp_path / "s" / "study.json").write_text(json.dumps({**about, "target": {"label": "another", "attrs": {}}}))
    with pytest.raises(InputError, match="was begun on another, this is"):
        tvmlab.study(tmp_path / "s")
    (tmp_path / "s" / "study.json").write_text(json.dumps({**about, "format": 99}))
    with pytest.raises(RecordError, match="written in format 99"):
        StudyFolder.open(tmp_path / "s")


def test_two_processes_do_not_carry_out_one_study(fake, tmp_path):
    study = tvmlab.study(tmp_path / "s", design())
    with study.lock(), pytest.raises(RunError, match="another process"):
        tvmlab.study(tmp_path / "s")


def test_its_code_is_the_same_study_again(fake, tmp_path, monkeypatch):
    asked = design(seeds=[2])
    study = tvmlab.study(tmp_path / "s", asked)
    again = []
    monkeypatch.setattr(tvmlab, "study", lambda folder, definition: again.append(definition), raising=False)
    exec(study.code(), {})
    assert again == [asked]


def test_a_study_can_be_read_before_it_is_finished(fake, tmp_path):
    study = StudyFolder.create(tmp_path / "s", design(), {"label": "here", "attrs": {}})
    assert study.frame()["status"].unique().tolist() == ["waiting"] and study.samples().empty and study.curves().empty
    assert study.environment == {} and not study.is_done and math.isnan(study.frame().loc[0, "speedup"])
    assert "0 of 8 runs done" in repr(study) and "waiting" in study._repr_html_()


def test_curves_have_a_line_for_each_cell(make_run, tmp_path):
    study = StudyFolder.create(tmp_path / "s", design(arms={"a": [SHORT]}), {"label": "here", "attrs": {}})
    shutil.move(make_run(model="alexnet").path, study.path / "runs" / "alexnet-s0-a")
    curves = study.curves()
    assert set(curves["model"]) == {"alexnet"} and curves["estimate_ms"].iloc[-1] == pytest.approx(0.7)
    assert curves["elapsed_s"].is_monotonic_increasing


# Carried out for real, on tiny models


@pytest.fixture
def tiny_design(tiny_onnx, tmp_path):
    """Two models of one kernel class each pair, the smallest searches there are."""
    shutil.copy(tiny_onnx, tmp_path / "other.onnx")
    step = {"population": 16, "generations": 1}
    return Study(
        models=[tiny_onnx, str(tmp_path / "other.onnx")],
        arms={
            "search": [Ansor(max_trials=4, **step)],
            "longer": [Ansor(max_trials=4, **step), Ansor(max_trials=2, **step)],
            "transfer": [TransferTuning("$source:search")],
        },
        target="cpu",
        measure=Measure(repeats=2, min_repeat_ms=0.1, build_workers=1),
        repeats=3,
    )


CALLER = """
import sys, tvmlab
tvmlab.study(sys.argv[1], tvmlab.Study.from_json(open(sys.argv[2]).read()))
"""


@pytest.mark.slow
def test_a_real_study_that_is_killed_goes_on(tiny_design, tmp_path):
    definition = tmp_path / "definition.json"
    definition.write_text(tiny_design.model_dump_json())
    command = [sys.executable, "-c", CALLER, str(tmp_path / "s"), str(definition)]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    runs = tmp_path / "s" / "runs"
    deadline = time.monotonic() + 100
    while not (runs / "tiny-s0-longer").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {path: (path / "trials.jsonl").read_bytes() for path in runs.iterdir() if RunFolder(path).status == "done"}
    assert len(before) == 2
    done = tvmlab.study(tmp_path / "s", tiny_design)
    assert done.is_done, done.problems
    assert all((path / "trials.jsonl").read_bytes() == trials for path, trials in before.items())
    frame = done.frame().set_index(["model", "arm"])
    assert len(frame) == 6 and (frame["end_to_end_ms"] > 0).all() and (frame["max_error"] < 1e-4).all()
    longer, search = (RunFolder.open(runs / f"tiny-s0-{arm}") for arm in ("longer", "search"))
    assert list(longer.trials())[: len(list(search.trials()))] == list(search.trials())
    assert {trial.step for trial in longer.trials()} == {-1, 0, 1}
    assert frame.loc[("tiny", "longer"), "search_s"] > frame.loc[("tiny", "search"), "search_s"]
    assert longer.comparison["subjects"].keys() == {"tvmlab", "untuned", "onnxruntime"}
