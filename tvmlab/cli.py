"""The command line. Every command is one call of the API; knobs' flags are made from the option classes.

Imports are local to the commands, so that `tvmlab --help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvmlab.cli_runs import add_runs_flags, call_runs, runs_dir_flag
from tvmlab.console import follow, show, summarise
from tvmlab.core import InputError, TvmlabError

if TYPE_CHECKING:
    from tvmlab.experiment import Experiment, Options
    from tvmlab.run import Run
    from tvmlab.study_design import Study

__all__ = ["main"]

_DEMO_MODEL = "resnet50"
_DEMO_TIME_LIMIT_S = 180.0
_INTERRUPTED = 130  # the shell's exit code for Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 (doctor found a failure), 2 (an error), 130 (Ctrl-C)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="tvmlab", description="Auto-tune deep-learning models with Apache TVM, reproducibly."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in _COMMANDS.items():
        added = commands.add_parser(
            name, help=command.help, description=f"{command.help[:1].upper()}{command.help[1:]}."
        )
        if name in arguments:  # the flags of the others would only cost time
            command.add_flags(added)
            added.set_defaults(call=command.call)
    given = parser.parse_args(arguments)
    try:
        return given.call(given)
    except TvmlabError as error:
        print(f"tvmlab: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tvmlab: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


@dataclass(frozen=True)
class _Command:
    help: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    call: Callable[[argparse.Namespace], int]


# Commands


def _no_flags(parser: argparse.ArgumentParser) -> None:
    pass


def _run_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="id or folder of a run")
    runs_dir_flag(parser)


def _models(args: argparse.Namespace) -> int:
    from tvmlab.models import models

    return show(models())


def _targets(args: argparse.Namespace) -> int:
    from tvmlab.targets import targets

    return show(targets())


def _tasks_flags(parser: argparse.ArgumentParser) -> None:
    from tvmlab.experiment import Experiment
    from tvmlab.flags import add_knobs

    parser.add_argument("model", metavar="MODEL", help=Experiment.model_fields["model"].description)
    add_knobs(parser, Experiment, skip=_only(Experiment, "target"))
    parser.add_argument("--layout", default="NCHW", help="how the convolutions are computed: NCHW (default), NCHW16c, "
                        "'NCHW16c winograd4'; auto as AutoTVM does where no LayoutTuning chose")  # fmt: skip


def _only(options: type[Options], *kept: str) -> list[str]:
    return [name for name in options.model_fields if name not in kept]


def _tasks(args: argparse.Namespace) -> int:
    from tvmlab.experiment import Experiment
    from tvmlab.flags import given_knobs
    from tvmlab.overview import tasks

    experiment = Experiment(**given_knobs(args, Experiment))
    return show(tasks(experiment.model, experiment.target, layout=args.layout))


def _tune_flags(parser: argparse.ArgumentParser) -> None:
    from tvmlab.experiment import Experiment, Measure
    from tvmlab.flags import add_knobs, add_steps

    parser.add_argument("model", metavar="MODEL", help=Experiment.model_fields["model"].description)
    runs_dir_flag(parser)
    parser.add_argument("--no-wait", action="store_true", help="start the run, print its id and return")
    parser.add_argument("--preset", metavar="NAME", help="fast, default or max: the steps, and how candidates are "
                        "timed where no flag says otherwise; tvmlab presets MODEL compares them")  # fmt: skip
    add_knobs(parser, Experiment, skip=("model", "steps", "measure"))
    add_steps(parser)
    add_knobs(parser, Measure)


def _tune(args: argparse.Namespace) -> int:
    from tvmlab.flags import given_experiment
    from tvmlab.run import tune

    experiment = _of_preset(args) if args.preset else given_experiment(args)
    return _begin(tune(experiment, args.runs_dir), args.no_wait)


def _of_preset(args: argparse.Namespace) -> Experiment:
    """The experiment of `--preset` with the other flags; says how long it takes. Raises InputError for steps."""
    from tvmlab.experiment import Experiment, Measure
    from tvmlab.flags import given_knobs, refuse_steps
    from tvmlab.presets import estimate_time, preset

    refuse_steps(args, f"preset {args.preset!r} has its own steps")
    found = preset(args.preset, **given_knobs(args, Experiment))
    measure = found.measure.model_dump() | given_knobs(args, Measure)
    experiment = found.model_copy(update={"measure": Measure(**measure)})
    print(estimate_time(experiment, args.runs_dir), file=sys.stderr)
    return experiment


def _presets_flags(parser: argparse.ArgumentParser) -> None:
    from tvmlab.experiment import Experiment
    from tvmlab.flags import add_knobs

    parser.add_argument("model", metavar="MODEL", help=Experiment.model_fields["model"].description)
    add_knobs(parser, Experiment, skip=_only(Experiment, "target", "batch", "dims"))
    runs_dir_flag(parser)


def _presets(args: argparse.Namespace) -> int:
    from tvmlab.experiment import Experiment
    from tvmlab.flags import given_knobs
    from tvmlab.presets import presets

    return show(presets(**given_knobs(args, Experiment), runs_dir=args.runs_dir))


def _resume_flags(parser: argparse.ArgumentParser) -> None:
    _run_flags(parser)
    parser.add_argument("--no-wait", action="store_true", help="start the run, print its id and return")


def _resume(args: argparse.Namespace) -> int:
    from tvmlab.run import resume

    return _begin(resume(args.run, args.runs_dir), args.no_wait)


def _begin(run: Run, no_wait: bool) -> int:
    """Print the id and, unless told not to wait, follow the run and sum it up."""
    print(run.id, flush=True)
    if no_wait:
        return 0
    if not follow(run):
        return _INTERRUPTED
    return summarise(run)


def _stop(args: argparse.Namespace) -> int:
    from tvmlab.run import attach

    run = attach(args.run, args.runs_dir)
    run.stop()
    print(f"run {run.id} is {run.status}")
    return 0


def _compare_flags(parser: argparse.ArgumentParser) -> None:
    _run_flags(parser)
    parser.add_argument("--baseline", nargs="+", default=["untuned", "onnxruntime"], metavar="NAME",
                        help="what to time beside the run (default: untuned onnxruntime)")  # fmt: skip
    parser.add_argument("--repeats", type=int, metavar="N", help="turns of each; with fewer than 6 a ratio has no "
                        "interval (default: what its interval takes to be 2 %% wide, 15 to 60)")  # fmt: skip
    parser.add_argument("--threads", type=int, metavar="N", help="how many threads each may use (default: the cores)")


def _compare(args: argparse.Namespace) -> int:
    from tvmlab.compare import compare
    from tvmlab.run import attach

    run = attach(args.run, args.runs_dir)
    return show(compare(run, baselines=args.baseline, repeats=args.repeats, threads=args.threads))


def _export_flags(parser: argparse.ArgumentParser) -> None:
    _run_flags(parser)
    parser.add_argument("-o", "--output", default="model.so", metavar="FILE", help="the library (default: model.so)")


def _export(args: argparse.Namespace) -> int:
    from tvmlab.export import export
    from tvmlab.run import attach

    print(export(attach(args.run, args.runs_dir), args.output))
    return 0


def _profile_flags(parser: argparse.ArgumentParser) -> None:
    _run_flags(parser)
    parser.add_argument("--repeats", type=int, default=15, help="timed inferences (default: 15)")
    parser.add_argument("--threads", type=int, metavar="N", help="how many threads to use (default: the cores)")
    parser.add_argument("--onnxruntime", action="store_true", help="show onnxruntime's own profile beside it instead")


def _profile(args: argparse.Namespace) -> int:
    from tvmlab.operators import compare_operators
    from tvmlab.profile import causes, profile
    from tvmlab.records import RunFolder

    run = RunFolder.open(args.run, args.runs_dir)
    if args.onnxruntime:
        return show(compare_operators(run, repeats=args.repeats, threads=args.threads).round(3))
    frame = profile(run, repeats=args.repeats, threads=args.threads)
    show(frame.drop(columns="shapes").round(3))
    print(f"\n{', '.join(f'{name} {value:.5g}' for name, value in frame.attrs.items() if name != 'run')}\n")
    return show(causes(frame).round(3))


def _study_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", metavar="STUDY", help="JSON file of a definition (tvmlab.Study), the folder of a "
                        "study to go on with, or 'report' for the published report's experiment")  # fmt: skip
    parser.add_argument("-o", "--output", metavar="FOLDER", help="where the study is kept (default: the file's name)")
    parser.add_argument("--dry-run", action="store_true", help="list its runs and say about how long it takes")


def _study(args: argparse.Namespace) -> int:
    from tvmlab.study import study, study_length_s
    from tvmlab.study_design import plan
    from tvmlab.study_folder import StudyFolder
    from tvmlab.study_length import duration_text

    there = StudyFolder.is_study(args.study)
    definition = StudyFolder.open(args.study).definition if there else _definition(args.study)
    if args.dry_run:
        asked = StudyFolder.open(args.study) if there else definition
        print("\n".join([*(cell.name for cell in plan(definition)), f"about {duration_text(study_length_s(asked))}"]))
        return 0
    found = study(args.study if there else args.output or Path(args.study).stem, None if there else definition)
    show(found.frame().drop(columns=["run", "untuned_estimate_ms"]))
    for problem in found.problems:
        print(f"tvmlab: {problem}", file=sys.stderr)
    return 2 if found.problems else 0


def _definition(name: str) -> Study:
    """The study that a JSON file defines. Raises InputError if it cannot be read."""
    from tvmlab.study_design import Study, study_of_the_report

    if name == "report" and not Path(name).exists():
        return study_of_the_report()
    try:
        return Study.from_json(Path(name).read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {name!r} ({error.strerror})", remedy="pass a file or a study") from error


def _report_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="id or folder of a run, or the folder of a study")
    runs_dir_flag(parser)
    parser.add_argument("-o", "--output", metavar="FILE", help="the HTML file (default: report.html in the folder)")
    parser.add_argument(
        "-p", "--parameter", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the report, such "
        "as top=20 of a run's, or margin=0.05 of a study's; repeat for several",
    )  # fmt: skip


def _parameter(text: str) -> tuple[str, Any]:
    """A name and a number, or a text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier() or name in ("run", "study", "output"):
        raise InputError(f"{text!r} is no parameter", remedy="write NAME=VALUE, such as margin=0.05")
    for number in (int, float):
        with suppress(ValueError):
            return name, number(value)
    return name, value


