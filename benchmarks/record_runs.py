"""Make the recordings that the notebooks read: a study each, packed into data/recorded_runs.

    python benchmarks/record_runs.py report_study --seeds 5 --work ~/studies

The study's folder stays in the work folder: the same call goes on after an interruption. `--list` says what there is
and how long each takes.
"""

import argparse
import tempfile
from pathlib import Path

from kernels import model_of

import tvmlab
from tvmlab import Ansor, Droplet, Repeat, Study, Timed, TransferTuning
from tvmlab.study import study_length_s
from tvmlab.study_length import duration_text

DATA = Path(__file__).parents[1] / "data" / "recorded_runs"


def report_study(seeds, work):
    """The report's experiment: three models, all pairs, with and without Droplet on either side."""
    return tvmlab.study_of_the_report(seeds)


def ansor_knobs(seeds, work):
    """One model, one knob of Ansor changed at a time, the same trials each."""
    return Study(
        models=["squeezenet"],
        seeds=seeds,
        arms={
            "default": [Ansor(max_trials=192)],
            "population 64": [Ansor(max_trials=192, population=64)],
            "one generation": [Ansor(max_trials=192, generations=1)],
            "batches of 32": [Ansor(max_trials=192, batch_size=32)],
        },
    )


def budgets(seeds, work):
    """One search of the 20,000 trials that the paper of transfer-tuning recommends, to be cut off at any budget."""
    step = Ansor(trials_per_kernel=20_000, early_stopping_threshold="100 %", max_trials=20_000)
    return Study(models=["alexnet"], seeds=seeds, arms={"ansor": [step]})


def bursts(seeds, work):
    """The same time in one go and in bursts; the sources are Ansor's runs of the other model."""
    parts = [Ansor(max_trials=24), TransferTuning("$others:ansor", max_trials=16), Droplet(max_trials=24)]
    return Study(
        models=["squeezenet", "alexnet"],
        seeds=seeds,
        arms={
            "ansor": [Timed(Ansor(), 120)],
            "in one go": [
                Timed(Ansor(), 50),
                Timed(TransferTuning("$others:ansor"), 30),
                Timed(Droplet(), 40),
            ],
            "in bursts": [Timed(Repeat(8, parts), 120)],
        },
    )


def descents(seeds, work):
    """Three convolutions alone: a short search, and from its best a descent with room to end at a local minimum."""
    models = [model_of(name, work) for name in ("resnet50_conv3x3", "resnet50_conv1x1", "googlenet_conv5x5")]
    return Study(models=models, seeds=seeds, arms={"ansor+droplet": [Ansor(max_trials=16), Droplet(trials=600)]})


STUDIES = {made.__name__: made for made in (report_study, ansor_knobs, budgets, bursts, descents)}


def record(name, seeds, work):
    """Carry the study out and pack it."""
    work.mkdir(parents=True, exist_ok=True)
    done = tvmlab.study(work / name, STUDIES[name](tuple(range(seeds)), work))
    if done.problems:
        raise SystemExit("\n".join(done.problems))
    note = f"benchmarks/record_runs.py {name} --seeds {seeds}: {STUDIES[name].__doc__}"
    path = tvmlab.pack(done.path, DATA / f"{name}.tar.xz", note)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=STUDIES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("studies"))
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args()
    if given.list or given.name is None:
        with tempfile.TemporaryDirectory() as scratch:
            for known, made in STUDIES.items():
                length = duration_text(study_length_s(made(tuple(range(given.seeds)), Path(scratch))))
                print(f"{known}: {made.__doc__} {given.seeds} seeds take about {length}.")
    else:
        record(given.name, given.seeds, given.work)
