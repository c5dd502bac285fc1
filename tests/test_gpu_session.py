"""The script for a session on a lent GPU: a job that fails stops no other, time that is up loses nothing, resuming."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """The script as a module, its jobs two that measure nothing."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_jobs
    import gpu_session

    monkeypatch.setattr(gpu_session, "describe", dict)
    monkeypatch.setattr(gpu_session.tvmlab, "doctor", lambda **_: "")
    yield gpu_session, gpu_jobs
    signal.setitimer(signal.ITIMER_REAL, 0)


def rows(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def session(gpu_session, gpu_jobs, monkeypatch, jobs, folder, *words):
    monkeypatch.setattr(gpu_jobs, "JOBS", {job.__name__: job for job in jobs})
    return gpu_session.main(["--out", str(folder), "--rehearse", "--work", str(folder / "work"), *words])


def test_a_job_that_fails_stops_no_other_and_is_tried_again(script, monkeypatch, tmp_path):
    asked = []

    def bad(session):
        """Fails."""
        session.row({"job": "bad"}, lambda: asked.append("bad") or 1 / 0)

    def good(session):
        """Works."""
        session.row({"job": "good", "n": 1}, lambda: asked.append("good") or {"value": 7})

    first, second = tmp_path / "first", tmp_path / "second"
    assert session(*script, monkeypatch, [bad, good], first) == 1
    found = {row["job"]: row for row in rows(first)}
    assert found["bad"]["error"] == "ZeroDivisionError: division by zero" and found["good"]["value"] == 7
    assert "target" in found["machine"]
    assert session(*script, monkeypatch, [bad, good], second, "--resume", str(first)) == 1
    assert asked == ["bad", "good", "bad"]  # what is there is not measured again
    assert {row["job"] for row in rows(second) if "error" not in row} == {"machine", "good"}


def test_when_the_time_is_up_what_was_measured_is_there(script, monkeypatch, tmp_path):
    def quick(session):
        """Is done in time."""
        session.row({"job": "quick"}, lambda: {"value": 1}, 0.0)

    def slow(session):
        """Is not."""
        session.row({"job": "slow"}, lambda: time.sleep(60), 0.0)

    monkeypatch.setattr(script[0], "_WRAP_UP_S", 0.0)
    monkeypatch.setattr(script[0], "machine", lambda session: {})
    started = time.monotonic()
    assert session(*script, monkeypatch, [quick, slow], tmp_path, "--minutes", "0.05") == 0
    assert time.monotonic() - started < 50
    assert [row["job"] for row in rows(tmp_path) if row["job"] != "machine"] == ["quick"]
    assert "the time is up" in (tmp_path / "session.txt").read_text()


def test_nothing_is_begun_without_time_for_it(script, monkeypatch, tmp_path):
    def long(session):
        """Would take an hour."""
        assert session.row({"job": "long"}, lambda: {"value": 1}, 3600.0) is None

    assert session(*script, monkeypatch, [long], tmp_path) == 0
    assert "no time for {'job': 'long'}" in (tmp_path / "session.txt").read_text()


def test_an_unknown_job_is_named(script, capsys):
    with pytest.raises(SystemExit):
        script[0].main(["--jobs", "smoke,polish"])
    assert "no job polish; there are smoke, main" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_session_rehearsed_on_the_cpu(tmp_path):
    jobs = "smoke,main,others,layers,report,space"  # upstream, for throughput, takes minutes to begin on two cores
    command = [sys.executable, str(BENCHMARKS / "gpu_session.py"), "--rehearse", "--minutes", "6", "--jobs", jobs]
    done = subprocess.run([*command, "--out", tmp_path / "a"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = rows(tmp_path / "a")
    assert {row["job"] for row in found} >= {"machine", "smoke", "tune", "compare", "report", "space"}
    tuned = next(row for row in found if row["job"] == "tune")
    assert tuned["trials"] > 0 and tuned["statuses"]["ok"] > 0
    smoke = next(row for row in found if row["job"] == "smoke")
    assert smoke["tasks"] == 2 and smoke["failures"] == []
    assert (tmp_path / "a" / "runs.tar.xz").stat().st_size > 1000
    again = subprocess.run(
        [*command, "--out", tmp_path / "b", "--resume", tmp_path / "a"], capture_output=True, text=True
    )
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    measured = [row for row in rows(tmp_path / "b") if row["job"] != "machine"]
    assert measured == [row for row in found if row["job"] != "machine"]
