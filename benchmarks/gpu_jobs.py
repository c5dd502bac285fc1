"""The jobs of gpu_session.py. Each takes the session and measures rows; a row that is there is not measured again.

They come in the order of worth that the issue gives: smoke, main, report, the comparison of the other models (others,
layers), throughput, a recorded space. Of the report's experiment the first seed is whole before anything else is begun,
the further ones (seeds) come last: they take twice as long as it.
"""

import importlib.util
import json
import os
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import common
import gpu_hazards
import numpy as np
import record_space

import tvmlab
from tvmlab import Ansor, Droplet, Study, Timed, TransferTuning, frames
from tvmlab.core import RunError
from tvmlab.experiment import Measure
from tvmlab.measure.local import LocalMeasurer
from tvmlab.measure.subjects import profiled
from tvmlab.models import load_model
from tvmlab.run import begin
from tvmlab.spaces.sketch import SketchSpace
from tvmlab.strategies import template_space
from tvmlab.study_folder import StudyFolder
from tvmlab.tasks import extract

# Tuning time in seconds: the goal is to be done within ten minutes each.
MODELS = {"resnet50": 240.0, "googlenet": 180.0, "alexnet": 120.0}
_REHEARSAL_S = 20.0  # six are over before the first template trial where another test has the cores
_STARTS_S = 45.0  # a run's search process and workers
# Beside tvmlab, in turns with it: groups, so that one which cannot be timed does not take the others with it.
_BASELINES = (("untuned", "torch", "torch-tf32"), ("torch-compile",), ("torch-compile-tf32",))
_LOAD_S = 120.0  # tvmlab's model, in one NVRTC program, its untuned one, onnxruntime's and torch's, one at a time
_COMPILE_S = 300.0  # torch's max-autotune beside tvmlab and onnxruntime, about
_LAUNCH_US = 5.0  # a kernel of ours below this is launched by itself as fast as launches go, torch's from a graph
BEGUN = ".begun.jsonl"  # of a space, what was measured so far
_MOST_POINTS = 8000  # ResNet-50's dense layer has 7920, of which half are valid


def models(session):
    """The models and their tuning times; one of two kernels in a rehearsal."""
    if not session.rehearse:
        return MODELS
    path = session.work / "tiny.onnx"
    if not path.exists():
        rng = np.random.default_rng(0)
        nodes = [
            common.helper.make_node("Conv", ["x", "w"], ["c"], pads=[1] * 4),
            common.helper.make_node("Relu", ["c"], ["r"]),
            common.helper.make_node("MaxPool", ["r"], ["y"], kernel_shape=[2, 2], strides=[2, 2]),
        ]
        weight = rng.standard_normal((32, 16, 3, 3), dtype=np.float32)
        common.save_model(path, nodes, (1, 16, 14, 14), (1, 32, 7, 7), {"w": weight})
    return {os.path.relpath(path): _REHEARSAL_S}  # the folders of an absolute path are left out of what is packed


def smoke(session):
    """Every task: the default kernel and a candidate of each space compile, run, and give the same result.

    Then kernels that a run must survive: one that does not end, and one that writes where it may not.
    """
    for model in models(session):
        session.row({"job": "smoke", "model": Path(model).stem}, lambda model=model: _smoke(session, model), 40.0)
    session.row({"job": "smoke", "model": "hazards"}, lambda: _hazards(session), 40.0)


def _hazards(session):
    folder = session.work / "smoke-hazards"
    folder.mkdir(exist_ok=True)
    return gpu_hazards.measured(tvmlab.target(session.target), folder)


def _smoke(session, model):
    target = tvmlab.target(session.target)
    tasks = [task for task in extract(load_model(model), target) if task.info.tunable]
    folder = session.work / f"smoke-{Path(model).stem}"
    folder.mkdir(exist_ok=True)
    with LocalMeasurer(tasks, target, Measure(repeats=2, min_repeat_ms=1.0), folder) as measurer:
        defaults = list(measurer.measure_defaults([task.key for task in tasks]))
        candidates = [(task, kind, found) for task in tasks for kind, found in _candidates(task, target) if found]
        measured = list(measurer.measure([candidate for _, _, candidate in candidates]))
    rows = [(task, "default", found) for task, found in zip(tasks, defaults, strict=True)]
    rows += [(task, kind, found) for (task, kind, _), found in zip(candidates, measured, strict=True)]
    served = {task.key for task, _, _ in candidates}
    return {
        "tasks": len(tasks),
        "statuses": dict(Counter(f"{kind} {found.status}" for _, kind, found in rows)),
        "without_candidate": [task.info.name for task in tasks if task.key not in served],
        "failures": [
            {"task": task.info.name, "of": kind, "status": str(found.status), "message": found.message[-300:]}
            for task, kind, found in rows
            if found.status != "ok"
        ],
    }


