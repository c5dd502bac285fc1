"""Why a convolution has the layout that it has: which ones were in the space, which were measured, what won.

The question of AutoTVM's users ("does it search nChw16c, and why did it not pick it?"). Nothing here needs TVM.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from tvmlab import frames
from tvmlab.core import InputError, Packing
from tvmlab.experiment import LayoutTuning
from tvmlab.records import RunFolder

__all__ = ["LayoutChoice", "why_layout"]


@dataclass(frozen=True)
class LayoutChoice:
    """The layout of one convolution or dense layer of a run, beside those it could have had.

    `frame` has one row a packing: packing, chosen, trials (that ran or failed), best_us (in the run's trials),
    decided_us (what the layout step chose by), instead_us (what the whole model would cost, its layout transforms
    included, if this layer alone had this packing), why_not (why it was not in the space; empty if it was).
    `sentence` says it in words.
    """

    run: str
    site: str
    about: str
    chosen: str
    sentence: str
    frame: pd.DataFrame = field(repr=False, compare=False)

    def __str__(self) -> str:
        return self.sentence

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self.sentence)}</p>{self.frame.to_html(index=False, na_rep='')}"


def why_layout(run: Any, site: str, layout: str | None = None) -> LayoutChoice:
    """Was a layout in the searched space of a convolution, what did it cost, and why was it picked, or not?

    `run` is anything that `tvmlab.frames` takes; `site` a name in `frames.layouts` ("conv3") or that of a task with
    one; `layout` the one to ask for ("NCHW16c", "nChw16c", "NCHW16c winograd4"), None for what was chosen.

        print(tvmlab.why_layout(run, "conv3", "nChw16c"))

    Raises InputError for several runs, a site that the run does not have, or a text that is no layout.
    """
    found = frames.folders(run)
    if len(found) > 1:
        raise InputError("these are several runs", remedy="ask about one at a time")
    folder = found[0]
    packing = None if layout is None else str(Packing.parse(re.sub("^nchw", "NCHW", layout, flags=re.IGNORECASE)))
    rows = _rows(folder, site)
    own = rows[rows["chosen"]].iloc[0]
    sentence = _Answer(folder, rows).about(packing)
    table = rows.drop(columns=["run", "site", "about", "task_key"]).reset_index(drop=True)
    return LayoutChoice(folder.id, own["site"], own["about"], own["packing"], sentence, table)


def _rows(folder: RunFolder, site: str) -> pd.DataFrame:
    """The packings of a site, and how many trials each had."""
    table = frames.layouts(folder)
    if table.empty:
        raise InputError(
            f"run {folder.id} computes every convolution in NCHW, no other layout was in its space",
            remedy="begin the experiment with LayoutTuning(), or use AutoTVM",
        )
    keys = {info.key for info in folder.tasks if info.name == site}
    named = set(table.loc[(table["site"] == site) | (table["task_key"].isin(keys) & table["chosen"]), "site"])
    if not named:
        raise InputError(
            f"run {folder.id} has no convolution or dense layer {site!r}",
            remedy=f"it has {', '.join(table['site'].unique()[:5])}, ...; see tvmlab.frames.layouts",
        )
    rows = table[table["site"] == min(named)].copy()
    measured = frames.trials(folder, columns=["task_key", "trial"])
    counts = measured[measured["trial"] > 0]["task_key"].value_counts()
    rows.insert(5, "trials", [int(counts.get(key, 0)) for key in rows["task_key"]])
    return rows


class _Answer:
    """The sentences about one site."""

    def __init__(self, folder: RunFolder, rows: pd.DataFrame) -> None:
        self._folder = folder
        self._rows = rows.set_index("packing")
        self._own = rows[rows["chosen"]].iloc[0]
        self._site = str(self._own["site"])
        self._chose = bool(rows["decided_us"].notna().any())

    def about(self, packing: str | None) -> str:
        if packing is None or packing == self._own["packing"]:
            return self._won()
        if packing not in self._rows.index:
            return f"{packing} was not in the space of {self._site}: {self._outside()}. {self._won()}"
        row = self._rows.loc[packing]
        if row["why_not"]:
            return f"{packing} was not in the space of {self._site}: {row['why_not']}. {self._won()}"
        if pd.isna(row["decided_us"]):
            state = "none of its trials ran" if row["trials"] else "the run ended before it was measured"
            return f"{packing} was in the space of {self._site}, but {state}. {self._won()}"
        return (
            f"{packing} was in the space of {self._site} and was measured ({_count(row['trials'])}, best "
            f"{row['decided_us']:.1f} us){self._dearer(row)}. {self._won()}"
        )

    def _outside(self) -> str:
        step = next((step for step in self._folder.experiment.stages if isinstance(step, LayoutTuning)), None)
        if step is None:
            return "this run has no LayoutTuning, AutoTVM alone packs by the CPU's vectors"
        blocks = sorted({Packing.parse(name).block for name in self._rows.index} - {0})
        return (
            f"this run tried blocks of {', '.join(map(str, blocks)) or 'none'}; name others in LayoutTuning(blocks=...)"
        )

    def _won(self) -> str:
        own = self._own
        if not self._folder.layouts or not self._folder.layouts["finished"]:
            return f"{self._site} is {own['packing']} for now: the layout step is not done."
        if not self._chose:
            return f"{self._site} is {own['packing']}, which no measurement chose: there was nothing to choose from."
        rivals = self._rows[~self._rows["chosen"]].dropna(subset="decided_us")
        if rivals.empty:
            return f"{self._site} is {own['packing']} ({own['decided_us']:.1f} us), the only one that was measured."
        nearest = rivals.sort_values("decided_us").iloc[0]
        against = f"{nearest.name} has {nearest['decided_us']:.1f} us"
        if own["decided_us"] <= nearest["decided_us"]:
            return f"{self._site} is {own['packing']}, the fastest by itself: {own['decided_us']:.1f} us; {against}."
        return (
            f"{self._site} is {own['packing']} ({own['decided_us']:.1f} us) although {against}, because its "
            f"neighbours' layouts decide too{self._dearer(nearest)}."
        )

    def _dearer(self, row: Any) -> str:
        """What another packing would cost the model, where that is known."""
        extra = row["instead_us"] - self._own["instead_us"]
        if pd.isna(extra):
            return ""
        return f"; with it the model would take {extra:.1f} us more, its layout transforms included"


def _count(trials: int) -> str:
    return f"{trials} trial" + ("" if trials == 1 else "s")
