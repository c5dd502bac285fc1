"""Selective tuning's published table (TVM issue 4188), and our own rows beside it; both are in data/selective.

Nothing here needs TVM.
"""

from __future__ import annotations

import json

import pandas as pd

from tvmlab.datafiles import data_dir

__all__ = ["MODELS", "beside", "findings", "ours", "rfc"]

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
_OURS = ("model", "seed", "tasks", "representatives", "poor", "full_s", "selective_s", "time", "full_trials",
         "selective_trials", "full_ms", "selective_ms", "onnxruntime_ms", "performance",
         "performance_low", "performance_high")  # fmt: skip


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
    """Our rows, one a model and seed, columns as in data/selective/README.md; none before any were measured."""
    path = data_dir("selective") / "rows.jsonl"
    if not path.exists():
        return pd.DataFrame(columns=list(_OURS))
    return pd.DataFrame(map(json.loads, path.read_text().splitlines()))[list(_OURS)]


def beside() -> pd.DataFrame:
    """The two ratios of the RFC and ours, one row a model of the RFC; NaN where ours was not measured.

    Columns: model, zoo, rfc_time, rfc_performance, time, performance (ours: medians over the seeds), seeds.
    """
    mine = (
        ours()
        .groupby("model")
        .agg(time=("time", "median"), performance=("performance", "median"), seeds=("seed", "nunique"))
    )
    published = rfc()[["model", "zoo", "time", "performance"]]
    published = published.rename(columns={"time": "rfc_time", "performance": "rfc_performance"})
    found = published.merge(mine, left_on="zoo", right_index=True, how="left")
    return found.astype({"time": float, "performance": float}).assign(seeds=found["seeds"].fillna(0).astype(int))