def _candidates(task, target):
    """The first start of a task's template, and a random point of its sketches."""
    template = template_space(task, target)
    if template is not None:
        yield "template", next((made for index in template.starts() if (made := template.realize(index))), None)
    sketches = SketchSpace(task.key, task.module, target.to_tvm())
    rng = np.random.default_rng(0)
    drawn = (sketches.sample(number, rng) for number in range(len(sketches)))
    yield "sketch", next((candidate for candidate in drawn if candidate), None)


def main(session):
    """The first model, tuned by tvmlab.best for some minutes, then timed beside PyTorch in turns."""
    for model in list(models(session))[:1]:
        _tune(session, model)
        _compare(session, model)


def others(session):
    """The other models likewise."""
    for model in list(models(session))[1:]:
        _tune(session, model)
        _compare(session, model)


def _folder(session, model):
    return session.runs / f"{Path(model).stem}-best"


def _is_tuned(folder):
    """Whether its run is done: what is measured of half a run would stand for the whole of it."""
    return (folder / "experiment.json").exists() and tvmlab.attach(folder).status == "done"


def _of_run(folder, model):
    """What a row says of the run that it is about: a row whose folder did not come back is of another tuning."""
    return {"model": Path(model).stem, "folder": folder.name}


def _tune(session, model):
    limit_s = models(session)[model]
    what = {"job": "tune", "model": Path(model).stem}
    session.row(what, lambda: _carried_out(session, model, limit_s), _STARTS_S + min(60.0, limit_s))


def _carried_out(session, model, limit_s):
    """The run of `best`, begun or gone on with. Raises RunError if it could not end: the next session goes on."""
    folder = _folder(session, model)
    if folder.exists():
        run = tvmlab.resume(folder)
    else:
        asked = tvmlab.best(model, session.target, time_limit_s=limit_s)
        run = begin(asked, session.runs, folder.name)
    run.wait(session.left_s - 5.0)
    session.keep()  # ends it if it still goes on; and a row must not be without its run
    if run.status != "done":
        raise RunError(f"run {run.id} was {run.status} after {run.progress.trials} trials", remedy="--resume goes on")
    return {"folder": folder.name, **about(run)}


def about(run):
    """What a run measured, and how busy its device was.

    `gpu_busy` is the share of time in which a kernel ran, as NVML tells (None on a CPU); `measuring` that in which the
    device's process had a candidate: loading, copies and checks are in it.
    """
    state, trials = run.folder.state, list(run.folder.trials())
    batches = run.folder.batches()
    best = {}
    for trial in trials:
        if trial.ok and (trial.task_key not in best or trial.latency_s < best[trial.task_key].latency_s):
            best[trial.task_key] = trial
    return {
        "status": state.status,
        "trials": state.trials,
        "elapsed_s": state.elapsed_s,
        "trials_per_s": state.trials / state.elapsed_s,
        "gpu_busy": _busy(batches),
        "measuring": state.phases["run_s"] / state.elapsed_s,
        "phases": state.phases,
        "estimate_ms": state.estimate_s and state.estimate_s * 1e3,
        "untuned_ms": state.untuned_s and state.untuned_s * 1e3,
        "statuses": dict(Counter(str(trial.status) for trial in trials)),
        "best_by": dict(Counter(trial.strategy for trial in best.values())),
        "batches": len(batches),
        "throttled_batches": sum(bool(row["throttled"]) for row in batches),
        "message": state.message,
    }


def _busy(batches):
    """The share of time in which a GPU was busy over all batches whose driver told; None if there are none."""
    told = [(row["busy"], row["seconds"]) for row in batches if row.get("busy") is not None]
    seconds = sum(each for _, each in told)
    return sum(busy * each for busy, each in told) / seconds if seconds else None


