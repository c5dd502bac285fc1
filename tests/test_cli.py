"""The command line, with the search replaced by runs that are already written."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from tvmlab import cli
from tvmlab.core import InputError
from tvmlab.experiment import STEPS, Ansor, AutoTVM, Droplet, Experiment, LayoutTuning, Measure, Selective
from tvmlab.flags import flag
from tvmlab.presets import best
from tvmlab.run import Progress
from tvmlab.study_design import Study, study_of_the_report
from tvmlab.study_folder import StudyFolder

TRIALS = [("conv2d_relu", 250.0), ("dense", 100.0)]


@dataclass
class FakeRun:
    """A run that ends after some looks, as tvmlab.run.Run shows itself."""

    folder: Any
    looks: int = 2
    ends: str = "done"
    interrupt: bool = False
    stopped: bool = field(default=False)

    @property
    def id(self):
        return self.folder.id

    @property
    def status(self):
        if self.stopped:
            return "stopped"
        return "running" if self.looks > 0 else self.ends

    @property
    def progress(self):
        return Progress(
            status=self.status,
            trials=40,
            total_trials=100,
            elapsed_s=20.0,
            trials_per_s=2.0,
            estimate_ms=12.5,
            untuned_ms=250.0,
            seconds_left=90.0,
            phase="step 1: ansor",
            message="out of memory" if self.ends == "failed" else "",
        )

    def wait(self, timeout=None):
        if self.interrupt:
            raise KeyboardInterrupt
        self.looks -= 1
        return self

    def stop(self):
        self.stopped = True
        return self


@pytest.fixture
def replaced(monkeypatch):
    """`replaced(module, name, function)`: the public functions hide the modules of the same name."""

    def replace(module, name, function):
        monkeypatch.setattr(importlib.import_module(f"tvmlab.{module}"), name, function)

    return replace


@pytest.fixture
def tuned(make_run, replaced):
    """What `tvmlab tune` asked for, and the run it was given."""
    run = FakeRun(make_run(TRIALS))
    asked: dict[str, Any] = {}
    replaced("run", "tune", lambda experiment, runs_dir=None: asked.update(e=experiment, dir=runs_dir) or run)
    asked["run"] = run
    return asked


def test_every_knob_has_a_flag_with_its_help_and_default(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["tune", "--help"])
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    knobs = [
        (name, knob)
        for options in (Experiment, *STEPS, Measure)
        for name, knob in options.model_fields.items()
        if name not in ("model", "steps", "measure", "kind")
    ]
    assert len(knobs) > 15
    for name, knob in knobs:
        assert flag(name) in said
        assert knob.description in said
        if isinstance(knob.default, int | float) and not isinstance(knob.default, bool):
            told = [after.partition("(default: ")[2].partition(")")[0] for after in said.split(knob.description)[1:]]
            assert str(knob.default) in " ".join(told).replace(",", "").split()
    assert "early_stopping_threshold" in dict(knobs) and "(default: Ansor 250, AutoTVM 500, Selective 500)" in said


def test_tune_without_flags_asks_for_the_defaults(tuned, capsys):
    assert cli.main(["tune", "alexnet", "--no-wait"]) == 0
    assert tuned["e"] == Experiment(model="alexnet") and tuned["dir"] is None
    assert capsys.readouterr().out == f"{tuned['run'].id}\n"


def test_tune_passes_every_kind_of_flag(tuned, tmp_path):
    flags = (
        "--target cpu --batch 4 --dim sequence=128 --dim n=2 --seed 7 --time-limit 60 --max-trials 64 "
        "--trials-per-kernel 32 --early-stopping-threshold 16 --warm-start a b --repeats 3 "
        f"--min-repeat-ms 2.5 --no-check --no-wait --runs-dir {tmp_path}"
    )
    assert cli.main(["tune", "m.onnx", *flags.split()]) == 0
    step = Ansor(max_trials=64, trials_per_kernel=32, early_stopping_threshold=16, warm_start=("a", "b"))
    assert tuned["e"] == Experiment(
        model="m.onnx", target="cpu", batch=4, dims={"sequence": 128, "n": 2}, seed=7, time_limit_s=60.0,
        steps=(step,), measure=Measure(repeats=3, min_repeat_ms=2.5, check=False),
    )  # fmt: skip
    assert tuned["dir"] == str(tmp_path)


def test_tune_chooses_the_step(tuned):
    flags = "--step autotvm --kernel-trials 64 --tuner genetic --max-trials 128 --warm-start a --no-wait"
    assert cli.main(["tune", "alexnet", *flags.split()]) == 0
    step = AutoTVM(kernel_trials=64, tuner="genetic", max_trials=128, warm_start=["a"])
    assert tuned["e"] == Experiment(model="alexnet", steps=[step])


@pytest.mark.parametrize(
    ("flags", "step"),
    [
        ("--kernel-trials 64", AutoTVM(kernel_trials=64)),
        ("--exploration-trials 8 --random-trials 2", AutoTVM(exploration_trials=8, random_trials=2)),
        ("--early-stopping-threshold 40%", Ansor(early_stopping_threshold="40 %")),
        ("--trials-per-kernel 3 --no-reuse", Ansor(trials_per_kernel=3, reuse=False)),
    ],
)
def test_without_a_step_the_knobs_choose_the_engine(tuned, flags, step):
    assert cli.main(["tune", "alexnet", *flags.split(), "--no-wait"]) == 0
    assert tuned["e"] == Experiment(model="alexnet", steps=[step])


def test_tune_searches_layouts(tuned):
    flags = "--step layouttuning --trials-per-variant 4 --blocks 8 16 --algorithms direct winograd2 --no-wait"
    assert cli.main(["tune", "alexnet", *flags.split()]) == 0
    step = LayoutTuning(trials_per_variant=4, blocks=(8, 16), algorithms=("direct", "winograd2"))
    assert tuned["e"] == Experiment(model="alexnet", steps=[step])


@pytest.mark.parametrize("top", ["5%", "3"])
def test_tune_selectively(tuned, top):
    flags = f"--step selective --top {top} --trials-per-kernel 64 --similarity 0.7 --engine ansor --no-wait"
    assert cli.main(["tune", "alexnet", *flags.split()]) == 0
    step = Selective(top, trials_per_kernel=64, similarity=0.7, engine="ansor")
    assert tuned["e"] == Experiment(model="alexnet", steps=[step])


def test_tune_takes_several_steps_in_order_each_with_the_knobs_it_has(tuned):
    flags = "--step ansor --step droplet --max-trials 64 --p-value 0.01 --population 32 --no-wait"
    assert cli.main(["tune", "alexnet", *flags.split()]) == 0
    steps = [Ansor(max_trials=64, population=32), Droplet(max_trials=64, p_value=0.01)]
    assert tuned["e"] == Experiment(model="alexnet", steps=steps)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--step", "autotvm", "--step", "droplet", "--population", "16"], "AutoTVM has no knob 'population'"),
        (["--step", "autotvm", "--population", "16"], "AutoTVM has no knob 'population': its knobs are kernel_trials"),
        (["--p-value", "0.1"], "Ansor has no knob 'p_value'"),
        (["--tuner", "xgb", "--population", "64"], "population is a knob of Ansor and tuner one of AutoTVM"),
        (["--early-stopping-threshold", "101 %"], "a percentage of the budget above 0 % and up to 100 %"),
        (["--early-stopping-threshold", "-1"], "should be 1 to 100,000 trials"),
        (["--batch", "0"], "Experiment(batch=0) is not usable: batch should be 1 to 65,536 samples"),
        (["--max-trials", "-3"], "Ansor(max_trials=-3) is not usable"),
        (["--dim", "n"], "--dim 'n' is not usable: write NAME=SIZE"),
        (["--dim", "n=0"], "dims should give 'n' a size of at least 1"),
    ],
)
def test_bad_values_are_one_line_and_exit_code_2(tuned, capsys, flags, said):
    assert cli.main(["tune", "alexnet", *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("tvmlab: ") and error.count("\n") == 1
    assert "e" not in tuned


def test_what_is_not_a_number_or_a_command_is_refused(capsys):
    for arguments in (["tune", "alexnet", "--batch", "many"], ["tunes"], []):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 2
    assert "invalid int value: 'many'" in capsys.readouterr().err


def test_tune_follows_the_run_and_sums_it_up(tuned, capsys):
    assert cli.main(["tune", "squeezenet"]) == 0
    shown = capsys.readouterr()
    summary = dict(line.split(maxsplit=1) for line in shown.out.splitlines()[1:])
    assert summary["run"] == tuned["run"].id and summary["trials"] == "2" and summary["seed"] == "0"
    assert summary["best_estimate_ms"] == "0.6" and summary["untuned_estimate_ms"] == "2.4"
    assert "end_to_end_ms" not in summary and "crashed" not in summary
    assert "running | 40/100 trials | 2 trials/s | model estimate 12.5 ms (untuned 250) | 1:30 left" in shown.err


def test_control_c_stops_the_run_and_says_how_to_resume(tuned, capsys):
    tuned["run"].interrupt = True
    assert cli.main(["tune", "squeezenet"]) == 130
    assert tuned["run"].stopped
    assert f"stopped; tvmlab resume {tuned['run'].id} continues" in capsys.readouterr().err


def test_a_failed_run_is_an_error(tuned, capsys):
    tuned["run"].ends = "failed"
    assert cli.main(["tune", "squeezenet"]) == 2
    assert f"tvmlab: run {tuned['run'].id} failed: out of memory" in capsys.readouterr().err


def test_resume_stop_and_runs_call_the_api(make_run, replaced, capsys):
    run = FakeRun(make_run(TRIALS))
    asked = []
    replaced("run", "resume", lambda name, runs_dir=None: asked.append((name, runs_dir)) or run)
    replaced("run", "attach", lambda name, runs_dir=None: asked.append((name, runs_dir)) or run)
    assert cli.main(["resume", run.id, "--runs-dir", "d"]) == 0
    assert cli.main(["stop", run.id]) == 0
    assert asked == [(run.id, "d"), (run.id, None)] and run.stopped
    assert f"run {run.id} is stopped" in capsys.readouterr().out
    replaced("run", "runs", lambda runs_dir=None, **asked: pd.DataFrame({"status": ["done"]}, index=["one"]))
    assert cli.main(["runs"]) == 0
    assert capsys.readouterr().out.split() == ["status", "one", "done"]


def test_stop_and_report_of_an_unknown_run_are_errors(tmp_path, capsys):
    for command in ("stop", "report"):
        assert cli.main([command, "nowhere", "--runs-dir", str(tmp_path)]) == 2
        assert "tvmlab: no run 'nowhere'" in capsys.readouterr().err


def test_compare_passes_its_baselines(make_run, replaced, capsys):
    run = FakeRun(make_run(TRIALS))
    asked = {}
    replaced("run", "attach", lambda name, runs_dir=None: run)
    replaced("compare", "compare", lambda given, **how: asked.update(run=given, **how) or "the comparison")
    assert cli.main(["compare", run.id, "--baseline", "onnxruntime", "--repeats", "5"]) == 0
    assert asked == {"run": run, "baselines": ["onnxruntime"], "repeats": 5, "threads": None}
    assert capsys.readouterr().out == "the comparison\n"


@pytest.fixture
def asked_study(replaced, tmp_path):
    """What `tvmlab study` asked for; the study it was given has begun, and a run of it failed."""
    design = Study(models=["alexnet"], arms={"search": [Ansor(max_trials=30)]})
    folder = StudyFolder.create(tmp_path / "begun", design, {"label": "test-cpu", "attrs": {}})
    folder.refuse(folder.plan[0], "no compiler")
    asked = SimpleNamespace(folder=folder, design=design, calls=[])
    replaced("study", "study", lambda *given: asked.calls.append(given) or folder)
    return asked


def test_study_takes_a_definition_or_a_study(asked_study, tmp_path, capsys, monkeypatch):
    definition = tmp_path / "mine.json"
    definition.write_text(asked_study.design.model_dump_json())
    assert cli.main(["study", str(definition), "-o", "there"]) == 2  # a run failed
    shown = capsys.readouterr()
    assert "alexnet" in shown.out and "search" in shown.out
    assert shown.err == "tvmlab: run alexnet-s0-search failed: no compiler\n"
    cli.main(["study", str(definition)])
    cli.main(["study", str(asked_study.folder.path)])
    monkeypatch.chdir(tmp_path)
    cli.main(["study", "report"])
    assert asked_study.calls == [
        ("there", asked_study.design), ("mine", asked_study.design), (str(asked_study.folder.path), None),
        ("report", study_of_the_report()),
    ]  # fmt: skip


def test_a_dry_run_of_a_study_lists_its_runs_and_says_how_long(asked_study, tmp_path, capsys):
    assert cli.main(["study", "report", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "resnet50-s0-ansor" and len(lines) == 28 and re.fullmatch(r"about \d\d min", lines[-1])
    assert asked_study.calls == []


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "cannot read"), ("{}", "Study needs 'models'"), ('{"models": ["a"], "arms": {}}', "Study(arms={})")],
)
def test_a_definition_that_is_none_is_refused(tmp_path, capsys, content, said):
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_text(content)
    assert cli.main(["study", str(path)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_report_takes_a_study_too(asked_study, replaced, capsys):
    given = []
    replaced("report", "report", lambda what, output, **asked: given.append((what, output, asked)) or "page.html")
    assert cli.main(["report", str(asked_study.folder.path), "-o", "page.html"]) == 0
    assert given == [(str(asked_study.folder.path), "page.html", {})] and capsys.readouterr().out == "page.html\n"
    parameters = ["-p", "margin=0.05", "-p", "top=3", "--parameter", "arm=ansor"]
    assert cli.main(["report", str(asked_study.folder.path), *parameters]) == 0
    assert given[1][2] == {"margin": 0.05, "top": 3, "arm": "ansor"}
    for wrong in ("margin", "output=x"):
        assert cli.main(["report", str(asked_study.folder.path), "-p", wrong]) == 2
        assert f"{wrong!r} is no parameter" in capsys.readouterr().err


def test_lists_are_printed_whole(replaced, capsys):
    wide = pd.DataFrame({f"column_{number}": [number] * 70 for number in range(30)})
    replaced("models", "models", lambda: wide)
    assert cli.main(["models"]) == 0
    out = capsys.readouterr().out
    assert "column_29" in out and len(out.splitlines()) == 71
    asked = []
    replaced("overview", "tasks", lambda model, target, layout: asked.append((model, target, layout)) or wide)
    assert cli.main(["tasks", "alexnet", "--target", "cpu"]) == 0
    assert cli.main(["tasks", "alexnet", "--layout", "auto"]) == 0
    assert asked == [("alexnet", "cpu", "NCHW"), ("alexnet", "auto", "auto")]


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 1)])
def test_doctor_exits_with_what_it_found(replaced, capsys, ok, code):
    class Diagnosis:
        def __init__(self):
            self.ok = ok

        def __repr__(self):
            return "compiler: found"

    replaced("doctor", "doctor", Diagnosis)
    assert cli.main(["doctor"]) == code
    assert capsys.readouterr().out == "compiler: found\n"


def test_demo_leaves_a_figure_and_a_report_and_prints_the_summary(tuned, replaced, capsys, tmp_path):
    page = tmp_path / "report.html"
    replaced("compare", "compare", lambda run: "compared")
    replaced("report", "report", lambda run: page)
    assert cli.main(["demo", "--model", "squeezenet", "--time-limit", "5"]) == 0
    assert tuned["e"] == best("squeezenet", time_limit_s=5.0).afresh()
    figure = tuned["run"].folder.path / "curve.png"
    assert figure.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    for expected in ("compared", "best_estimate_ms", str(figure), str(page)):
        assert expected in out
    assert cli.main(["demo"]) == 0
    assert tuned["e"] == best("resnet50", time_limit_s=180.0).afresh()


def test_demo_stopped_by_control_c_compares_nothing(tuned, replaced):
    def compare(run):
        raise InputError("compared a stopped run", remedy="none")

    replaced("compare", "compare", compare)
    tuned["run"].interrupt = True
    assert cli.main(["demo"]) == 130


def test_help_imports_nothing_that_takes_long():
    script = (
        "import sys\nfrom tvmlab.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'tvm', 'pandas', 'matplotlib', 'pydantic', 'ipywidgets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_reader_that_leaves_early_is_no_error(tmp_path):
    environment = {**os.environ, "TVMLAB_RUNS": str(tmp_path)}
    shell = f"'{sys.executable}' -m tvmlab.cli runs | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "0" and "Traceback" not in done.stderr
