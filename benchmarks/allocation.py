"""End-to-end latency after a small budget, tvmlab over upstream's tune_relax: same model, target, trials and seed.

    python benchmarks/allocation.py [--model alexnet --trials 256] [--model resnet50 --trials 512] [--seed 0] [--quick]

Both tune the same lowered module; both databases are compiled by the same function, and timed interleaved.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from common import report, tune_tvmlab, tune_upstream

from tvmlab.compare import compare
from tvmlab.experiment import Experiment
from tvmlab.records import RunFolder, State

GOALS = {"alexnet": 0.2, "resnet50": 0.5}


def as_run(folder: Path, like: RunFolder) -> RunFolder:
    """Upstream's database dressed as a run of the same experiment, so that compare() can take it."""
    dressed = RunFolder.create(
        Experiment(**{**like.experiment.model_dump(), "steps": like.experiment.steps}), like.path.parent
    )
    dressed.write_json("environment.json", like.environment)
    dressed.write_state(State(status="done"))
    for name in ("database_workload.json", "database_tuning_record.json"):
        shutil.copy(folder / name, dressed.path / name)
    return dressed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append")
    parser.add_argument("--trials", type=int, action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="squeezenet with 64 trials")
    asked = parser.parse_args()
    jobs = list(zip(asked.model or ["alexnet", "resnet50"], asked.trials or [256, 512], strict=True))
    for model, trials in [("squeezenet", 64)] if asked.quick else jobs:
        folder = Path(tempfile.mkdtemp(prefix="allocation-"))
        run, ours_s = tune_tvmlab(model, trials, asked.seed, folder / "runs")
        print(f"{model}: tvmlab {trials} trials in {ours_s:.0f} s", flush=True)
        upstream_s = tune_upstream("relax", model, trials, asked.seed, folder / "upstream")
        print(f"{model}: upstream {trials} trials in {upstream_s:.0f} s", flush=True)
        other = as_run(folder / "upstream", run.folder)
        result = compare(run, ["untuned", "onnxruntime", other.id], repeats=20)
        print(result, flush=True)
        row = next(row for row in result.ratios if row["baseline"] == other.id)
        report(f"allocation.{model}", row["ratio"], row["low"], row["high"], GOALS.get(model, 1.0))


if __name__ == "__main__":
    main()