def _compare(session, model):
    folder = _folder(session, model)
    for baselines in _BASELINES:
        if session.rehearse and importlib.util.find_spec("torch") is None:
            baselines = tuple(name for name in baselines if not name.startswith("torch"))
        if baselines and _is_tuned(folder):
            what = {"job": "compare", "baselines": ", ".join(baselines), **_of_run(folder, model)}
            least_s = _COMPILE_S if "compile" in baselines[0] else _LOAD_S
            least_s = 30.0 if session.rehearse else least_s
            session.row(what, lambda names=baselines: _compared(session, folder, names), least_s)


def _compared(session, folder, baselines):
    """The end-to-end comparison. tvmlab's kernels and "torch" compute in float32, "-tf32" may round factors to TF32."""
    path = folder / "compare.json"  # of the last call only
    before = json.loads(path.read_text()) if path.exists() else None
    found = tvmlab.compare(folder, baselines, repeats=6 if session.rehearse else 30)
    print(found, flush=True)
    if before is not None:
        path.write_text(json.dumps(_joined(before, json.loads(path.read_text()))))
    return asdict(found)


def _joined(before, now):
    """compare.json of two calls: a baseline's ratio is of its own turns with tvmlab, whose samples are of the first."""
    baselines = {**before["numerics"]["baselines"], **now["numerics"]["baselines"]}
    return {
        **before,
        "subjects": {**before["subjects"], **now["subjects"], "tvmlab": before["subjects"]["tvmlab"]},
        "ratios": list({row["baseline"]: row for row in before["ratios"] + now["ratios"]}.values()),
        "numerics": {**before["numerics"], "baselines": baselines},
        "notes": list(dict.fromkeys(before["notes"] + now["notes"])),
    }


def layers(session):
    """Each convolution: tvmlab's best kernel beside cuDNN's best algorithm, TF32 off and on."""
    if session.rehearse and importlib.util.find_spec("torch") is None:
        return
    for model in models(session):
        folder = _folder(session, model)
        for runtime in ("torch", "torch-tf32"):
            if _is_tuned(folder):
                what = {"job": "layers", "runtime": runtime, **_of_run(folder, model)}
                session.row(what, lambda f=folder, r=runtime: {"layers": _layers(f, r)}, 30.0)


def _layers(folder, runtime):
    """By shape of data, weights and result: microseconds of our kernel (its epilogue included) and of torch's.

    torch's are of a CUDA graph of 20, ours of launches one by one: where `launch_bound`, ours is the time of a launch.
    """
    run = tvmlab.RunFolder.open(folder)
    theirs = {}
    for node in profiled(run, runtime, 15, None)["nodes"]:
        if node["operator"] == "Conv":
            shapes = [*node["inputs"][:2], node["output"]]
            theirs.setdefault(" ".join("x".join(map(str, shape)) for shape in shapes), node["latency_s"] * 1e6)
    tasks = frames.tasks(run)
    rows = []
    for shapes, kind, ours in zip(tasks["shapes"], tasks["kernel_class"], tasks["best_us"], strict=True):
        data, *others = shapes.split()
        key = " ".join([data, *others[:1], *others[-1:]])
        if "conv2d" in kind and key in theirs:
            times = {"ours_us": ours, "theirs_us": theirs[key], "launch_bound": bool(ours < _LAUNCH_US)}
            rows.append({"shapes": key, "kernel_class": kind, **times})
    return rows


def throughput(session):
    """Seconds a trial, tvmlab over upstream's tune_tir with its default builder and runner."""
    trials = 4 if session.rehearse else 64
    folder = session.work / "throughput"
    folder.mkdir(exist_ok=True)
    model = next(iter(models(session))) if session.rehearse else common.conv_model(folder)
    for seed in range(1 if session.rehearse else 2):
        what = {"job": "throughput", "trials": trials, "seed": seed}
        session.row(what, lambda seed=seed: _throughput(session, model, trials, seed, folder), 60.0)


