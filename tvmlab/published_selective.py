"""Selective tuning's published table (TVM issue 4188), and our own rows beside it; both are in data/selective.

Rows of ours are of one experiment where both searches, the time limit and the machine are the same.
Nothing here needs TVM.
"""

from __future__ import annotations

import json
from typing import Any

import pandas as pd

from tvmlab.datafiles import data_dir

__all__ = ["MODELS", "beside", "experiments", "findings", "our_findings", "ours", "rfc", "source"]

# The RFC's models, and what stands for them in the zoo.
MODELS = {
    "MobileNet V2 1.0": "mobilenet_v2",
    "ResNet 50 V1": "resnet50",
    "VGG 19 BN": "vgg19_bn",
    "SqueezeNet 1.1": "squeezenet",
    "DenseNet 121": "densenet121",
    "Yolo3 MobileNet1.0 voc": "yolo3_mobilenet_backbone",
    "SSD512 ResNet50 V1 voc": "ssd512_resnet50_backbone",
}
_OURS = ("model", "seed", "experiment", "tasks", "representatives", "poor", "full_s", "selective_s", "time",
         "full_trials", "selective_trials", "full_ms", "selective_ms", "onnxruntime_ms", "performance",
         "performance_low", "performance_high", "steps", "time_limit_s", "machine", "versions")  # fmt: skip
_EXPERIMENT = ["steps", "time_limit_s", "machine"]
_PACKAGES = {"tvmlab": "tvmlab", "apache-tvm": "TVM", "onnxruntime": "onnxruntime"}  # what of a row's versions is shown


def rfc() -> pd.DataFrame:
    """The RFC's table: one row a model, as it stands there, and `time` and `performance` computed from it.

    Columns: model (the RFC's name), zoo (ours), full_minutes, full_ms, selective_minutes, selective_ms,
    stated_time_percent, stated_performance_percent; time (selective over full tuning time), performance (full over
    selective latency, above 1 where selective tuning is faster).

    >>> rfc().set_index("zoo").loc["resnet50", ["full_ms", "selective_ms"]].to_dict()
    {'full_ms': 2.69, 'selective_ms': 3.7}
    """
    found = pd.read_csv(data_dir("selective") / "rfc4188.csv")
    found.insert(1, "zoo", found["model"].map(MODELS))
    found["time"] = found["selective_minutes"] / found["full_minutes"]
    found["performance"] = found["full_ms"] / found["selective_ms"]
    return found


def findings() -> str:
    """What the RFC's table shows, computed from it.

    >>> findings().partition(". ")[0]
    'Mean performance 113 % in 28 % of the time, as stated'
    """
    table = rfc()
    performance, time = 100 * table["performance"], 100 * table["time"]
    stated = table["stated_performance_percent"].mean(), table["stated_time_percent"].mean()
    agree = abs(performance.mean() - stated[0]) < 0.5 and abs(time.mean() - stated[1]) < 0.5
    others = performance[~table["zoo"].str.contains("backbone")]
    return (
        f"Mean performance {performance.mean():.0f} % in {time.mean():.0f} % of the time, {'' if agree else 'not '}as "
        f"stated. The median performance is {performance.median():.0f} %: {(performance < 100).sum()} of {len(table)} "
        f"models are slower than with full tuning, the worst at {performance.min():.0f} %; without the two detectors "
        f"the mean is {others.mean():.0f} %."
    )


