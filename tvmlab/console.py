"""What the console shows: frames, the live line of a run, and its summary."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from tvmlab.core import RunError, TrialStatus

if TYPE_CHECKING:
    from tvmlab.run import Progress, Run

__all__ = ["follow", "show", "summarise"]

_LOOK_S = 0.5
_LOG_EVERY_S = 10.0  # a progress line in a file, where it cannot be overwritten


def show(found: Any) -> int:
    """Print a frame whole, anything else as it shows itself."""
    print(found.to_string(na_rep="-") if hasattr(found, "to_string") else found)
    return 0


def summarise(run: Run) -> int:
    """The run's summary frame, one line a figure."""
    from tvmlab import frames

    row = frames.summary(run).iloc[0].dropna()
    width = max(map(len, row.index))
    for name, value in row.items():
        if value or name not in set(TrialStatus):  # a kind of failure that did not occur says nothing
            print(f"{name:{width}}  {value:,.4g}" if isinstance(value, float) else f"{name:{width}}  {value}")
    return 0


def follow(run: Run) -> bool:
    """Show a live line until the run ends; False after Ctrl-C, which stops the run.

    Raises RunError if the run failed.
    """
    from tqdm import tqdm

    live = sys.stderr.isatty()
    with tqdm(bar_format="{desc}", mininterval=0, dynamic_ncols=True, disable=not live) as line:
        try:
            told, status = 0.0, "running"
            while status == "running":
                progress = run.progress
                line.set_description_str(_line(progress))
                if not live and progress.elapsed_s >= told + _LOG_EVERY_S:
                    print(_line(progress), file=sys.stderr, flush=True)
                    told = progress.elapsed_s
                run.wait(timeout=_LOOK_S)
                status = run.status
            line.set_description_str(_line(run.progress))
        except KeyboardInterrupt:
            line.set_description_str("stopping after the trial under way ...")
            run.stop()
            line.close()
            print(f"stopped; tvmlab resume {run.id} continues", file=sys.stderr)
            return False
    if status == "failed":
        raise RunError(f"run {run.id} failed", remedy=run.progress.message or "see log.txt in its folder")
    return True


def _line(progress: Progress) -> str:
    """The progress line: status, trials, rate, model estimate, time left."""
    parts = [progress.status]
    if progress.total_trials:
        parts.append(f"{progress.trials:,}/{progress.total_trials:,} trials")
    if progress.trials_per_s:
        parts.append(f"{progress.trials_per_s:.2g} trials/s")
    if progress.estimate_ms is not None:
        untuned = f" (untuned {progress.untuned_ms:,.4g})" if progress.untuned_ms is not None else ""
        parts.append(f"model estimate {progress.estimate_ms:,.4g} ms{untuned}")
    if progress.status == "running" and progress.seconds_left is not None:
        minutes, seconds = divmod(round(progress.seconds_left), 60)
        parts.append(f"{minutes}:{seconds:02} left")
    if progress.message:
        parts.append(progress.message)
    return " | ".join(parts)
