"""A run or a study as one HTML file: a parametrised notebook (templates/) executed and exported with static figures.

The file needs no network and no JavaScript: its figures are PNGs inside it.
"""

from __future__ import annotations

import html
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import pandas as pd

from tvmlab import frames
from tvmlab.comparison_rows import ratio_of
from tvmlab.core import InputError, RunError
from tvmlab.experiment import STEPS, Experiment, Measure, Options, Repeat
from tvmlab.records import RunFolder
from tvmlab.reuse import said_of_reuse
from tvmlab.study_folder import StudyFolder

__all__ = ["code", "facts_html", "findings", "heading", "report", "study_heading", "table_html"]

_TEMPLATES = Path(__file__).with_name("templates")
_RUN = _TEMPLATES / "report.ipynb"
_STUDY = _TEMPLATES / "study.ipynb"
_SHORT = 24  # letters of a text that is not broken into lines


def report(run: Any, output: str | Path | None = None, **parameters: Any) -> Path:
    """Write the report of a run or of a study and return the path of the HTML file: report.html in its folder, or
    `output`.

    `parameters` are those of the notebook: of a run `top`, how many tasks the share figure names; of a study `margin`,
    the relative difference that matters (0.03: 3 %), and `confidence`. Raises InputError for a parameter it does not
    have, RunError if the notebook fails.
    """
    if StudyFolder.is_study(run):
        study = StudyFolder.open(run)
        return _write(_STUDY, {"study": str(study.path.resolve())}, study.path, study.title, output, parameters)
    folder = _one(run)
    return _write(_RUN, {"run": str(folder.path.resolve())}, folder.path, _title(folder), output, parameters)


def _write(
    notebook: Path,
    about: dict[str, str],
    folder: Path,
    title: str,
    output: str | Path | None,
    parameters: dict[str, Any],
) -> Path:
    """Execute a notebook on what `about` names, and export it."""
    _check(notebook, about, parameters)
    target = Path(output) if output is not None else folder / "report.html"
    with tempfile.TemporaryDirectory() as scratch:
        executed = Path(scratch) / "report.ipynb"
        _execute(notebook, executed, about, parameters)
        body = _body(executed)
    page = Template((_TEMPLATES / "report.html").read_text()).substitute(title=html.escape(title), body=body)
    try:
        target.write_text(page)
    except OSError as error:
        raise InputError(f"cannot write {target} ({error.strerror})", remedy="choose another output") from error
    return target


def _one(run: Any) -> RunFolder:
    found = frames.folders(run)
    if len(found) > 1:
        raise InputError(f"a report is of one run, {len(found)} were given", remedy="pass one run")
    return found[0]


def _check(notebook: Path, about: dict[str, str], parameters: dict[str, Any]) -> None:
    """Refuse what the notebook would ignore; papermill only warns."""
    import papermill

    known = [name for name in papermill.inspect_notebook(str(notebook)) if name not in about]
    for name in parameters:
        if name not in known:
            raise InputError(f"the report has no parameter {name!r}", remedy=f"it has {', '.join(known)}")


def _execute(notebook: Path, output: Path, about: dict[str, str], parameters: dict[str, Any]) -> None:
    import papermill

    try:
        papermill.execute_notebook(
            str(notebook),
            str(output),
            parameters={**about, **parameters},
            kernel_name="python3",
            progress_bar=False,
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
        )
    except papermill.PapermillExecutionError as error:
        raise RunError(
            f"the report of {next(iter(about.values()))} failed ({error.ename}: {error.evalue})",
            remedy="check that its folder is whole",
        ) from error


def _body(notebook: Path) -> str:
    """The outputs of an executed notebook as HTML, without code."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(template_name="basic", exclude_input=True, exclude_output_prompt=True, anchor_link_text="")
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # figures carry no alternative text of nbconvert's; the captions say what they are
        return exporter.from_filename(str(notebook))[0]


def _title(folder: RunFolder) -> str:
    row = frames.summary(folder).iloc[0]
    return f"{row.model} on {row.target}"


def heading(run: Any) -> str:
    """The top of the report as HTML: what was tuned, the run, and the findings."""
    folder = _one(run)
    began = time.strftime(", begun %Y-%m-%d %H:%M", time.localtime(folder.state.started_s))
    items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in findings(folder))
    note = html.escape(folder.id) + (began if folder.state.started_s else "")
    return f"<h1>{html.escape(_title(folder))}</h1><p class='note'>run {note}</p><ul>{items}</ul>"


def study_heading(study: Any, claims: pd.DataFrame) -> str:
    """The top of a study's report as HTML: what was studied, how far it is, and the claims over all models."""
    folder = StudyFolder.open(study)
    frame = folder.frame()
    done, timed = int((frame["status"] == "done").sum()), int(frame["end_to_end_ms"].notna().sum())
    overall = claims[claims["model"] == "all"] if (claims["model"] == "all").any() else claims
    said = [
        f"{done} of {len(frame)} cells are done, {timed} were timed end to end.",
        *folder.problems,
        *overall["sentence"],
    ]
    items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in said)
    note = f"<p class='note'>study {html.escape(folder.path.name)}</p>"
    return f"<h1>{html.escape(folder.title)}</h1>{note}<ul>{items}</ul>"


def table_html(frame: pd.DataFrame) -> str:
    """A frame as an HTML table: three significant digits, text at the left, scrolling sideways if it is
    wide."""
    shown = frame.reset_index(drop=True).rename(columns=lambda name: str(name).replace("_", " "))
    body = shown.to_html(index=False, border=0, na_rep="–", float_format=_number)
    for name in shown.columns[[not pd.api.types.is_numeric_dtype(kind) for kind in shown.dtypes]]:
        texts = {html.escape(str(value), quote=False) for value in shown[name]}
        kind = "text" if max(map(len, texts), default=0) > _SHORT else "text short"
        for text in texts:
            body = body.replace(f"<td>{text}</td>", f"<td class='{kind}'>{text}</td>")
    return f"<div class='wide'>{body}</div>"