def _throughput(session, model, trials, seed, folder):
    theirs = folder / f"upstream-{seed}-{time.time():.0f}"
    upstream_s = common.tune_upstream("tir", model, trials, seed, theirs, session.target)
    records, valid = counted((theirs / "database_tuning_record.json").read_text().splitlines())
    run, ours_s = common.tune_tvmlab(model, trials, seed, folder / "runs", session.target)
    ours = about(run)
    ours_valid, seconds = ours["statuses"].get("ok", 0), upstream_s / ours["elapsed_s"]
    return {
        "upstream_s": upstream_s,
        "upstream_trials": records,
        "upstream_valid": valid,
        "tvmlab_s": ours["elapsed_s"],
        "tvmlab_with_start_s": ours_s,
        "tvmlab_valid": ours_valid,
        "times_as_many": records and ours["trials"] / records * seconds,
        "times_as_many_valid": valid and ours_valid / valid * seconds,  # 0 if upstream measured nothing
        **{name: ours[name] for name in ("trials", "trials_per_s", "gpu_busy", "measuring", "phases", "statuses")},
    }


def counted(lines):
    """How many records a database of upstream's has, and of how many the candidate was built and ran.

    Upstream writes 1e10 seconds for a failure.
    """
    seconds = [json.loads(line)[1][1] for line in lines]
    return len(seconds), sum(bool(found) and max(found) < 1e9 for found in seconds)


def report(session):
    """The report's experiment with small budgets and one seed: transfers to other models, with and without Droplet."""
    session.row({"job": "report", "seed": 0}, lambda: _studied(session, 0), 60.0)


def seeds(session):
    """The report's experiment with further seeds, once the first is whole."""
    if any(row["job"] == "report" for row in session.rows):
        for seed in (1,) if session.rehearse else (1, 2):
            session.row({"job": "seeds", "seed": seed}, lambda seed=seed: _studied(session, seed), 60.0)


def _studied(session, seed):
    path = session.runs / "report"
    if StudyFolder.is_study(path):
        _add_seed(path, seed)
        done = tvmlab.study(path, progress=False)
    else:
        done = tvmlab.study(path, _design(session, seed), progress=False)
    if done.problems:
        raise RunError("; ".join(done.problems)[:1500], remedy="--resume tries again")
    session.keep()
    return {"folder": path.name, "runs": len(list(path.rglob("experiment.json")))}


def _add_seed(path, seed):
    """Have the study in a folder take a seed more: it is carried out seed by seed, so what was done stays."""
    about = json.loads((path / "study.json").read_text())
    about["study"]["seeds"] = sorted({*about["study"]["seeds"], seed})
    scratch = path / ".study.json"
    scratch.write_text(json.dumps(about))
    scratch.replace(path / "study.json")


def _design(session, seed):
    """All models, but one source: each whole model that is timed in turns is loaded first, most of the time."""
    ansor, droplet = (4.0, 2.0) if session.rehearse else (20.0, 8.0)
    names = tuple(models(session))
    searched, descended = Timed(step=Ansor(), time_limit_s=ansor), Timed(step=Droplet(), time_limit_s=droplet)
    moved = Timed(step=TransferTuning(source=("$source:ansor",)), time_limit_s=droplet)
    arms = {"ansor": (searched,), "ansor+droplet": (searched, descended)}
    arms["ansor, longer"] = (searched, Timed(step=Ansor(), time_limit_s=droplet))
    if len(names) > 1:
        arms |= {"transfer": (moved,), "transfer+droplet": (moved, descended)}
    repeats = 6 if session.rehearse else 15
    return Study(models=names, sources=names[:1], arms=arms, seeds=(seed,), repeats=repeats, target=session.target)


def space(session):
    """Every point of the smallest template space of the first model, for replay without the card."""
    model = next(iter(models(session)))
    session.row({"job": "space", "model": Path(model).stem}, lambda: _space(session, model), 40.0)


def _space(session, model):
    target = tvmlab.target(session.target)
    found = [(space, task) for task in extract(load_model(model), target) if (space := template_space(task, target))]
    if not found:
        return {"points": 0, "measured": 0}
    points, task = min(found, key=lambda pair: len(pair[0]))
    if len(points) > _MOST_POINTS:
        return {"task": task.info.name, "points": len(points), "measured": 0}
    said = {"operator": task.info.name, "model": Path(model).stem, "batch": 1, "device": target.label}
    path = session.out / f"space_{Path(model).stem}.json"
    found = record_space.write(task, target, said, path, path.with_suffix(BEGUN))
    said = ("not valid" if item is None else item if isinstance(item, str) else "ok" for item in found["table"])
    return {"task": task.info.name, "points": len(points), "statuses": dict(Counter(said))}


JOBS = {job.__name__: job for job in (smoke, main, report, others, layers, throughput, space, seeds)}