def _report(args: argparse.Namespace) -> int:
    from tvmlab.records import RunFolder
    from tvmlab.report import report
    from tvmlab.study_folder import StudyFolder

    what = args.run if StudyFolder.is_study(args.run) else RunFolder.open(args.run, args.runs_dir)
    print(report(what, args.output, **dict(map(_parameter, args.parameter))))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from tvmlab.doctor import doctor

    diagnosis = doctor()
    print(diagnosis)
    return 0 if diagnosis.ok else 1


def _demo_flags(parser: argparse.ArgumentParser) -> None:
    from tvmlab.experiment import Experiment
    from tvmlab.flags import add_knobs

    parser.set_defaults(time_limit_s=_DEMO_TIME_LIMIT_S)
    parser.add_argument("--model", default=_DEMO_MODEL, help=f"what to tune (default: {_DEMO_MODEL})")
    parser.add_argument("--time-limit", dest="time_limit_s", type=float, metavar="S",
                        help=f"how long to search, in seconds (default: {_DEMO_TIME_LIMIT_S:g})")  # fmt: skip
    add_knobs(parser, Experiment, skip=_only(Experiment, "target", "seed"))
    runs_dir_flag(parser)


def _demo(args: argparse.Namespace) -> int:
    from tvmlab.compare import compare
    from tvmlab.experiment import Experiment
    from tvmlab.flags import given_knobs
    from tvmlab.plots import latency_png
    from tvmlab.presets import best
    from tvmlab.report import report
    from tvmlab.run import tune

    experiment = best(**given_knobs(args, Experiment)).afresh()
    print(f"tvmlab.tune({experiment.code()})", flush=True)
    run = tune(experiment, args.runs_dir)
    if not follow(run):
        return _INTERRUPTED
    print("timing the compiled model end to end, beside the untuned one and onnxruntime ...", flush=True)
    print(compare(run))
    figure = run.folder.path / "curve.png"
    figure.write_bytes(latency_png(run.folder, dpi=150))
    page = report(run)
    summarise(run)
    print(f"\nrun     {run.folder.path}\nfigure  {figure}\nreport  {page}")
    return 0


