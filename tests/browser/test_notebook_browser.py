"""A real JupyterLab, a real browser: notebook 01 runs, its form starts, shows and stops a search.

Screenshots are left in out/. Everything started here carries the run folder's path in its environment and is
ended by it, also when the test fails.
"""

import contextlib
import json
import os
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

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "01_tune_a_model.ipynb"
SHOTS = ROOT / "out"
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
CHROMIUM_ARGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync"
).split()
SLOW_MS = 240_000  # two busy cores

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]


@contextlib.contextmanager
def lab(folder, runs_dir):
    """A JupyterLab on loopback that sees none of the user's settings; yields its address with the token."""
    home = folder / "home"
    home.mkdir()
    settings = home / "settings"
    quiet = {"fetchNews": "false", "checkForUpdates": False}
    for name, values in (
        ("apputils-extension/notification", quiet),
        ("notebook-extension/tracker", {"windowingMode": "none"}),  # else cells out of sight are not in the page
    ):
        path = settings / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    token = secrets.token_hex(16)
    log = (folder / "lab.log").open("wb")
    with log:
        subprocess.Popen(
            [
                sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
                f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={folder}",
                f"--IdentityProvider.token={token}", "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=",
                "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.extension_manager=readonly",
            ],
            cwd=folder, env=environment(home, settings, runs_dir), stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        await_server(f"http://127.0.0.1:{port}/api?token={token}", folder / "lab.log")
        yield f"http://127.0.0.1:{port}/lab?token={token}"
    finally:
        end_processes_of(runs_dir)


def environment(home, settings, runs_dir):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "IPYTHON", "XDG"))}
    return {
        **kept,
        "HOME": str(home),
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(settings),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "IPYTHONDIR": str(home / "ipython"),
        "TVMLAB_RUNS": str(runs_dir),
    }


def await_server(url, log, timeout_s=120):
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return urllib.request.urlopen(url, timeout=10).close()
        except OSError:
            assert time.monotonic() < deadline, f"JupyterLab did not start:\n{log.read_text()}"
            time.sleep(0.2)


def processes_of(runs_dir):
    """The server, its kernels and every search process they started: all carry TVMLAB_RUNS."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("TVMLAB_RUNS") == str(runs_dir) and process.status() != psutil.STATUS_ZOMBIE:
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
    """The opened notebook, a copy with a small budget."""
    runs_dir = tmp_path / "runs"
    book = nbformat.read(NOTEBOOK, as_version=4)
    cell = next(cell for cell in book.cells if "parameters" in cell.metadata.get("tags", []))
    cell.source += '\nmodel, max_trials, time_limit_s = "squeezenet", 16, 60.0\n'
    nbformat.write(book, tmp_path / "01.ipynb")
    SHOTS.mkdir(exist_ok=True)
    with lab(tmp_path, runs_dir) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGS)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(SLOW_MS)
        page.runs_dir = runs_dir
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
            window.panel = await app.commands.execute('docmanager:open', {path: '01.ipynb', factory: 'Notebook'});
            await window.panel.context.ready;
            await window.panel.sessionContext.ready;
            await app.commands.execute('application:set-mode', {mode: 'single-document'});
        }"""
    )


def run_all(page):
    """Run every cell; fails with the traceback of a cell that raises."""
    page.evaluate("() => { window.ran = false; jupyterapp.commands.execute('notebook:run-all-cells')"
                  ".finally(() => { window.ran = true; }); }")
    page.wait_for_function("() => window.ran", timeout=2 * SLOW_MS)
    errors = page.evaluate(
        """() => window.panel.content.model.sharedModel.cells.flatMap(cell => (cell.getOutputs?.() ?? [])
            .filter(output => output.output_type === 'error').map(output => output.traceback.join('\\n')))"""
    )
    assert errors == []


def picture(form):
    """The bytes of the form's figure as (width, number of colours): a blank one has one of each."""
    return form.locator("img.widget-image").evaluate(
        """async img => {
            await img.decode();
            const canvas = new OffscreenCanvas(img.naturalWidth, img.naturalHeight);
            const context = canvas.getContext('2d');
            context.drawImage(img, 0, 0);
            const pixels = new Uint32Array(context.getImageData(0, 0, canvas.width, canvas.height).data.buffer);
            return [pixels.reduce((sum, pixel) => (sum * 31 + pixel) >>> 0, 7), new Set(pixels).size];
        }"""
    )


def await_picture(form, accepted, timeout_s=SLOW_MS / 1e3):
    deadline = time.monotonic() + timeout_s
    while not accepted(seen := picture(form)):
        assert time.monotonic() < deadline, "the figure did not change"
        form.page.wait_for_timeout(300)
    return seen