def ours() -> pd.DataFrame:
    """Our rows, one a model and seed; none before any were measured.

    Columns as in data/selective/README.md, but steps (the full and the selective search), machine and versions are one
    text each, and experiment numbers the rows' experiments from 1, in the order in which the file has them.
    """
    path = data_dir("selective") / "rows.jsonl"
    rows = [_readable(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
    found = pd.DataFrame(rows, columns=[name for name in _OURS if name != "experiment"])
    number = found.groupby(_EXPERIMENT, sort=False, dropna=False).ngroup() + 1
    return found.assign(experiment=number.astype(int))[list(_OURS)]


def _readable(row: dict[str, Any]) -> dict[str, Any]:
    """A row with its steps, machine and versions as texts; rows of before `device` was written name no processor."""
    machine, versions = row.get("machine", {}), row.get("versions", {})
    unnamed = f"{machine.get('cores', '?')} cores of an unnamed processor, {machine.get('system', 'unnamed system')}"
    shown = ", ".join(f"{name} {versions[package]}" for package, name in _PACKAGES.items() if versions.get(package))
    steps = " / ".join(row.get("steps", ()))
    return {**row, "steps": steps, "machine": row.get("device") or unnamed, "versions": shown}


def experiments() -> pd.DataFrame:
    """The experiments that our rows are of, one row each; index: its number, as in `ours()`.

    Columns: steps, time_limit_s, machine, versions (all that its rows have), models, seeds and rows (how many).
    """
    groups = ours().groupby("experiment")
    found = groups[_EXPERIMENT].agg("first")
    found["versions"] = groups["versions"].agg(lambda texts: " or ".join(dict.fromkeys(texts)))
    counts = groups.agg(models=("model", "nunique"), seeds=("seed", "nunique"), rows=("seed", "size"))
    return found.join(counts)


def source() -> str:
    """Where our rows come from, in one line: what was searched, on what, with which versions.

    >>> source().partition(":")[0] in ("ours", "experiment 1")
    True
    """
    found = experiments()
    said = [f"{row.steps}; {_limit(row.time_limit_s)}{row.machine}; {row.versions}" for row in found.itertuples()]
    if len(said) == 1:
        return f"ours: {said[0]}"
    return (
        ". ".join(f"experiment {number}: {text}" for number, text in zip(found.index, said, strict=True))
        or "ours: none"
    )


def _limit(time_limit_s: Any) -> str:
    return "" if pd.isna(time_limit_s) else f"at most {time_limit_s:g} s each; "


def beside() -> pd.DataFrame:
    """The two ratios of the RFC and ours, one row a model of the RFC and experiment that has it; NaN where none has.

    Columns: model, zoo, rfc_time, rfc_performance, experiment (its number; <NA>: not measured), time, performance
    (ours: medians over the seeds), seeds, steps, machine.
    """
    mine = (
        ours()
        .groupby(["model", "experiment"], as_index=False)
        .agg(time=("time", "median"), performance=("performance", "median"), seeds=("seed", "nunique"))
        .merge(experiments()[["steps", "machine"]], left_on="experiment", right_index=True)
        .rename(columns={"model": "zoo"})
    )
    published = rfc()[["model", "zoo", "time", "performance"]]
    published = published.rename(columns={"time": "rfc_time", "performance": "rfc_performance"})
    found = published.merge(mine, on="zoo", how="left")
    found = found.astype({"experiment": "Int64", "time": float, "performance": float})
    return found.assign(seeds=found["seeds"].fillna(0).astype(int)).fillna({"steps": "", "machine": ""})


def our_findings() -> list[str]:
    """What our rows show, computed from them: a text for each experiment, or one that there is none yet."""
    table = beside().dropna(subset="time")
    said = []
    for number, part in table.groupby("experiment"):
        mean = part[["performance", "time", "rfc_performance", "rfc_time"]].mean()
        least, most = int(part["seeds"].min()), int(part["seeds"].max())
        seeds = f"{least} seed{'s' * (least > 1)} each" if least == most else f"{least} to {most} seeds each"
        said.append(
            f"Experiment {number}, {part['machine'].iloc[0]}: {len(part)} of {len(MODELS)} models, {seeds}. Selective "
            f"tuning reaches {mean['performance']:.0%} of full tuning's performance in {mean['time']:.0%} of its time "
            f"(means of the models' medians; the RFC has {mean['rfc_performance']:.0%} in {mean['rfc_time']:.0%} for "
            f"these)."
        )
    missing = "python benchmarks/selective.py --rows data/selective/rows.jsonl adds a row a model and seed"
    return said or [f"None of these models is measured here yet: {missing}."]