def facts_html(facts: dict[str, Any]) -> str:
    """Nested facts, such as environment.json, as a two-column HTML table with dotted names."""
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>" for name, value in _flat(facts)
    )
    return f"<div class='text wide'><table>{rows}</table></div>"


def _flat(facts: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in facts.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{name}.")
        elif value not in (None, "", []):
            yield f"{above}{name}", value


def code(run: Any) -> str:
    """The Python that starts the same experiment again, in a new run.

    It begins with nothing, if this run did, although there are earlier runs now.
    """
    folder = _one(run)
    reused = said_of_reuse(folder)
    experiment = folder.experiment if reused else folder.experiment.afresh()
    known: list[type[Options]] = [Experiment, *STEPS, Repeat, Measure]
    names = [options.__name__ for options in known if f"{options.__name__}(" in experiment.code()]
    note = f"# This run {reused}.\n" if reused else ""
    return (
        f"import tvmlab\nfrom tvmlab import {', '.join(sorted(names))}\n\n{note}"
        f"run = tvmlab.tune({experiment.code()})\nrun.wait()"
    )


def findings(run: Any) -> list[str]:
    """What can be said of a run, one sentence each; a model estimate is never given as an end-to-end
    latency."""
    folder = _one(run)
    row = frames.summary(folder).iloc[0]
    reused = said_of_reuse(folder).partition(";")[0]
    return [
        _search_sentence(row),
        *([f"It {reused}: without them it is another search."] if reused else []),
        *_layout_sentences(folder),
        _estimate_sentence(row, frames.tasks(folder)),
        *_comparison_sentences(folder, row),
    ]


def _search_sentence(row: pd.Series) -> str:
    failed = f", {row.failed:,} of which failed" if row.failed else ", none of which failed"
    state = {"done": "finished", "running": "is still running"}.get(row.status, f"ended as {row.status}")
    return f"The run {state} after {_count(row.trials)}{failed}, in {row.elapsed_s:,.0f} s of tuning."


def _layout_sentences(folder: RunFolder) -> list[str]:
    found = frames.layouts(folder).attrs
    if not found.get("best_uniform"):
        return []
    gain, uniform = found["gain"], found["best_uniform"]
    than = f"{100 * gain:.2g} % less than" if gain > 0 else "as much as"
    return [
        f"The convolutions and layout transforms of the assignment that the layout step chose took "
        f"{_ms(found['cost_us'] / 1e3)} when it was chosen, {than} with {uniform} throughout."
    ]


def _estimate_sentence(row: pd.Series, tasks: pd.DataFrame) -> str:
    tasks = tasks[tasks["weight"] > 0]
    name = "The model estimate (the sum over tasks of weight times best kernel latency)"
    untuned, best = row.untuned_estimate_ms, row.best_estimate_ms
    faster = int((tasks["speedup"] > 1).sum())
    if np.isnan(best):
        return f"{name} is not known: some task has neither an untuned latency nor a valid trial."
    if np.isnan(untuned):
        return f"{name} is {_ms(best)}; that of the untuned model is not known: one of its kernels failed."
    if faster == 0:
        return f"The search found nothing better than the untuned kernels. {name} is still {_ms(untuned)}."
    return (
        f"{name} fell from {_ms(untuned)} untuned to {_ms(best)}, {untuned / best:.3g} times less; "
        f"{faster} of {len(tasks)} tasks became faster."
    )


def _comparison_sentences(folder: RunFolder, row: pd.Series) -> list[str]:
    compared = folder.comparison
    if not compared:
        return ["The compiled model was not timed end to end; tvmlab compare does that."]
    said = [
        f"End to end, the compiled model takes {_ms(row.end_to_end_ms)} on {compared['threads']} threads.",
        *(ratio_sentence(ratio_of(compared, pair["subject"], pair["baseline"])) for pair in compared["ratios"]),
    ]
    numerics = compared["numerics"]
    verdict = "within" if numerics["ok"] else "NOT within"
    error, bound = numerics["max_error_over_max_output"], numerics["bound"]
    return [
        *said,
        f"Its outputs differ from onnxruntime's by at most {error:.2g} of the largest output, "
        f"{verdict} the bound of {bound:g}.",
    ]


def ratio_sentence(pair: dict[str, Any]) -> str:
    """One measured ratio in words: a difference is claimed only where there is an interval, and it leaves out 1.

    >>> found = {"subject": "tvmlab", "baseline": "untuned", "ratio": 0.5, "low": 0.4, "high": 0.6}
    >>> ratio_sentence(found)
    "tvmlab takes 0.5 times untuned's end-to-end latency (95 % interval 0.4 to 0.6): it is faster."
    """
    few = np.isnan(pair["low"])
    interval = "too few turns for an interval" if few else f"95 % interval {pair['low']:.3g} to {pair['high']:.3g}"
    start = f"{pair['subject']} takes {pair['ratio']:.3g} times {pair['baseline']}'s end-to-end latency ({interval})"
    if pair["high"] < 1:
        return f"{start}: it is faster."
    if pair["low"] > 1:
        return f"{start}: it is slower."
    return f"{start}: no difference is shown."


def _count(trials: int) -> str:
    return f"{trials:,} trial{'' if trials == 1 else 's'}"


def _ms(value: float) -> str:
    return f"{_number(value)} ms"


def _number(value: float) -> str:
    """Three significant digits, never in powers of ten."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
