"""`tvmlab runs` on run folders that are already written; `tvmlab tune --preset`."""

import importlib
import io
import sys
from types import SimpleNamespace

import pytest

import tvmlab
from tvmlab import cli
from tvmlab.core import TrialStatus
from tvmlab.experiment import AutoTVM, Experiment, LayoutTuning, Measure
from tvmlab.recordings import recorded
from tvmlab.targets import target


@pytest.fixture
def store(make_run):
    """Two runs in a folder; the first failed."""
    first = make_run([("conv2d_relu", TrialStatus.BUILD_TIMEOUT), ("dense", 9.0)], status="failed")
    second = make_run([("dense", 5.0)], model="alexnet")
    return SimpleNamespace(path=first.path.parent, first=first.id, second=second.id)


def call(store, *arguments):
    return cli.main(["runs", *arguments, "--runs-dir", str(store.path)])


def test_runs_are_listed_and_filtered(store, capsys):
    assert call(store) == call(store, "list") == 0
    shown = capsys.readouterr().out
    assert shown.count(store.first) == shown.count(store.second) == 2
    for flags, kept in ((["--model", "alexnet"], store.second), (["--status", "failed"], store.first)):
        assert call(store, *flags) == 0
        shown = capsys.readouterr().out
        assert kept in shown and ({store.first, store.second} - {kept}).pop() not in shown
    assert call(store, "--target", "sm_80") == 0 and "Empty" in capsys.readouterr().out
    assert call(store, "--target", "riscv") == 2 and "unknown target 'riscv'" in capsys.readouterr().err
    assert call(store, "--status", "finished") == 2
    assert "no run is ever 'finished': status is one of running, done" in capsys.readouterr().err


def test_runs_for_a_target_are_found_however_they_named_it(store, capsys, make_run, cpu):
    """`auto` was this CPU; a run that has not begun is told by the name alone."""
    auto = make_run(target="auto", environment={"target": cpu.as_record()})
    other = make_run(target="cpu", environment={"target": {**cpu.as_record(), "label": "another CPU"}})
    waiting, elsewhere = (make_run(target=name, environment=None) for name in ("cpu", "cuda"))
    found = tvmlab.runs(store.path, target="cpu").index
    assert [run.id in found for run in (auto, waiting, other, elsewhere)] == [True, True, False, False]
    (store.path / waiting.id / "experiment.json").write_text("{")
    assert waiting.id not in tvmlab.runs(store.path, target="cpu").index  # nobody can tell
    assert call(store, "--target", "cpu") == 0 and auto.id in capsys.readouterr().out


def test_failed_trials_are_shown_with_their_remedy(store, capsys):
    assert call(store, "failures", store.first) == 0
    shown = capsys.readouterr().out
    assert "build_timeout" in shown and "measure.build_timeout_s" in shown and "error code 6" in shown


def test_the_past_is_shown_by_task(store, capsys):
    assert call(store, "past", "dense") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and store.second in lines[1] and store.first in lines[2]  # the fastest first
    assert call(store, "past", "pool") == 2 and "no records of task 'pool'" in capsys.readouterr().err


def test_runs_are_exported_together(store, tmp_path, make_run):
    for name in (store.first, store.second):
        folder = tvmlab.RunFolder.open(store.path / name)
        folder.write_json("environment.json", {**folder.environment, "versions": {"apache-tvm": "0.27.0"}})
    archive = tmp_path / "both.tar.xz"
    assert call(store, "export", store.first, store.second, "-o", str(archive)) == 0
    found = recorded(archive, cache=tmp_path / "cache")
    assert [run.id for run in found] == [store.first, store.second]
    assert [row["key"] for row in found[1].rows()] == [
        row["key"] for row in tvmlab.RunFolder.open(store.path / store.second).rows()
    ]


def test_delete_asks_unless_told_not_to(store, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n"))  # a pipe is nobody
    assert call(store, "delete", store.first) == 2
    assert "there is nobody to ask: add --yes" in capsys.readouterr().err
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    asked = []
    for answer, left in (("", 2), ("n", 2), ("Y", 1)):
        monkeypatch.setattr("builtins.input", lambda question, answer=answer: asked.append(question) or answer)
        assert call(store, "delete", store.first) == 0
        assert len(list(store.path.iterdir())) == left
    assert asked == [f"delete {store.first}? [y/N] "] * 3
    assert call(store, "delete", store.second, "--yes") == 0 and not list(store.path.iterdir())
    assert capsys.readouterr().out.splitlines()[-1] == f"deleted {store.second}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["delete"], "write tvmlab runs delete RUN ... [--yes]"),
        (["list", "x"], "cannot be done with 1 names"),
        (["import"], "write tvmlab runs import FOLDER"),
        (["import", "nowhere"], "nowhere holds no TVM database"),
        (["export", "nowhere", "-o", "x.tar.xz"], "no run 'nowhere'"),
        (["delete", "nowhere", "--yes"], "no run 'nowhere'"),
    ],
)
def test_what_cannot_be_done_is_one_line(store, capsys, arguments, said):
    assert call(store, *arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert len(list(store.path.iterdir())) == 2


def test_export_needs_a_file(store, capsys):
    assert call(store, "export", store.first) == 2
    assert "nowhere to export to: name an archive" in capsys.readouterr().err


# Presets


@pytest.fixture
def tuned(monkeypatch):
    asked = []
    running = importlib.import_module("tvmlab.run")
    monkeypatch.setattr(running, "tune", lambda *given: asked.append(given) or SimpleNamespace(id="a-run"))
    module = importlib.import_module("tvmlab.presets")
    monkeypatch.setattr(module, "estimate_time", lambda experiment, runs_dir: f"{len(experiment.steps)} steps")
    return asked


def test_tune_takes_a_preset_and_says_how_long_it_takes(tuned, capsys):
    flags = "--preset default --target cpu --seed 3 --build-timeout 60 --run-timeout 5 --no-wait"
    assert cli.main(["tune", "squeezenet", *flags.split()]) == 0
    ((experiment, _),) = tuned
    cold = tvmlab.best("squeezenet", "cpu").measure.cold_weights
    assert experiment == Experiment(
        model="squeezenet", target="cpu", seed=3, steps=[LayoutTuning(), AutoTVM()],
        measure=Measure(build_timeout_s=60.0, run_timeout_s=5.0, cold_weights=cold),
    )  # fmt: skip
    shown = capsys.readouterr()
    assert shown.err == "2 steps\n" and shown.out == "a-run\n"
    assert target("cpu").kind == "llvm"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--preset max --step ansor", "preset 'max' has its own steps, and --step is given"),
        ("--preset max --kernel-trials 9", "and --kernel-trials is given: leave one of them out"),
        ("--preset slow", "there is no preset 'slow': there are fast, default, max"),
    ],
)
def test_a_preset_beside_steps_is_refused(tuned, capsys, flags, said):
    assert cli.main(["tune", "squeezenet", *flags.split()]) == 2
    assert said in capsys.readouterr().err and not tuned
