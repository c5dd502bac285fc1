"""What a study's timings allow to be said of two arms: a test, an interval and a sentence for each claim.

The unit of a claim is a seed: everything random in a search is drawn anew with it, so runs of several seeds are
independent repetitions, while timed repeats of one compiled model only say how well that one is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from tvmlab.comparison_rows import in_shared_turns
from tvmlab.core import InputError
from tvmlab.stats import (
    enough_pairs,
    enough_turns,
    fewest_pairs,
    fewest_samples,
    holm,
    paired_ratio,
    resampled_ratio,
    turn_ratio,
)
from tvmlab.study_design import BASELINES
from tvmlab.study_folder import StudyFolder

__all__ = ["arm_pairs", "compare_arms", "repeats_needed", "study_claims"]

_COLUMNS = (
    "a", "b", "model", "source", "seeds", "ratio", "low", "high", "p_value", "p_holm", "timed_low", "timed_high",
    "seeds_needed", "sentence",
)  # fmt: skip


def compare_arms(study: Any, a: str, b: str, *, margin: float = 0.03, confidence: float = 0.95) -> pd.DataFrame:
    """Whether arm `a` gives faster models than arm `b`, cell by cell and over all: one row a claim, as `study_claims`.

    An arm may also be "untuned" or "onnxruntime".
    """
    return study_claims(study, [(a, b)], margin=margin, confidence=confidence)


def study_claims(
    study: Any,
    pairs: Sequence[tuple[str, str]] | None = None,
    *,
    margin: float = 0.03,
    confidence: float = 0.95,
) -> pd.DataFrame:
    """One row for each pair of arms, model and source; where there are several cells, one over "all" of them.

    Columns: a, b, model, source, seeds (independent pairs that were timed; over all cells: of model and seed), ratio
    (geometric mean over them of a's end-to-end latency over b's, each the median of their turns' ratios: below 1 a is
    faster), low, high and p_value (stats.paired_ratio: changes of sign over the seeds; no interval with too few),
    p_holm (corrected over the cells of the pair of arms; "all" is one claim of its own), timed_low and timed_high
    (interval from the timed repeats alone, of these very compiled models; NaN if one was timed fewer than 6 times),
    seeds_needed (to show a difference of `margin` with power 0.8; NaN from one seed, which has no spread), sentence.

    An arm with a source is paired with the other's same source, or with its only run of the model and seed if that has
    none. Without `pairs` these are `arm_pairs`. Raises InputError for an arm that the study does not have.
    """
    folder = StudyFolder.open(study)
    pairs = arm_pairs(folder) if pairs is None else list(pairs)
    known = (*folder.definition.arms, *BASELINES)
    for name in {name for pair in pairs for name in pair}:
        if name not in known:
            raise InputError(f"the study has no arm {name!r}", remedy=f"it has {', '.join(known)}")
    samples = folder.samples()
    rows = [row for a, b in pairs for row in _compared(samples, a, b, margin, confidence)]
    return pd.DataFrame(rows, columns=_COLUMNS)


def arm_pairs(study: Any) -> list[tuple[str, str]]:
    """The pairs of arms that a study is about: each with the one it branches from and with those that branch from the
    same, or from nothing as it does; and the first arm with onnxruntime."""
    folder = StudyFolder.open(study)
    arms = list(folder.definition.arms)
    names = {cell.name: cell.arm for cell in folder.plan}
    parents = {cell.arm: names[cell.parent] if cell.parent else "" for cell in folder.plan}
    found = []
    for number, arm in enumerate(arms):
        found += [(arm, parents[arm])] if parents[arm] else []
        found += [(arm, other) for other in arms[:number] if parents[other] == parents[arm]]
    return [*found, (arms[0], "onnxruntime")]


def repeats_needed(study: Any, relative_width: float = 0.02, confidence: float = 0.95) -> pd.DataFrame:
    """How many turns give each arm's ratio to the first arm an interval of `relative_width` (0.02: about +-1 %).

    Columns: model, source, arm (onnxruntime too), seed, repeats (turns that both took), needed (stats.enough_turns;
    <NA> with fewer than 6 taken), enough. It is of ratios turn by turn, as the claims are.
    """
    folder = StudyFolder.open(study)
    samples, (first, *others) = folder.samples(), folder.definition.arms
    rows = []
    for arm in (*others, "onnxruntime"):
        for (model, source), seeds in _cells(samples, arm, first).items():
            for seed, pair in seeds.items():
                count = min(map(len, pair))
                needed = (
                    enough_turns(*pair, relative_width, confidence) if count >= fewest_samples(confidence) else None
                )
                row = {"model": model, "source": source, "arm": arm, "seed": seed, "repeats": count, "needed": needed}
                rows.append({**row, "enough": needed is not None and needed <= count})
    found = pd.DataFrame(rows, columns=["model", "source", "arm", "seed", "repeats", "needed", "enough"])
    return found.astype({"needed": "Int64", "enough": bool})


_Pair = tuple[list[float], list[float]]  # the samples of two arms of the same model, source and seed


def _compared(samples: pd.DataFrame, a: str, b: str, margin: float, confidence: float) -> list[dict[str, Any]]:
    """The claims of two arms: the cells, corrected together, then all of them as one."""
    cells = _cells(samples, a, b)
    rows = [_row(a, b, *cell, [[pair] for pair in seeds.values()], confidence) for cell, seeds in cells.items()]
    p_values = holm([row["p_value"] for row in rows]).tolist()
    if len(cells) > 1:
        # Cells of one model and seed share runs: they count once, with the mean of their ratios.
        blocks: dict[tuple[str, int], list[_Pair]] = {}
        for (model, _), seeds in cells.items():
            for seed, pair in seeds.items():
                blocks.setdefault((model, seed), []).append(pair)
        rows.append(_row(a, b, "all", "", list(blocks.values()), confidence))
        p_values.append(rows[-1]["p_value"])
    for row, p_value in zip(rows, p_values, strict=True):
        count = 1 if row["model"] == "all" else len(cells)
        row["p_holm"] = p_value
        row["seeds_needed"] = _needed(row.pop("ratios"), margin, confidence, count)
        row["sentence"] = _sentence(row, margin, confidence, count)
    return rows


def _cells(samples: pd.DataFrame, a: str, b: str) -> dict[tuple[str, str], dict[int, _Pair]]:
    """For each model and source the samples of both arms, by seed, where both were timed."""
    first, second = _by_cell(samples, a), _by_cell(samples, b)
    found: dict[tuple[str, str], dict[int, _Pair]] = {}
    for model, source, seed in dict.fromkeys((*first, *second)):
        ours, theirs = _taken(first, model, source, seed), _taken(second, model, source, seed)
        if ours is not None and theirs is not None:
            found.setdefault((model, source), {})[seed] = in_shared_turns(ours, theirs)
    return found


_Cell = tuple[str, str, int]  # model, source, seed
_Subject = dict[str, list[Any]]  # samples_ms, and turns where they are known


def _by_cell(samples: pd.DataFrame, arm: str) -> dict[_Cell, _Subject]:
    """Latencies of an arm's inferences in ms, and their turns."""
    found: dict[_Cell, _Subject] = {}
    rows = samples.loc[samples["arm"] == arm, ["model", "source", "seed", "turn", "latency_ms"]]
    for model, source, seed, turn, latency_ms in rows.itertuples(index=False):
        subject = found.setdefault((model, source, seed), {"samples_ms": []})
        subject["samples_ms"].append(latency_ms)
        if turn is not pd.NA:
            subject.setdefault("turns", []).append(turn)
    return found