_COMMANDS = {
    "models": _Command("list the zoo: name, source, parameters, FLOPs, inputs", _no_flags, _models),
    "targets": _Command("list what is attached, with its measured limits", _no_flags, _targets),
    "tasks": _Command("list the tasks of a model", _tasks_flags, _tasks),
    "presets": _Command("compare the presets for a model: steps, trials, time", _presets_flags, _presets),
    "tune": _Command("tune a model and follow the run; Ctrl-C stops it", _tune_flags, _tune),
    "resume": _Command("continue a stopped or failed run to the total that was asked", _resume_flags, _resume),
    "runs": _Command("list the runs; filter, export, import or delete them", add_runs_flags, call_runs),
    "stop": _Command("stop a run after the trial under way", _run_flags, _stop),
    "compare": _Command("time the compiled model end to end beside baselines", _compare_flags, _compare),
    "export": _Command("write the compiled model into a library that tvmlab.load and TVM run", _export_flags, _export),
    "profile": _Command("time every kernel in the running model: where the time goes", _profile_flags, _profile),
    "study": _Command("carry out a study: models x sources x arms x seeds", _study_flags, _study),
    "report": _Command("write the HTML report of a run or a study", _report_flags, _report),
    "doctor": _Command("check that this machine can tune", _no_flags, _doctor),
    "demo": _Command("tune for a few minutes, compare, and write a figure and a report", _demo_flags, _demo),
}

if __name__ == "__main__":
    sys.exit(main())
