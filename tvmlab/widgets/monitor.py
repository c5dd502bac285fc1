"""The live view of one run: status line, curve, task table, Stop and Resume.

A watcher thread reads the run folder and sets widget values, so the kernel stays free. It never draws through
`Output` or pyplot, which fail silently off the main thread.
"""

from __future__ import annotations

import base64
import html
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import ipywidgets as widgets
import pandas as pd
from traitlets import Unicode

from tvmlab import frames, plots
from tvmlab import run as running
from tvmlab.core import RunError, TvmlabError
from tvmlab.run import Progress, Run
from tvmlab.widgets.style import COLORS, MUTED, STYLE, action_button, error_html, note_html

__all__ = ["Monitor"]

_LOOK_S = 0.4  # between two looks at the folder: at most 2.5 redraws a second
_BUSY_SHARE = 0.2  # long runs take longer to read: the watcher sleeps enough to stay under this share of a core
_BLANK_PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYGBgAAAABQABh6FO1AAAAABJRU5ErkJggg=="
)
_CURVE = {
    "width": 8.8,
    "height": 3.6,
    "dpi": 144,
}  # inches; 1.5 pixels a screen pixel, sharp on dense screens


class Monitor(widgets.VBox):
    """Follow a run until it ends; show it again after a page reload or a kernel restart.

    `follow(run)` changes the run, `stop()` and `resume()` do what the buttons do, `close()` ends the watching
    (never the run). `status` is the run's, or "" while there is no run. A run that cannot be read is said in
    `message`, in red.
    """

    status = Unicode("")

    def __init__(self, run: Run | None = None) -> None:
        self.run = run
        self._ended = threading.Event()
        self._watcher: threading.Thread | None = None
        self._showing = threading.Lock()
        self.stop_button = action_button("Stop", "stop", "End the search; what was measured is kept")
        self.resume_button = action_button("Resume", "forward", "Continue to the total that was asked")
        self.message = widgets.HTML()
        self.buttons = widgets.HBox([self.stop_button, self.resume_button])
        self.status_line = widgets.HTML(note_html("No run yet."))
        self.curve = widgets.Image(
            value=_BLANK_PNG, format="png", layout={"width": "845px", "max_width": "100%", "display": "none"}
        )
        self.table = widgets.HTML()
        self.failures = widgets.HTML()
        self.failed = widgets.Accordion([self.failures], layout={"display": "none", "max_width": "932px"})
        shown = [self.status_line, self.curve, self.table, self.failed]
        super().__init__([widgets.HTML(STYLE), self.buttons, self.message, *shown])
        self.stop_button.on_click(lambda button: self.guard(button, self.stop, "Stopping after the trial under way."))
        self.resume_button.on_click(
            lambda button: self.guard(button, self.resume, "Checking the model and the target.")
        )
        self.observe(lambda _: self._apply_status(), "status")
        self._apply_status()
        if run is not None:
            self.follow(run)

    def follow(self, run: Run) -> None:
        """Show this run from now on."""
        self._ended.set()
        self._ended = threading.Event()
        self.run = run
        self.status = "running" if run.status == "running" else ""  # how it ended appears with what is drawn
        self._watcher = threading.Thread(
            target=self._watch, args=(run, self._ended), name=f"tvmlab-monitor-{run.id}", daemon=True
        )
        self._watcher.start()

    @property
    def is_watching(self) -> bool:
        """Whether it still looks for what changes: until the run ends, it cannot be read, or the widget is closed."""
        return self._watcher is not None and self._watcher.is_alive() and not self._ended.is_set()

    def stop(self) -> None:
        """End the search after the trial under way. Raises RunError if there is no run."""
        self._chosen().stop(wait=False)

    def resume(self) -> Run:
        """Continue to the total that was asked. Raises RunError if there is no run or it cannot go on."""
        run = running.resume(self._chosen().folder)
        self.follow(run)
        return run

    def close(self) -> None:
        """End the watching and remove the widget; the run goes on."""
        self._ended.set()
        super().close()

    def guard(self, button: widgets.Button, action: Callable[[], Any], doing: str) -> None:
        """Do what a button asks; say what is being done until the status changes, or why it was refused."""
        if button.disabled:  # only the browser heeds that: a second click may wait here since before
            return
        self.message.value = note_html(doing)
        try:
            action()
        except TvmlabError as error:
            self.message.value = error_html(str(error))

    def _chosen(self) -> Run:
        if self.run is None:
            raise RunError("there is no run yet", remedy="press Start first")
        return self.run

    def _apply_status(self) -> None:
        self.message.value = ""
        self.stop_button.disabled = self.status != "running"
        self.resume_button.disabled = self.status not in ("stopped", "failed")

    def _watch(self, run: Run, ended: threading.Event) -> None:
        """Redraw what changed until the run ends. Runs in its own thread."""
        drawn: tuple[Any, ...] = ()
        while not ended.is_set():
            began = time.monotonic()
            try:
                status, seen = (
                    run.status,
                    _marks(run),
                )  # the status first: the last look then sees every trial
                if (status, *seen) != drawn:
                    self._show(run, status, ended, redraw=drawn[:1] != (status,) or drawn[2:] != seen[1:])
                    drawn = (status, *seen)
            except Exception as error:  # noqa: BLE001  a view that froze without a word would look like a stalled search
                self.message.value = error_html(f"cannot show run {run.id}: {error}")
                return
            if status != "running":
                return
            ended.wait(max(_LOOK_S, (time.monotonic() - began) * (1 / _BUSY_SHARE - 1)))

    def _show(self, run: Run, status: str, ended: threading.Event, redraw: bool) -> None:
        line = _status_html(run.id, run.progress)
        if redraw:
            tasks = frames.tasks(run.folder)
            curve, table = plots.latency_png(run.folder, **_CURVE), _table_html(tasks)
            failures = frames.failures(run.folder) if _may_have_failed(tasks) else pd.DataFrame()
        with self._showing:
            if ended.is_set():
                return
            self.status_line.value = line
            if redraw:
                self.curve.value, self.table.value = curve, table
                self.curve.layout.display = ""
                self._show_failures(failures)
            self.status = status

    def _show_failures(self, failed: pd.DataFrame) -> None:
        """How many trials failed and how; which, and what to do about them, where it is unfolded."""
        self.failed.layout.display = "none" if failed.empty else ""
        if not failed.empty:
            counts = failed.groupby("status", observed=True)["trials"].sum().sort_values(ascending=False)
            kinds = ", ".join(f"{count:,} {status}" for status, count in counts.items())
            total = int(counts.sum())
            self.failed.titles = [f"{total:,} failed trial{'' if total == 1 else 's'} ({kinds}): what to do"]
            self.failures.value = _failures_html(failed)


