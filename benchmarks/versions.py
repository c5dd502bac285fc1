"""Searches by this version of tvmlab beside those by an earlier one, per kernel: latency, and wall time.

    python benchmarks/versions.py --old COMMIT [--kernel NAME ...] [--seeds 1] [--trials 300] [--rows FILE] [--quick]

For who changes the search. The earlier version is taken from the repository's history, and searches in a process that
imports it; who is first alternates. The two fastest kernels are timed in turns, by this version, in six processes; wall
time is the tuning time of the runs (state.json).

A row of JSON for each kernel and seed, then a line for each ratio, this version's over the earlier one's: geometric
means over kernels and seeds with the 95 % interval of the paired randomization test (tvmlab.stats.paired_ratio; at
least 6 pairs). The last line is the latency.
"""

import argparse
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from common import kept, report_mean
from kernels import KERNELS, best_of, compare, model_of, task_of

import tvmlab
from tvmlab.records import RunFolder
from tvmlab.targets import target

GOALS = {"versions.wall_time": 1.0, "versions": 1.0}
_HERE = Path(tvmlab.__file__).parents[1]

# Only what any version understands.
_SEARCH = """
import sys, tvmlab
model, trials, seed, folder = sys.argv[1:]
step = tvmlab.Ansor(max_trials=int(trials), trials_per_kernel=int(trials), early_stopping_threshold=100_000)
run = tvmlab.tune(tvmlab.Experiment(model=model, target="cpu", seed=int(seed), steps=[step]).afresh(), folder).wait()
print(run.folder.path)
"""


def version(commit: str, folder: Path) -> Path:
    """The package as it was at a commit; ends the benchmark, with what git says, if there is no such."""
    archive = ["git", "-C", str(_HERE), "archive", commit, "tvmlab", "data", "pyproject.toml"]
    done = subprocess.run(archive, capture_output=True)
    if done.returncode != 0:
        raise SystemExit(f"--old {commit}: {done.stderr.decode().strip()}; name a commit that `git log` lists")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as packed:
        packed.extractall(folder, filter="data")
    return folder


def searched(source: Path, model: str, trials: int, seed: int, folder: Path) -> RunFolder:
    """A finished search by the package in `source`."""
    command = [sys.executable, "-c", _SEARCH, model, str(trials), str(seed), str(folder / f"runs-{source.name}")]
    env = os.environ | {"PYTHONPATH": str(source)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env, cwd=folder)
    return RunFolder(Path(done.stdout.splitlines()[-1]))


def row_of(name: str, seed: int, trials: int, sources: tuple[Path, Path], folder: Path) -> dict[str, Any]:
    """One kernel, one seed."""
    cpu = target("cpu")
    model = model_of(name, folder)
    task = task_of(model, cpu)
    order = sources if (seed + KERNELS.index(name)) % 2 else sources[::-1]
    runs = {source: searched(source, model, trials, seed, folder) for source in order}
    new, old = (runs[source] for source in sources)
    found = compare(best_of(new, task, cpu), best_of(old, task, cpu), task, cpu)
    return {
        "new_us": found.ours_us,
        "old_us": found.theirs_us,
        **{end: round(getattr(found.ratio, end), 4) for end in ("ratio", "low", "high")},
        "new_s": round(new.state.elapsed_s, 1),
        "old_s": round(old.state.elapsed_s, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", required=True, help="the commit of the earlier version")
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="repeat for several (default: all six)")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--rows", type=Path, help="rows that this file has are not measured again; others are added")
    parser.add_argument("--quick", action="store_true", help="one kernel, one seed, 32 trials")
    asked = parser.parse_args()
    names = asked.kernel or (KERNELS[:1] if asked.quick else KERNELS)
    trials = 32 if asked.quick else asked.trials
    folder = Path(tempfile.mkdtemp(prefix="versions-"))
    sources = (_HERE, version(asked.old, folder / "old"))
    rows = []
    for seed in range(1 if asked.quick else asked.seeds):
        for name in names:
            what = {"kernel": name, "seed": seed, "trials": trials, "old": asked.old}
            rows.append(kept(asked.rows, what, partial(row_of, name, seed, trials, sources, folder)))
    times = [row["new_s"] / row["old_s"] for row in rows]
    for benchmark, ratios in (("versions.wall_time", times), ("versions", [row["ratio"] for row in rows])):
        report_mean(benchmark, ratios, GOALS[benchmark])


if __name__ == "__main__":
    main()
