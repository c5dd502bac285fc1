"""TVM's own droplet search, `PostOpt`, on the database in a folder; a child process of droplet.py.

    python benchmarks/upstream_droplet.py FOLDER TRIALS SEED

As `meta_schedule.post_optimization` has it, with three differences, all in its favour. Its builds have 120 seconds, not
10, in which not one convolution was built on the first machine that this project ran on; its build workers do not parse
every target's intrinsics first; and the random numbers by which it decides whether to apply the postprocessors are
seeded. Prints one JSON line: the seconds that it took, how many candidates it tried and how many of them ran. What it
found is in the database.
"""

import json
import random
import sys
import time
from functools import partial
from pathlib import Path

BUILD_TIMEOUT_S = 120


def main() -> None:
    folder, trials, seed = sys.argv[1:]
    from tvmlab.compat import load_meta_schedule
    from tvmlab.targets import target

    ms = load_meta_schedule()
    from tvm.s_tir.meta_schedule.post_optimization import PostOpt, droplet, space

    tried, ran = [], []

    class Counted(space.Space):
        def run(self, candidates: list, log: str) -> object:
            before = lines(log)
            found = super().run(candidates, log, timeout=BUILD_TIMEOUT_S)
            tried.append(len(candidates))
            ran.append(lines(log) - before)
            return found

    droplet.Space = Counted
    ms.builder.LocalBuilder = partial(ms.builder.LocalBuilder, initializer=load_meta_schedule)
    random.seed(int(seed))
    started = time.perf_counter()
    PostOpt(folder, target("cpu").to_tvm(), int(trials)).run()
    print(json.dumps({"seconds": time.perf_counter() - started, "tried": sum(tried), "ran": sum(ran)}))


def lines(path: str) -> int:
    return len(Path(path).read_text().splitlines())


if __name__ == "__main__":
    main()