def _marks(run: Run) -> tuple[int, ...]:
    """Numbers that change when the search process writes: state, trials, tasks."""
    found = []
    for name in ("state.json", "trials.jsonl", "tasks.json"):
        path = run.folder.path / name
        found.append(path.stat().st_mtime_ns if path.exists() else 0)
    return tuple(found)


def _view(run: Run) -> dict[str, Any]:
    """How a notebook shows a run: the live view, and text for exported pages and terminals."""
    where = run.folder.path.resolve()
    monitor = _shown.get(where)
    if monitor is None or not monitor.is_watching:
        _shown[where] = monitor = Monitor(run)
    shown = monitor._repr_mimebundle_() or {}
    return {**shown, "text/plain": repr(run), "text/html": run._repr_html_()}


# While a run goes on all its displays are one: each watcher takes from the CPU that is being measured.
_shown: WeakValueDictionary[Path, Monitor] = WeakValueDictionary()
running.view = _view


def _status_html(run_id: str, progress: Progress) -> str:
    facts = [f"{progress.trials:,} of {progress.total_trials:,} trials" if progress.total_trials else "preparing"]
    if progress.trials_per_s:
        facts.append(f"{progress.trials_per_s:.2g} trials/s")
    if progress.estimate_ms is not None:
        facts.append(f"model estimate <b>{_number(progress.estimate_ms)} ms</b>")
    if progress.untuned_ms is not None:
        facts.append(f"untuned {_number(progress.untuned_ms)} ms")
    if progress.status == "running" and progress.phase:
        facts.insert(0, html.escape(progress.phase))
    facts.append(f"{_duration(progress.elapsed_s)} elapsed")
    if progress.status == "running" and progress.seconds_left is not None:
        facts.append(f"{_duration(progress.seconds_left)} left")
    color = COLORS.get(progress.status, "inherit")
    said = f"<br><span style='color:{color}'>{html.escape(progress.message)}</span>" if progress.message else ""
    return (
        f"<div style='line-height:1.6;max-width:932px'><b style='color:{color}'>● {progress.status}</b> · "
        f"{' · '.join(facts)}<br><span style='color:{MUTED}'>run {html.escape(run_id)}</span>{said}"
        f"{_bar_html(progress, color)}</div>"
    )


def _bar_html(progress: Progress, color: str) -> str:
    """How much of the total was measured, as a thin bar."""
    if not progress.total_trials:
        return ""
    part = min(100.0, 100 * progress.trials / progress.total_trials)
    return f"<div class='tvmlab-bar'><div style='width:{part:.1f}%;background:{color}'></div></div>"


def _table_html(tasks: pd.DataFrame) -> str:
    """The task table, scrolling in itself so that a model of 150 tasks does not push the curve away."""
    if tasks.empty:
        return ""
    shown = tasks.sort_values("share", ascending=False, kind="stable")[_COLUMNS]
    body = shown.to_html(index=False, border=0, na_rep="–", float_format=_number, escape=True, classes="tvmlab-table")
    return f"<div class='tvmlab-scroll tvmlab-tasks'>{body}</div>"


_COLUMNS = ["task", "kernel_class", "weight", "trials", "failed", "default_us", "best_us", "speedup", "share"]


def _may_have_failed(tasks: pd.DataFrame) -> bool:
    """Whether some trial failed; an untuned kernel without a latency may have, too."""
    return bool(tasks["failed"].any() or tasks.loc[tasks["tunable"].astype(bool), "default_us"].isna().any())


def _failures_html(failed: pd.DataFrame) -> str:
    """The failed trials by status and task, with the remedy of each."""
    shown = failed[["status", "task", "trials", "share", "remedy", "message"]]
    classes = "tvmlab-table tvmlab-text"
    body = shown.to_html(index=False, border=0, float_format="{:.0%}".format, escape=True, classes=classes)
    return f"<div class='tvmlab-scroll'>{body}</div>"


def _number(value: float) -> str:
    """Three significant digits, never in powers of ten."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
