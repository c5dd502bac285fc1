"""Where the time of a tuned model goes: every kernel in the running model, beside its tuned record and by itself."""

from __future__ import annotations

from statistics import median
from typing import Any

import pandas as pd

from tvmlab import frames
from tvmlab.measure.subjects import profiled, recorded_target, thread_count
from tvmlab.records import RunFolder
from tvmlab.run import Run

__all__ = ["causes", "is_transform", "profile", "profile_frame"]

OUTSIDE = "outside kernels"
_FILE = "profile.json"


def profile(run: Run | RunFolder | str, *, repeats: int = 15, threads: int | None = None) -> pd.DataFrame:
    """Time every kernel of the run's compiled model while the model runs, and by itself; one row a kernel.

    In a fresh process with `threads` threads (default: the target's cores), medians of `repeats` inferences. Rows are
    sorted by `difference_us`, the largest first; the last row is what is left of an inference: allocation, calls,
    waiting. Columns, latencies in microseconds:

    - kind: kernel, transform (a change of layout), or outside
    - kernel_class, shapes (arguments, outputs last), calls (in one inference)
    - in_model_us: one call in the running model; share: all its calls, of the inference (0 to 1)
    - tuned_us: the least latency in the run's records, which the search chose by; NaN where there is none
    - difference_us: calls x (in_model_us - tuned_us), what an inference pays beyond the records
    - hot_us: the same kernel on the same arguments over and over, warm caches; cold_us: with its weights flushed from
      all caches before each call; one_thread_us: hot, on one thread. Measured at its first call; NaN if it cannot be

    `frame.attrs` holds run, threads, end_to_end_ms (without instruments), instrumented_ms, and overhead_ms: what
    instruments cost an inference. Their cost inside a kernel's time is measured and subtracted. The result is kept in
    the run folder as profile.json; of `from tvmlab.profile import causes, profile_frame` the second reads it, the first
    sums it up. `plots.profile_bars` draws it.

    Raises InputError for fewer than 3 repeats, RunError if the run has no target yet or its model cannot be run.
    """
    folder = run.folder if isinstance(run, Run) else RunFolder.open(run)
    measured = profiled(folder, "tvmlab", repeats, threads, alone=True)
    folder.write_json(_FILE, {"threads": threads or thread_count(recorded_target(folder)), **measured})
    return profile_frame(folder)


def profile_frame(run: Any) -> pd.DataFrame:
    """The last profile of a run, from its folder; columns as of `profile`. Raises RecordError if it has none."""
    (folder,) = frames.folders(run)
    measured = folder.read_json(_FILE)
    known: Any = frames.tasks(folder).set_index("task_key")["best_us"] if folder.tasks else {}
    whole_us = median(measured["whole_s"]) * 1e6
    rows = pd.DataFrame([_row(kernel, known) for kernel in measured["kernels"]]).set_index("operator")
    rows["difference_us"] = rows["calls"] * (rows["in_model_us"] - rows["tuned_us"])
    rows = rows.sort_values("difference_us", ascending=False, kind="stable")
    rest = whole_us - float((rows["calls"] * rows["in_model_us"]).sum())
    rows.loc[OUTSIDE, ["kind", "calls", "in_model_us"]] = ["outside", 1, rest]
    rows["share"] = rows["calls"] * rows["in_model_us"] / whole_us
    rows["calls"] = rows["calls"].astype(int)
    instrumented_ms = median(measured["instrumented_s"]) * 1e3
    rows.attrs = {
        "run": folder.id,
        "threads": measured["threads"],
        "end_to_end_ms": whole_us / 1e3,
        "instrumented_ms": instrumented_ms,
        "overhead_ms": instrumented_ms - whole_us / 1e3,
    }
    return rows[list(_COLUMNS)]


_COLUMNS = (
    "kind", "kernel_class", "shapes", "calls", "in_model_us", "share", "tuned_us", "difference_us", "hot_us", "cold_us",
    "one_thread_us",
)  # fmt: skip


def _row(kernel: dict[str, Any], tuned_us: Any) -> dict[str, Any]:
    alone = {f"{name}_us": kernel[f"{name}_s"] for name in ("hot", "cold", "one_thread")}
    return {
        "operator": kernel["name"],
        "kind": "transform" if is_transform(kernel["kernel_class"]) else "kernel",
        "kernel_class": kernel["kernel_class"],
        "shapes": " ".join("x".join(map(str, shape)) or "scalar" for shape in kernel["shapes"]),
        "calls": kernel["calls"],
        "in_model_us": median(kernel["in_model_s"]) * 1e6,
        "tuned_us": tuned_us.get(kernel["task_key"], float("nan")),
        **{name: float("nan") if seconds is None else seconds * 1e6 for name, seconds in alone.items()},
    }


def is_transform(kernel_class: str) -> bool:
    """Whether a kernel only moves data from one layout to another.

    >>> is_transform("layout_pack"), is_transform("conv2d+layout_pack"), is_transform("reshape+transpose+reshape")
    (True, False, True)
    """
    return all(part in ("reshape", "transpose") or part.startswith("layout_") for part in kernel_class.split("+"))


def causes(frame: pd.DataFrame) -> pd.DataFrame:
    """The usual reasons why kernels are slower in the model than in the records, from a frame of `profile`.

    One row a cause, the largest first. Columns: ms (of an inference), share (of it, 0 to 1), measured (how). They are
    not parts of one sum: a kernel may be slow for two reasons, and a kernel that waits for memory scales badly too.

    >>> frame = pd.DataFrame(
    ...     {"kind": "kernel", "calls": 2, "in_model_us": 130.0, "tuned_us": 90.0, "hot_us": 100.0, "cold_us": 120.0,
    ...      "one_thread_us": 160.0, "share": 1.0}, index=["conv"])
    >>> frame.attrs = {"threads": 2, "end_to_end_ms": 0.26}
    >>> causes(frame)["ms"].round(2).to_dict()
    {'cold weights': 0.04, 'threads': 0.04, 'records': 0.02, 'layout transforms': 0.0, 'outside kernels': 0.0}
    """
    calls, threads = frame["calls"], frame.attrs["threads"]
    in_model = calls * frame["in_model_us"]
    found = {
        "cold weights": (calls * (frame["cold_us"] - frame["hot_us"]), "weights flushed - warm; at most this"),
        "threads": (
            calls * (frame["hot_us"] - frame["one_thread_us"] / threads),
            f"warm on {threads} threads - warm on one / {threads}",
        ),
        "records": (calls * (frame["hot_us"] - frame["tuned_us"]), "warm, timed now - best record"),
        "layout transforms": (in_model[frame["kind"] == "transform"], "transposes and layout changes, in the model"),
        OUTSIDE: (in_model[frame["kind"] == "outside"], "whole inference - all kernels in the model"),
    }
    rows = {name: {"ms": float(us.sum()) / 1e3, "measured": how} for name, (us, how) in found.items()}
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("cause")
    table.insert(1, "share", table["ms"] / frame.attrs["end_to_end_ms"])
    return table.sort_values("ms", ascending=False, kind="stable")
