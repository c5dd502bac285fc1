"""A real JupyterLab, a real browser: notebook 01 runs, its form starts, shows and stops a search.

Screenshots are left in out/. Every process started here carries the test's run folder in its environment
and is ended by it, also when the test fails.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import psutil
import pytest
from playwright.sync_api import expect, sync_playwright

from tvmlab.records import RunFolder

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "01_tune_a_model.ipynb"
SHOTS = ROOT / "out"
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
CHROMIUM_ARGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
SLOW_S = 240  # two busy cores
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    # Cells out of sight are in the page too.
    "notebook-extension/tracker": {"windowingMode": "none"},
}

pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        not Path(CHROMIUM).exists() and "CI" not in os.environ,  # CI shall fail without it, not pass over the test
        reason="chromium is missing; install it, e.g. apt install chromium",
    ),
]


@contextlib.contextmanager
def lab(folder, runs_dir):
    """A JupyterLab on loopback that sees none of the user's settings; yields its address, with the token."""
    home = folder / "home"
    for name, values in SETTINGS.items():
        path = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    token = secrets.token_hex(16)
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={folder}",
        f"--IdentityProvider.token={token}", "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]  # fmt: skip
    log = folder / "lab.log"
    try:
        with log.open("wb") as out:
            subprocess.Popen(
                command,
                cwd=folder,
                env=environment(home, runs_dir),
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        await_server(f"http://127.0.0.1:{port}/api?token={token}", log)
        yield f"http://127.0.0.1:{port}/lab?token={token}"
    finally:
        end_processes_of(runs_dir)


def environment(home, runs_dir):
    own = ("JUPYTER", "IPYTHON", "XDG", "TVMLAB")
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(own)},
        "HOME": str(home),
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "IPYTHONDIR": str(home / "ipython"),
        "TVMLAB_RUNS": str(runs_dir),
    }


def await_server(url, log):
    deadline = time.monotonic() + SLOW_S
    while True:
        try:
            return urllib.request.urlopen(url, timeout=10).close()
        except OSError:
            assert time.monotonic() < deadline, f"JupyterLab did not start:\n{log.read_text()}"
            time.sleep(0.2)


