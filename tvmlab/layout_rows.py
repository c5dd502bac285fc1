"""assignment.json as rows of frames: what each convolution has, what else it could have had, what transforms cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import nan
from typing import Any

from tvmlab.records import RunFolder

__all__ = ["LAYOUT_COLUMNS", "TRANSFORM_COLUMNS", "site_rows", "summary_of", "transform_rows"]

LAYOUT_COLUMNS = (
    "run", "site", "about", "packing", "chosen", "best_us", "decided_us", "instead_us", "why_not", "task_key",
)  # fmt: skip
TRANSFORM_COLUMNS = ("run", "tensor", "shape", "source", "target", "cost_us")


def site_rows(folder: RunFolder, best_us: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    """One row a site and packing; `best_us` is the least latency of each task in the run's trials."""
    for site in (folder.layouts or {"sites": []})["sites"]:
        own = {"packing": site["packing"], "why_not": "", "task_key": site["task_key"], "cost_s": None}
        known = {row["packing"]: row for row in site["alternatives"]}
        for packing, row in ({site["packing"]: own} | known).items():
            chosen = packing == site["packing"]
            key = site["task_key"] if chosen else row["task_key"]
            yield {
                "run": folder.id,
                "site": site["site"],
                "about": site["about"],
                "packing": packing,
                "chosen": chosen,
                "best_us": best_us.get(key, nan),
                "decided_us": _us(row["cost_s"]),
                "instead_us": _us(row.get("instead_s")),
                "why_not": row["why_not"],
                "task_key": key,
            }


def transform_rows(folder: RunFolder) -> Iterator[dict[str, Any]]:
    """One row a layout transform that the model makes."""
    for row in (folder.layouts or {}).get("transforms", []):
        shape = "x".join(map(str, row["shape"]))
        yield {"run": folder.id, **row, "shape": shape, "cost_us": _us(row["cost_s"])}


def summary_of(folder: RunFolder) -> dict[str, Any]:
    """What the choice cost when it was made, beside the best uniform one; empty if none was made by measuring."""
    found = folder.layouts or {}
    if "cost_s" not in found:
        return {}
    uniform = {name: _us(cost) for name, cost in found["uniform"].items()}
    best = min(uniform, key=lambda name: uniform[name], default="")
    cost_us = _us(found["cost_s"])
    gain = 1 - cost_us / uniform[best] if best else nan
    return {"cost_us": cost_us, "uniform_us": uniform, "best_uniform": best, "gain": gain}


def _us(seconds: float | None) -> float:
    return nan if seconds is None else seconds * 1e6