def _taken(taken: dict[_Cell, _Subject], model: str, source: str, seed: int) -> _Subject | None:
    return taken.get((model, source, seed), taken.get((model, "", seed)))


def _row(a: str, b: str, model: str, source: str, blocks: list[list[_Pair]], confidence: float) -> dict[str, Any]:
    """One claim: `blocks` are its independent pairs, each of one cell or several."""
    logs = [np.mean([math.log(turn_ratio(ours, theirs)) for ours, theirs in block]) for block in blocks]
    ratios = np.exp(logs)
    tested = paired_ratio(ratios, np.ones(len(ratios)), confidence)
    shares = [1 / (len(blocks) * len(block)) for block in blocks for _ in block]  # as in `ratio`
    _, low, high = resampled_ratio([pair for block in blocks for pair in block], confidence, weights=shares)
    return {
        "a": a, "b": b, "model": model, "source": source, "seeds": len(ratios), "ratio": tested.ratio,
        "low": tested.low, "high": tested.high, "p_value": tested.p_value, "timed_low": low, "timed_high": high,
        "ratios": ratios,
    }  # fmt: skip


def _needed(ratios: np.ndarray, margin: float, confidence: float, count: int) -> float:
    return math.nan if len(ratios) < 2 else enough_pairs(ratios, margin, confidence, comparisons=count)


def _sentence(row: dict[str, Any], margin: float, confidence: float, count: int) -> str:
    """What can be concluded, and what cannot."""
    units = "pairs of model and seed" if row["model"] == "all" else "seeds"
    taken, over = _count(row["seeds"], units), f" over {count} cells" if count > 1 else ""
    measured = f"{row['a']} against {row['b']}, {_where(row)}: {row['ratio']:.3g} times its latency, {taken}"
    interval = f"{confidence:.0%} interval {row['low']:.3g} to {row['high']:.3g}"
    tested = f"p = {row['p_holm']:.2g} by changes of sign" + (f", Holm{over}" if count > 1 else "")
    if row["p_holm"] <= 1 - confidence:
        return f"{measured} ({interval}; {tested}): it is {'faster' if row['ratio'] < 1 else 'slower'}."
    least = fewest_pairs(confidence, count)
    if math.isnan(row["low"]) or (row["seeds"] < least and not row["low"] <= 1 <= row["high"]):
        known = f"{row['timed_low']:.3g} to {row['timed_high']:.3g} for these very models, by their timed repeats"
        return (
            f"{measured} ({'too few timed repeats for an interval' if math.isnan(row['timed_low']) else known}). "
            f"Nothing can be said of other seeds: {taken} cannot show a difference at {confidence:.0%}"
            f"{over}, however large; at least {least} are needed."
        )
    largest = 100 * max(row["high"] - 1, 1 - row["low"])
    # The interval is not corrected over the cells, as the p-value is.
    alone = ", this cell by itself" if count > 1 else ""
    bound = f"no difference larger than {largest:.2g} % at {confidence:.0%}{alone}"
    if largest <= 100 * margin:
        return f"{measured} ({interval}): {bound}, so none that matters ({100 * margin:g} %)."
    return (
        f"{measured} ({interval}; {tested}): no difference is shown; {bound}. To show one of {100 * margin:g} %, about "
        f"{_count(int(row['seeds_needed']), units)} would be needed."
    )


def _where(row: dict[str, Any]) -> str:
    if row["model"] == "all":
        return "over all models"
    return row["model"] + (f" from {row['source']}" if row["source"] else "")


def _count(number: int, units: str) -> str:
    words = units.split(" ", 1)
    word = words[0] if number != 1 else words[0].removesuffix("s")
    return " ".join([str(number), word, *words[1:]])
