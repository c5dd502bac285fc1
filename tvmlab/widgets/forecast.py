"""What a start would cost and take: the estimate of the time, and the records of earlier runs that count.

It takes some seconds, because the model is cut into tasks, so a thread does it: when a preset is chosen, or when the
button asks for it.
"""

from __future__ import annotations

import html
import threading
from collections.abc import Callable
from pathlib import Path

import ipywidgets as widgets
import pandas as pd

from tvmlab.core import TvmlabError
from tvmlab.experiment import Experiment
from tvmlab.presets import TimeEstimate, estimate_time
from tvmlab.study_length import duration_text
from tvmlab.widgets.style import action_button, error_html, note_html

__all__ = ["Forecast", "forecast_html"]

_WORKING = "Estimating: the model is cut into tasks, which takes some seconds."
_STALE = "This was estimated for other settings; Estimate does it again."


class Forecast(widgets.VBox):
    """The result of `tvmlab.estimate_time`, and the button that asks for it.

    `experiment` gives what to estimate when the button is pressed. `estimate()` does what the button does, and waits;
    `compare(experiment)` greys a result that is of other settings. The text is in `text`.
    """

    def __init__(self, experiment: Callable[[], Experiment], runs_dir: str | Path | None = None) -> None:
        self._asked_now = experiment
        self._runs_dir = runs_dir
        self._of: Experiment | None = None  # what the text is about
        self._now: Experiment | None = None
        self._said = note_html("Estimate says how long this takes, and which earlier records count.")
        self._lock = threading.Lock()
        self._doing: Experiment | None = None  # what the thread is at
        self._next: Experiment | None = None  # what it does after that
        self._thread: threading.Thread | None = None
        self.button = action_button(
            "Estimate", "clock-o", "How long this takes at most, and which earlier records count"
        )
        self.text = widgets.HTML(self._said)
        super().__init__([self.text])
        self.button.on_click(lambda _: self.begin())

    def estimate(self) -> TimeEstimate:
        """Estimate what the form says now and show it. Raises what `tvmlab.estimate_time` raises."""
        return self._estimate(self._asked_now())

    def begin(self) -> None:
        """The same in a thread; an error is shown. What is under way ends first, and of several the last is done."""
        try:
            experiment = self._asked_now()
        except TvmlabError as error:
            self._show(None, error_html(str(error)))
            return
        with self._lock:
            if self._doing is not None:
                self._next = None if experiment == self._doing else experiment
                return
            self._doing = experiment
        self._show(experiment, note_html(_WORKING))
        self._thread = threading.Thread(target=self._work, args=(experiment,), name="tvmlab-estimate", daemon=True)
        self._thread.start()

    def settle(self) -> None:
        """Until the estimate under way is shown; what was to be estimated after it is not."""
        with self._lock:
            self._next = None
        self.wait()

    def wait(self) -> None:
        """Until the estimate under way is shown."""
        if self._thread is not None:
            self._thread.join()

    def compare(self, experiment: Experiment | None) -> None:
        """Grey the text unless it is about this experiment (None: what the form says is refused)."""
        with self._lock:
            self._now = experiment
            self._mark()

    def _work(self, experiment: Experiment) -> None:
        while True:
            self._try(experiment)
            with self._lock:
                self._doing, self._next = self._next, None
                if self._doing is None:
                    return
                experiment = self._doing
            self._show(experiment, note_html(_WORKING))

    def _try(self, experiment: Experiment) -> None:
        try:
            self._estimate(experiment)
        except TvmlabError as error:
            self._show(experiment, error_html(str(error)))
        except Exception as error:  # noqa: BLE001  a thread that ended without a word would look like one at work
            self._show(experiment, error_html(f"cannot estimate: {error}"))

    def _estimate(self, experiment: Experiment) -> TimeEstimate:
        found = estimate_time(experiment, self._runs_dir)
        self._show(experiment, forecast_html(found))
        return found

    def _show(self, experiment: Experiment | None, text: str) -> None:
        with self._lock:
            self._of, self._said = experiment, f"<div class='tvmlab-card tvmlab-wide'>{text}</div>"
            self._mark()

    def _mark(self) -> None:
        """Show what was said; called with the lock held."""
        is_stale = self._of is not None and self._of != self._now
        stale = f"{note_html(_STALE)}<div class='tvmlab-stale'>{self._said}</div>"
        self.text.value = stale if is_stale else self._said


def forecast_html(found: TimeEstimate) -> str:
    """An estimate as HTML: time, trials and where the rates are from, what is reused, task by task on request."""
    time = f"At most about <b>{duration_text(found.seconds)}</b> for {found.trials:,} trials"
    return (
        f"<div style='line-height:1.6'>{time}: {html.escape(found.basis)}.<br>{html.escape(_reused(found))}</div>"
        f"{_past_html(found.past)}"
    )


def _reused(found: TimeEstimate) -> str:
    layouts = f"The layouts of {found.layouts} are taken. " if found.layouts else ""
    if not found.reused:
        again = int((found.past["best_run"] != "").sum()) if len(found.past) else 0  # by the other engine
        best = f"; the best schedule of {_tasks(again)} is measured again first" if again else ""
        return f"{layouts}No trials of earlier runs count{best}."
    tasks = int((found.past[["ansor", "autotvm"]].sum(axis=1) > 0).sum())
    return (
        f"{layouts}{found.reused:,} trials of earlier runs count, of {_tasks(tasks)}; "
        "the best schedule of each is measured again first."
    )


def _tasks(count: int) -> str:
    return f"{count} task{'' if count == 1 else 's'}"


def _past_html(past: pd.DataFrame) -> str:
    """Which records of each task, folded away."""
    if past.empty:
        return ""
    names = {"ansor": "trials of Ansor", "autotvm": "of AutoTVM", "then_us": "best then (µs)", "best_run": "in run"}
    shown = past[["task", *names]].rename(columns=names)
    table = shown.to_html(
        index=False, border=0, na_rep="–", float_format="{:,.1f}".format, classes="tvmlab-table", escape=True
    )
    return (
        f"<details class='tvmlab-details'><summary>Past records of {_tasks(len(past))}</summary>"
        f"<div class='tvmlab-scroll'>{table}</div></details>"
    )