def processes_of(runs_dir):
    """The server, its kernels and every search process of them: all carry TVMLAB_RUNS."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("TVMLAB_RUNS") == str(runs_dir):
                found.append(process)
    return found


def end_processes_of(runs_dir):
    while left := processes_of(runs_dir):
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=10)


@pytest.fixture
def page(tmp_path):
    """The opened notebook: a copy with a small budget in a JupyterLab of its own."""
    book = nbformat.read(NOTEBOOK, as_version=4)
    parameters = next(cell for cell in book.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source += '\nmodel, max_trials, time_limit_s = "squeezenet", 16, 60.0\n'
    nbformat.write(book, tmp_path / "01.ipynb")
    SHOTS.mkdir(exist_ok=True)
    with lab(tmp_path, tmp_path / "runs") as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGS)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(SLOW_S * 1e3)
        page.goto(f"{url}&reset")
        open_notebook(page)
        try:
            yield page
        finally:
            page.screenshot(path=SHOTS / "browser-last.png")
            browser.close()


def open_notebook(page):
    page.wait_for_function("() => window.jupyterapp")
    page.evaluate(
        """async () => {
            const app = window.jupyterapp;
            await app.restored;
            window.panel = await app.commands.execute(
                'docmanager:open', {path: '01.ipynb', factory: 'Notebook'});
            await window.panel.context.ready;
            await window.panel.sessionContext.ready;
        }"""
    )


def run_all(page):
    """Run every cell; the assertion shows the traceback of one that raised."""
    page.evaluate(
        """() => {
            window.ran = false;
            jupyterapp.commands.execute('notebook:run-all-cells').finally(() => { window.ran = true; });
        }"""
    )
    page.wait_for_function("() => window.ran", timeout=2e3 * SLOW_S)
    errors = page.evaluate(
        """() => window.panel.content.widgets.flatMap(cell => cell.model.outputs
            ? cell.model.outputs.toJSON().filter(output => output.output_type === 'error') : [])
            .map(error => error.traceback.join('\\n'))"""
    )
    assert errors == []


def form_of(page):
    """The output of the cell that shows the form (the run's own view has no Start)."""
    return page.locator(".jp-OutputArea-output").filter(has=button(page, "Start"))


def button(within, name):
    """A button of a widget (its role's name would hold the icon's glyph)."""
    return within.locator("button.widget-button", has_text=re.compile(rf"^\s*{name}\s*$"))


def await_picture(form, other_than=None):
    """Wait until the form shows a figure (a blank one has a single colour) that differs; returns its hash."""
    deadline = time.monotonic() + SLOW_S
    while time.monotonic() < deadline:
        pixels, colors = form.locator("img.widget-image").evaluate(
            """async img => {
                try { await img.decode(); } catch { return [0, 0]; }  // it changed meanwhile
                const canvas = new OffscreenCanvas(img.naturalWidth, img.naturalHeight);
                const context = canvas.getContext('2d');
                context.drawImage(img, 0, 0);
                const data = context.getImageData(0, 0, canvas.width, canvas.height).data.buffer;
                const pixels = new Uint32Array(data);
                return [pixels.reduce((sum, pixel) => (sum * 31 + pixel) >>> 0, 7), new Set(pixels).size];
            }"""
        )
        if colors > 10 and pixels != other_than:
            return pixels
        form.page.wait_for_timeout(300)
    raise AssertionError("the figure did not change")


def knob(form, name):
    """The text box of a knob: the input beside its label."""
    row = form.locator(".widget-hbox").filter(has=form.page.get_by_text(name, exact=True))
    return row.last.locator("input")


def test_notebook_01_runs_and_its_form_starts_shows_and_stops_a_search(page, tmp_path):
    run_all(page)
    form = form_of(page)
    assert form.locator("img.widget-image").evaluate("img => img.naturalWidth") == 1  # blank until Start

    knob(form, "max_trials").fill("0")
    refusal = "Ansor(max_trials=0) is not usable: max_trials should be 1 to 100,000,000 trials"
    expect(form.get_by_text(refusal).first).to_be_visible(timeout=SLOW_S * 1e3)
    expect(button(form, "Start")).to_be_disabled()
    page.screenshot(path=SHOTS / "browser-refused.png")
    knob(form, "max_trials").fill("5000")
    knob(form, "time_limit_s").fill("")
    expect(button(form, "Start")).to_be_enabled(timeout=SLOW_S * 1e3)

    before = {path.name for path in (tmp_path / "runs").iterdir()}
    button(form, "Start").click()
    first = await_picture(form)
    (run_id,) = {path.name for path in (tmp_path / "runs").iterdir()} - before
    run = RunFolder.open(run_id, tmp_path / "runs")
    assert run.experiment.steps[0].max_trials == 5000
    page.evaluate("() => jupyterapp.commands.execute('docmanager:save')")
    page.reload()
    open_notebook(page)
    form = form_of(page)
    live = await_picture(form, other_than=first)
    await_picture(form, other_than=live)  # it came back live
    measured = form.get_by_text(re.compile(r"[1-9]\d* of 5,000 trials"))
    expect(measured).to_be_visible(timeout=SLOW_S * 1e3)
    form.locator("img.widget-image").scroll_into_view_if_needed()
    page.screenshot(path=SHOTS / "browser-live.png")

    button(form, "Stop").click()
    expect(form.get_by_text("● stopped")).to_be_visible(timeout=SLOW_S * 1e3)
    assert run.status == "stopped"
    assert 0 < run.state.trials < 5000
    page.reload()
    open_notebook(page)
    form = form_of(page)
    await_picture(form)
    expect(form.get_by_text("● stopped")).to_be_visible()
    expect(button(form, "Resume")).to_be_enabled()
    form.locator("img.widget-image").scroll_into_view_if_needed()
    page.screenshot(path=SHOTS / "browser-stopped.png")

    form.locator(".widget-toggle-button", has_text="fast").click()
    expect(form.locator(".lm-TabBar-tab", has_text="2 AutoTVM")).to_be_visible(timeout=SLOW_S * 1e3)
    button(form, "Estimate").click()
    said = form.get_by_text(re.compile(r"At most about .* for [\d,]+ trials"))
    expect(said).to_be_visible(timeout=SLOW_S * 1e3)
    said.scroll_into_view_if_needed()
    page.screenshot(path=SHOTS / "browser-estimate.png")
