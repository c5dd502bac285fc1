"""TVM's own MetaSchedule on a task or a model, as its documentation runs it; a child process of the benchmarks.

    python benchmarks/upstream.py tir   MODEL TRIALS SEED FOLDER [TARGET]     ms.tune_tir, default builder and runner
    python benchmarks/upstream.py relax MODEL TRIALS SEED FOLDER [TARGET]     ms.relax_integration.tune_relax, likewise

Prints one JSON line: the seconds that the call took (imports and the model's preparation left out). The database is
in FOLDER.
"""

import json
import logging
import sys
import time
from pathlib import Path


def main() -> None:
    kind, name, trials, seed, folder, *named = sys.argv[1:]
    from tvm.s_tir import meta_schedule as ms

    from tvmlab.compat import load_wmma
    from tvmlab.measure.process import end_with_parent_thread
    from tvmlab.models import load_model
    from tvmlab.targets import target
    from tvmlab.tasks import extract_from, lower

    end_with_parent_thread()
    logging.getLogger("tvm").setLevel(logging.ERROR)
    device = target(*(named or ["cpu"]))
    lowered, classes = lower(load_model(name), device)
    if device.kind == "cuda":
        load_wmma()  # which the rules of a card with tensor cores name, and lower() spared this process
    Path(folder).mkdir(parents=True, exist_ok=True)
    settings = {"work_dir": folder, "max_trials_global": int(trials), "seed": int(seed)}
    # lower() spared this process all or most of TVM's 12-second import of intrinsics: in upstream's favour. Its workers
    # pay it.
    started = time.perf_counter()
    if kind == "tir":
        (task,) = (task for task in extract_from(lowered, classes, device) if task.info.flops > 1e6)
        ms.tune_tir(task.module, device.to_tvm(), **settings)
    else:
        ms.relax_integration.tune_relax(lowered, {}, device.to_tvm(), **settings)
    print(json.dumps({"seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    main()
