"""How long a frame of a million recorded trials takes to load, and how much memory: at most 10 s and 2 GB.

    python benchmarks/frames.py [--quick]

The loading runs in a child process, so that its peak memory is that of reading alone. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import orjson

from tvmlab.core import TaskInfo
from tvmlab.experiment import Experiment
from tvmlab.records import RunFolder

GOAL_S = 10.0
GOAL_BYTES = 2 * 1024**3
REPEATS = 3
TASKS = 40
LOADER = """
import json, resource, sys, time
began = time.perf_counter()
from tvmlab import frames
frame = frames.trials(sys.argv[1])
seconds = time.perf_counter() - began
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
began = time.perf_counter()
curve = frames.curve(sys.argv[1])
print(json.dumps({"rows": len(frame), "seconds": seconds, "peak_bytes": peak,
                  "curve_s": time.perf_counter() - began, "curve_rows": len(curve)}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="100,000 trials instead of 1,000,000")
    rows = 100_000 if parser.parse_args().quick else 1_000_000
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_run(Path(scratch), rows)
        size = (folder.path / "trials.jsonl").stat().st_size
        loads = [load(folder) for _ in range(REPEATS)]
    assert all(each["rows"] == rows for each in loads), loads
    seconds = sorted(each["seconds"] for each in loads)
    peak = max(each["peak_bytes"] for each in loads)
    middle = seconds[REPEATS // 2]
    print(f"{rows:,} trials, {size / 1e6:.0f} MB: frame in {middle:.2f} s with imports (goal {GOAL_S:.0f} s)")
    print(f"peak memory {peak / 1024**3:.2f} GiB (goal {GOAL_BYTES / 1024**3:.0f} GiB)")
    print(f"curve of {loads[0]['curve_rows']:,} points in {loads[0]['curve_s']:.2f} s")
    result = {
        "benchmark": "frames",
        "ratio": middle / GOAL_S,
        "low": seconds[0] / GOAL_S,
        "high": seconds[-1] / GOAL_S,
    }
    print(json.dumps({**result, "goal": 1.0, "better": "lower", "rows": rows, "peak_gib": peak / 1024**3}))
    return 0 if middle <= GOAL_S and peak <= GOAL_BYTES else 1


def write_run(parent: Path, rows: int) -> RunFolder:
    """A run folder with so many trials, as long and as varied as real lines are; one in twenty failed."""
    draw = random.Random(0)
    folder = RunFolder.create(Experiment(model="resnet50"), parent)
    infos = [TaskInfo(f"{i:016x}", f"task_{i}", f"class_{i % 7}", 1 + i % 3, 1e8, 1e6, True) for i in range(TASKS)]
    folder.write_json("tasks.json", infos)
    with (folder.path / "trials.jsonl").open("wb") as file:
        for number in range(rows):
            file.write(orjson.dumps(line(draw, number), option=orjson.OPT_APPEND_NEWLINE))
    return folder


def line(draw: random.Random, number: int) -> dict[str, object]:
    """One trial as the run writes it; the first ones are the untuned kernels."""
    untuned = number < TASKS
    failed = not untuned and draw.random() < 0.05
    latency = 1e-2 if untuned else 1e-3 * draw.lognormvariate(0, 1)
    return {
        "task_key": f"{number % TASKS:016x}",
        "step": 0,
        "strategy": "default" if untuned else "evolution",
        "trial": 0 if untuned else number - TASKS + 1,
        "key": f"{draw.getrandbits(64):016x}",
        "sketch": 0,
        "decisions": [[draw.choice((1, 2, 4, 7, 8, 16)) for _ in range(4)] for _ in range(6)] + [3, 1],
        "status": "build_error" if failed else "ok",
        "latencies_s": [] if failed else [latency * draw.uniform(0.98, 1.02) for _ in range(5)],
        "build_s": draw.random(),
        "run_s": draw.random(),
        "elapsed_s": number * 0.25,
        "time_s": 1.7e9 + number * 0.25,
        "message": "the compiler refused it" if failed else "",
    }


def load(folder: RunFolder) -> dict[str, float]:
    """Load the frame in a process of its own and return what it measured of itself."""
    done = subprocess.run([sys.executable, "-c", LOADER, str(folder.path)], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    sys.exit(main())
