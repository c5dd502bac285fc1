"""The published numbers of the student report (data/report), as frames; and what they show, computed from them.

A finding is a frame and a sentence built from its numbers. Nothing here needs TVM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pandas as pd

from tvmlab.core import InputError
from tvmlab.datafiles import data_dir

__all__ = ["FINDINGS", "Finding", "cells", "findings", "table", "tables"]

_PAIR = ["target_model", "source_model"]
_ARMS = ("ansor", "ansor+droplet")


class Finding(NamedTuple):
    """What the published data show: the rows it rests on, and a sentence that says it."""

    frame: pd.DataFrame
    sentence: str


def tables() -> list[str]:
    """The names of the published tables; their columns are explained in data/report/README.md."""
    return sorted(path.name.partition(".")[0] for path in data_dir("report").glob("*.csv*"))


def table(name: str) -> pd.DataFrame:
    """One published table as it is, units in the columns' names. Raises InputError for an unknown name.

    >>> table("pact22_pairs").columns.tolist()
    ['target_model', 'source_model']
    """
    folder = data_dir("report")
    path = next((folder / f"{name}{ending}" for ending in (".csv", ".csv.gz") if (folder / f"{name}{ending}").exists()),
                None)  # fmt: skip
    if path is None:
        raise InputError(f"no published table {name!r}", remedy=f"there are {', '.join(tables())}")
    return pd.read_csv(path)


def cells() -> pd.DataFrame:
    """One row an arm, target and source model: the report's table, with what it must be held against.

    Columns: arm, model (the target), source, untuned_ms, tuned_ms (the target's own search), transferred_ms (all whole
    model), ratio (transferred over untuned, above 1 where the transfer made the model slower), search_s, tuning_s (of
    the target's own search), kernels_transferred, target_kernels, transferred_from_droplet_record.
    """
    own = table("tuning_info").rename(columns={"model": "target_model"}).drop(columns="source_file")
    found = table("transfer_pairs").merge(own, on=["run", "target_model"], how="left", validate="many_to_one")
    found["ratio"] = found["tt_ms"] / found["untuned_ms"]
    found = found.rename(
        columns={"run": "arm", "target_model": "model", "source_model": "source", "tt_ms": "transferred_ms"}
    )
    columns = ["arm", "model", "source", "untuned_ms", "tuned_ms", "transferred_ms", "ratio", "search_s", "tuning_s",
               "kernels_transferred", "target_kernels", "transferred_from_droplet_record"]  # fmt: skip
    return found[columns]


def platform() -> Finding:
    """What the records were made on, and how many kernels have TVM's packed CPU layout in their name."""
    facts = table("conditions")
    target = _fact(facts, "target")
    kernels = table("kernels").drop_duplicates(["target_model", "kernel"])["kernel"]
    convolutions = kernels[kernels.str.contains("conv2d")]
    packed = int(convolutions.str.contains("NCHWc").sum())
    kind = "an x86 CPU" if target.startswith("llvm") and "avx" in target else "another target"
    return Finding(
        facts,
        f"All records are of one target, `{target}`: {kind}; records of CUDA: {_fact(facts, 'cuda_records')}. {packed} "
        f"of {len(convolutions)} convolution kernels are named after TVM's packed CPU layout (NCHWc).",
    )


def slower_than_untuned() -> Finding:
    """Every transferred model beside the same model without any tuning."""
    found = cells()
    slower = int((found["ratio"] > 1).sum())
    return Finding(
        found,
        f"{_of(slower, len(found))} transferred models are slower than the untuned model, by factors of "
        f"{found['ratio'].min():.2f} to {found['ratio'].max():.2f}.",
    )


def own_search() -> Finding:
    """What each arm's own search of about 5,000 trials a model changed, whole model."""
    found = table("tuning_info").dropna(subset="untuned_ms", ignore_index=True).drop(columns="source_file")
    found["ratio"] = found["tuned_ms"] / found["untuned_ms"]
    low, high = found["ratio"].min(), found["ratio"].max()
    slower = int((found["ratio"] > 1).sum())
    return Finding(
        found,
        f"The full searches took {found['tuning_s'].min() / 60:.0f} to {found['tuning_s'].max() / 60:.0f} minutes a "
        f"model and left it at {low:.2f} to {high:.2f} of its untuned latency; {_of(slower, len(found))} became "
        "slower.",
    )


def independent_searches() -> Finding:
    """When each arm's Ansor records were measured, from their time stamps (UTC).

    The raw logs give resnet50's and alexnet's, the table of best records googlenet's too, whose raw logs are missing.
    """
    trials = table("trials").query("phase == 'ansor'")
    best = table("best_records").query("origin == 'ansor'")
    stamps = pd.concat([trials[["run", "model", "timestamp"]], best[["run", "model", "timestamp"]]])
    stamps["when"] = pd.to_datetime(stamps["timestamp"], unit="s", utc=True)
    found = stamps.groupby(["run", "model"])["when"].agg(["min", "max"]).reset_index()
    found.columns = pd.Index(["run", "model", "first_record", "last_record"])
    first, second = (found[found["run"] == run] for run in _ARMS)
    gap = second["first_record"].min() - first["last_record"].max()
    shared, of = _shared_latencies(trials), int((trials["run"] == _ARMS[1]).sum())
    return Finding(
        found,
        f"The arms are two searches: the first Ansor record of {_ARMS[1]} was measured {gap.total_seconds() / 60:.0f} "
        f"minutes after the last one of {_ARMS[0]}, and {shared or 'none'} of its {of:,} logged Ansor trials repeat a "
        f"record of {_ARMS[0]}. What differs between them is chance and droplet together.",
    )


def _shared_latencies(trials: pd.DataFrame) -> int:
    """How many valid trials of the second arm have model, workload, latency and time of one of the first."""
    valid = trials.dropna(subset="latency_s")
    columns = ["model", "workload_sha12", "latency_s", "timestamp"]
    first, second = (valid.loc[valid["run"] == run, columns] for run in _ARMS)
    return len(second.merge(first.drop_duplicates(), on=columns))


def one_measurement() -> Finding:
    """How often each cell of the report's table was measured."""
    found = table("transfer_pairs").groupby(["run", *_PAIR])["repeat"].nunique().rename("measurements").reset_index()
    most = int(found["measurements"].max())
    without = "so no spread is known and no test is possible" if most == 1 else "too few for an interval"
    return Finding(found, f"Each of the {len(found)} cells was measured {_times(most)}: {without}.")


def winning_pair() -> Finding:
    """How much each pair differs between the arms, and how many schedules droplet had changed in it."""
    pair = ["model", "source"]
    found = cells().pivot(index=pair, columns="arm", values="transferred_ms").reset_index()
    found.columns.name = None
    found = found.rename(columns=dict(zip(_ARMS, ("ansor_ms", "ansor_droplet_ms"), strict=True)))
    found["change"] = found["ansor_droplet_ms"] / found["ansor_ms"] - 1
    droplet = cells().query("arm == @_ARMS[1]")[[*pair, "transferred_from_droplet_record"]]
    found = found.merge(droplet, on=pair).rename(columns={"transferred_from_droplet_record": "droplet_schedules"})
    found = found.sort_values("change", ignore_index=True)
    best, worst = found.iloc[0], found.iloc[-1]
    used = int(best["droplet_schedules"])
    return Finding(
        found,
        f"The largest gain of the droplet arm is {best.model} from {best.source}, {-best.change:.1%} less time, with "
        f"{used or 'no'} schedule{'' if used == 1 else 's'} that droplet had changed. "
        f"{_of(int((found['change'] > 0).sum()), len(found))} pairs are slower in that arm, {worst.model} from "
        f"{worst.source} by {worst.change:.1%}.",
    )


def measured_kernels() -> Finding:
    """What the rows of the kernel table are: measurements, error marks or placeholders."""
    kernels = table("kernels")
    found = kernels.groupby("status")["standalone_ms"].agg(["size", "nunique", "min", "max"]).reset_index()
    found.columns = pd.Index(["status", "rows", "different_values", "least_ms", "largest_ms"])
    valid = int((kernels["status"] == "valid").sum())
    marks = found[found["status"] != "valid"]
    kinds = " and ".join(f"{row.rows} are {row.status} (the constant {row.least_ms:g})" for row in marks.itertuples())
    return Finding(
        found, f"Of {len(kernels)} rows of the kernel table {valid} are measurements, of one run each; {kinds}."
    )


def failed_trials() -> Finding:
    """How the trials of the raw logs ended, by arm and model."""
    trials = table("trials")
    trials["failed"] = trials["error_no"] != 0
    found = trials.groupby(["run", "model"])["failed"].agg(["size", "sum", "mean"]).reset_index()
    found.columns = pd.Index(["run", "model", "trials", "failed", "failed_share"])
    failed, total = int(found["failed"].sum()), int(found["trials"].sum())
    refused = int((trials["error_no"] == 1).sum())
    return Finding(
        found,
        f"{failed:,} of {total:,} logged trials failed ({failed / total:.0%}), {refused:,} of them because the "
        "schedule could not be instantiated: the search worked with the rest.",
    )


def droplet_records() -> Finding:
    """For how many workloads droplet left a record of its own, and how it was timed beside Ansor's."""
    trials = table("trials")
    found = trials[trials["phase"] != "ansor"].groupby(["model", "phase"]).size().unstack(fill_value=0).reset_index()
    found.columns.name = None
    found = found.rename(columns={"droplet": "new_record", "droplet_copy": "nothing_found"})
    facts = table("conditions")
    new, total = int(found["new_record"].sum()), int(found[["new_record", "nothing_found"]].sum().sum())
    how = {
        name: f"{_fact(facts, f'{name}_repeats')} repeats (caches flushed: {_fact(facts, f'{name}_cache_flushed')})"
        for name in ("droplet", "ansor")
    }
    return Finding(
        found,
        f"Droplet left a record of its own for {new} of the {total} workloads of {' and '.join(found['model'])}. It "
        f"was timed in {how['droplet']}, Ansor's in {how['ansor']}: the two cannot be compared.",
    )


def budget() -> Finding:
    """How many trials a model got, beside what the transfer-tuning paper uses."""
    trials = table("trials")
    searched = trials[trials["phase"] == "ansor"]
    found = searched.groupby(["run", "model"]).size().rename("trials").reset_index()
    asked = table("pact22").set_index("metric")["value"].to_dict()["ansor_full_tuning_trials"]
    found["share_of_recommended"] = found["trials"] / asked
    return Finding(
        found,
        f"A model got {found['trials'].max():,} trials, {found['share_of_recommended'].max():.0%} of the "
        f"{asked:,.0f} that the transfer-tuning paper's code uses.",
    )


FINDINGS: dict[str, Callable[[], Finding]] = {
    function.__name__: function
    for function in (
        platform, independent_searches, one_measurement, slower_than_untuned, winning_pair, own_search,
        measured_kernels, failed_trials, droplet_records, budget,
    )
}  # fmt: skip


def findings() -> pd.DataFrame:
    """All findings, one row each: name and sentence. `FINDINGS[name]()` gives one with its frame.

    >>> findings().loc["one_measurement", "sentence"]
    'Each of the 12 cells was measured once: so no spread is known and no test is possible.'
    """
    rows = {name: made().sentence for name, made in FINDINGS.items()}
    return pd.Series(rows, name="sentence").rename_axis("finding").to_frame()


def _fact(facts: pd.DataFrame, item: str) -> str:
    return str(facts.set_index("item").loc[item, "value"])


def _of(some: int, total: int) -> str:
    return f"All {total}" if some == total else f"{some or 'None'} of {total}"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
