"""What the console shows: frames, the live line of a run, and its summary."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from tvmlab.core import RunError, TrialStatus

if TYPE_CHECKING:
    from tvmlab.run import Run

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
                line.set_description_str(str(progress))
                if not live and progress.elapsed_s >= told + _LOG_EVERY_S:
                    print(str(progress), file=sys.stderr, flush=True)
                    told = progress.elapsed_s
                run.wait(timeout=_LOOK_S)
                status = run.status
            line.set_description_str(str(run.progress))
        except KeyboardInterrupt:
            line.set_description_str("stopping after the trial under way ...")
            run.stop()
            line.close()
            print(f"stopped; tvmlab resume {run.id} continues", file=sys.stderr)
            return False
    if status == "failed":
        raise RunError(f"run {run.id} failed", remedy=run.progress.message or "see log.txt in its folder")
    return True
