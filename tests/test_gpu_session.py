"""The script for a session on a lent GPU: a job that fails stops no other, time that is up loses nothing, resuming."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from stub_driver import has_nvrtc

from tvmlab.compare import Comparison
from tvmlab.core import Measurement, TrialStatus
from tvmlab.nvrtc import compile_lean, lean_source
from tvmlab.recordings import recorded
from tvmlab.records import RunFolder
from tvmlab.study_design import plan
from tvmlab.study_folder import StudyFolder
from tvmlab.targets import target

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ENVIRONMENT = {
    "target": {"label": "test-gpu", "roofline": {"peak_gflops": 100.0, "bandwidth_gbs": 10.0}},
    "versions": {"tvmlab": "0.1.0", "apache-tvm": "0.27.0"},
}


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
    with (first / "results.jsonl").open("a") as file:
        file.write('{"job": "goo')  # it was killed as it wrote
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


def test_what_a_job_does_beside_its_rows_may_fail_too(script, monkeypatch, tmp_path):
    def bad(session):
        """Fails before its first row."""
        raise ValueError("no such model")

    def good(session):
        """Works."""
        session.row({"job": "good"}, lambda: {"value": 7})

    assert session(*script, monkeypatch, [bad, good], tmp_path) == 1
    found = {row["job"]: row for row in rows(tmp_path)}
    assert found["bad"]["error"] == "ValueError: no such model" and found["good"]["value"] == 7


@pytest.mark.parametrize("swallowed", [RuntimeError, None])
def test_an_alarm_that_a_callback_swallows_ends_the_session_all_the_same(script, monkeypatch, tmp_path, swallowed):
    """TVM makes a RuntimeError of what is raised in its callbacks, and a search tries the next candidate after one."""
    gpu_session, _ = script
    monkeypatch.setattr(gpu_session, "_WRAP_UP_S", 0.0)
    monkeypatch.setattr(gpu_session, "_AGAIN_S", 1.0)
    monkeypatch.setattr(gpu_session, "machine", lambda session: {})

    def callback():
        try:
            time.sleep(60)
        except gpu_session.TimeUp as error:
            if swallowed:
                raise swallowed("TimeUp") from error

    def job(session):
        """Goes on until it is stopped."""
        session.row({"job": "job"}, lambda: [callback(), time.sleep(60)], 0.0)
        session.row({"job": "next"}, lambda: {"value": 1}, 0.0)

    started = time.monotonic()
    assert session(*script, monkeypatch, [job], tmp_path, "--minutes", "0.03") == 0
    assert time.monotonic() - started < 50
    assert [row["job"] for row in rows(tmp_path)] == ["machine"]
    assert "the time is up" in (tmp_path / "session.txt").read_text()


def made_in(run, session, name):
    """A finished run, as if a job of the session had made it."""
    shutil.copytree(run.path, session.runs / name)
    (session.runs / name / "log.txt").write_text("printed by the search\n")


def members(path):
    with tarfile.open(path) as archive:
        return archive.getnames()


def test_runs_come_back_with_their_rows_or_are_made_again(script, monkeypatch, make_run, tmp_path):
    run = make_run(environment=ENVIRONMENT)
    asked = []

    def tune(session):
        """Tunes once."""

        def carried_out():
            asked.append("tune")
            made_in(run, session, "one-best")
            return {"folder": "one-best"}

        session.row({"job": "tune"}, carried_out)

    def more(session):
        """Makes another run."""
        made_in(run, session, f"more-{len(list(session.runs.iterdir()))}")

    outs = [tmp_path / name for name in "abc"]
    assert session(*script, monkeypatch, [tune], outs[0]) == 0
    assert {"runs/one-best/log.txt"} <= set(members(outs[0] / "logs.tar.xz"))
    assert session(*script, monkeypatch, [tune, more], outs[1], "--resume", str(outs[0])) == 0
    assert asked == ["tune"]
    found = recorded(outs[1] / "runs.tar.xz", cache=tmp_path / "cache")
    assert {folder.path.name for folder in found} == {"one-best", "more-2"}  # the other is recording.json
    (outs[1] / "runs.tar.xz").unlink()  # as if the machine had been taken before it was packed
    assert session(*script, monkeypatch, [tune], outs[2], "--resume", str(outs[1])) == 0
    assert asked == ["tune", "tune"]


def test_a_tuning_is_packed_before_its_row_is_written_and_compared_when_it_is_done(
    script, monkeypatch, make_run, tmp_path
):
    """A process that dies between the two then leaves a run that the next session finds."""
    gpu_session, gpu_jobs = script
    run = make_run(environment=ENVIRONMENT)
    run.write_state(replace(run.state, phases={"run_s": 1.0}))
    compared = []
    monkeypatch.setattr(gpu_jobs, "_compared", lambda *_: compared.append(1) or {})
    written, packed = gpu_session.Session._write, []

    def write(self, row):
        if row["job"] == "tune" and "error" not in row:
            packed.extend(members(tmp_path / "runs.tar.xz"))
        written(self, row)

    monkeypatch.setattr(gpu_session.Session, "_write", write)

    def main(session):
        """Goes on with a run that ended."""
        made_in(run, session, "tiny-best")
        gpu_jobs.main(session)

    def half(session):
        """Has a run that failed."""
        made_in(run, session, "tiny-best")
        state = json.loads((session.runs / "tiny-best" / "state.json").read_text())
        (session.runs / "tiny-best" / "state.json").write_text(json.dumps({**state, "status": "failed"}))
        monkeypatch.setattr(gpu_jobs.tvmlab, "resume", lambda folder: gpu_jobs.tvmlab.attach(folder))
        gpu_jobs.main(session)

    assert session(*script, monkeypatch, [half], tmp_path / "half") == 1
    assert compared == [] and "error" in rows(tmp_path / "half")[-1]
    assert session(*script, monkeypatch, [main], tmp_path) == 0
    assert compared
    tuned = next(row for row in rows(tmp_path) if row["job"] == "tune")
    assert tuned["job"] == "tune" and tuned["folder"] == "tiny-best" and tuned["trials"] == 3
    assert "tiny-best/trials.jsonl" in packed


def test_a_comparison_of_a_run_that_did_not_come_back_is_made_again(script, monkeypatch, make_run, tmp_path):
    """What was compared was another tuning than the one that takes its place."""
    _, gpu_jobs = script
    run = make_run(environment=ENVIRONMENT)
    run.write_state(replace(run.state, phases={"run_s": 1.0}))
    compared = []
    monkeypatch.setattr(gpu_jobs, "_compared", lambda session, folder, names: compared.append(names) or {})
    monkeypatch.setattr(gpu_jobs, "_layers", lambda *_: [])
    monkeypatch.setattr(gpu_jobs.importlib.util, "find_spec", lambda name: name)

    def main(session):
        """Goes on with a run that ended."""
        if not (session.runs / "tiny-best").exists():
            made_in(run, session, "tiny-best")
        gpu_jobs.main(session)
        gpu_jobs.layers(session)

    outs = [tmp_path / name for name in "abc"]
    assert session(*script, monkeypatch, [main], outs[0]) == 0
    calls = len(compared)
    assert calls == 3
    assert session(*script, monkeypatch, [main], outs[1], "--resume", str(outs[0])) == 0
    assert len(compared) == calls
    (outs[1] / "runs.tar.xz").unlink()
    assert session(*script, monkeypatch, [main], outs[2], "--resume", str(outs[1])) == 0
    assert len(compared) == 2 * calls
    assert all(row["folder"] == "tiny-best" for row in rows(outs[2]) if row["job"] in ("compare", "layers"))


def test_the_comparisons_of_a_run_are_kept_together(script, monkeypatch, make_run):
    _, gpu_jobs = script
    run = make_run(environment=ENVIRONMENT)

    def compared(run, baselines, repeats):
        subjects = {name: {"samples_ms": [float(len(baselines))]} for name in ("tvmlab", *baselines)}
        ratios = [{"subject": "tvmlab", "baseline": name, "ratio": 0.5, "low": 0.4, "high": 0.6} for name in baselines]
        numerics = {"ok": True, "max_error_over_max_output": 0.0, "bound": 1e-4}
        numerics["baselines"] = dict.fromkeys(baselines, 0.0)
        found = Comparison(run.id, 1, repeats, subjects, ratios, numerics, ["a note"])
        run.write_json("compare.json", asdict(found))
        return found

    monkeypatch.setattr(gpu_jobs.tvmlab, "compare", lambda folder, *asked, **more: compared(run, *asked, **more))
    asked = SimpleNamespace(rehearse=False)
    for baselines in (("untuned", "torch"), ("torch-compile",), ("torch-compile",)):
        row = gpu_jobs._compared(asked, run.path, baselines)
        assert set(row["subjects"]) == {"tvmlab", *baselines}
    kept = run.comparison
    names = ["untuned", "torch", "torch-compile"]
    assert [row["baseline"] for row in kept["ratios"]] == names and list(kept["numerics"]["baselines"]) == names
    assert list(kept["subjects"]) == ["tvmlab", *names] and kept["notes"] == ["a note"]
    assert kept["subjects"]["tvmlab"]["samples_ms"] == [2.0]  # of the first


def test_only_what_changed_is_packed_again(script, monkeypatch, make_run, tmp_path):
    import gpu_state

    work = gpu_state.Work(tmp_path / "work", tmp_path, "by a test")
    made_in(make_run(environment=ENVIRONMENT), work, "one")
    work.keep()
    before = [(tmp_path / name).stat().st_mtime_ns for name in ("runs.tar.xz", "logs.tar.xz")]
    work.keep()
    assert [(tmp_path / name).stat().st_mtime_ns for name in ("runs.tar.xz", "logs.tar.xz")] == before
    with (work.runs / "one" / "log.txt").open("a") as log:
        log.write("x" * 300_000)
    (work.runs / "two").mkdir()
    shutil.copy(work.runs / "one" / "experiment.json", work.runs / "two")  # one that had not begun
    (work.runs / "two" / "log.txt").write_text("no card")
    work.keep()
    runs, logs = members(tmp_path / "runs.tar.xz"), members(tmp_path / "logs.tar.xz")
    assert not [name for name in runs if name.startswith("two")] and "one/trials.jsonl" in runs
    assert [name for name in logs if name.startswith("not-begun-") and name.endswith("two/log.txt")]
    with tarfile.open(tmp_path / "logs.tar.xz") as archive:
        assert archive.getmember("runs/one/log.txt").size == 100_000


def test_runs_that_cannot_be_packed_are_told_and_cost_nothing_else(script, make_run, tmp_path, capsys):
    import gpu_state

    work = gpu_state.Work(tmp_path / "work", tmp_path, "by a test")
    made_in(make_run(environment=ENVIRONMENT), work, "one")
    (work.runs / "one" / "environment.json").write_text("{half")
    work.keep()
    assert "environment.json is damaged" in capsys.readouterr().err and (tmp_path / "logs.tar.xz").exists()


@pytest.mark.parametrize("interrupted_in", ["pack", "_pack_logs"])
def test_what_was_being_packed_when_the_session_ended_is_packed_in_the_end(
    script, make_run, tmp_path, monkeypatch, interrupted_in
):
    import gpu_state

    work = gpu_state.Work(tmp_path / "work", tmp_path, "by a test")
    made_in(make_run(environment=ENVIRONMENT), work, "one")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(gpu_state.tvmlab if interrupted_in == "pack" else gpu_state, interrupted_in, interrupted)
        with pytest.raises(KeyboardInterrupt):
            work.keep()
    work.keep()
    assert "one/trials.jsonl" in members(tmp_path / "runs.tar.xz")
    assert "runs/one/log.txt" in members(tmp_path / "logs.tar.xz")


def test_the_alarm_rings_after_the_runs_are_packed_not_while(script, make_run, tmp_path, monkeypatch):
    import gpu_state

    work, rung, pack = gpu_state.Work(tmp_path / "work", tmp_path, "by a test"), [], gpu_state.tvmlab.pack
    made_in(make_run(environment=ENVIRONMENT), work, "one")

    def packed(*asked, **options):
        time.sleep(0.3)
        assert not rung
        return pack(*asked, **options)

    monkeypatch.setattr(gpu_state.tvmlab, "pack", packed)
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1, 5.0)
        work.keep()
        time.sleep(0.05)
        assert rung and "one/trials.jsonl" in members(tmp_path / "runs.tar.xz")
        assert 4 < signal.getitimer(signal.ITIMER_REAL)[0] <= 5
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    work.keep()
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


DEAF = """
import os, signal, sys, time
from dataclasses import asdict, replace
from tvmlab.nvrtc import compile_lean, lean_source
from tvmlab.records import RunFolder
from tvmlab.study_design import plan
from tvmlab.study_folder import StudyFolder
from tvmlab.targets import target
signal.signal(signal.SIGTERM, signal.SIG_IGN)
folder = RunFolder.open(sys.argv[2])
with folder.acquire():
    folder.write_state(replace(folder.state, status="running", pid=os.getpid()))
    print("searching", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def deaf(make_run, tmp_path):
    """A work folder whose only run goes on and does not listen, and the process of that."""
    run = make_run(environment=ENVIRONMENT)
    folder = tmp_path / "gpu-session-x" / "runs" / "one"
    shutil.copytree(run.path, folder)
    command = [sys.executable, "-c", DEAF, "tvmlab.search_process", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        process.stdout.readline()
        yield folder, process
        process.kill()


def test_a_search_that_does_not_stop_is_killed(script, deaf, monkeypatch):
    import gpu_state

    folder, process = deaf
    monkeypatch.setattr(gpu_state, "_GRACE_S", 0.5)
    assert RunFolder(folder).status == "running"
    assert gpu_state.end_runs(folder.parent) == []
    assert process.wait(10) == -signal.SIGKILL and RunFolder(folder).status == "failed"


def test_what_a_killed_session_left_running_is_ended_and_nothing_else(script, deaf, monkeypatch, tmp_path):
    import gpu_state

    _, process = deaf
    monkeypatch.setattr(gpu_state, "_GRACE_S", 0.5)
    gpu_state.Work(tmp_path / "gpu-session-x", tmp_path, "")  # of this process, which lives
    gpu_state.end_leftovers(tmp_path)
    assert process.poll() is None
    owner = tmp_path / "gpu-session-x" / "session.json"
    owner.write_text(json.dumps({"pid": os.getpid(), "began_s": 0.0}))  # another of the same number
    gpu_state.end_leftovers(tmp_path)
    assert process.wait(10) == -signal.SIGKILL


def test_how_busy_the_gpu_was_is_not_how_long_was_measured(script, make_run):
    run = make_run(environment=ENVIRONMENT)
    run.write_state(replace(run.state, phases={"run_s": 0.5 * run.state.elapsed_s}))
    row = {"throttled": [], "seconds": 30.0, "busy": 0.1}
    lines = [row, {**row, "seconds": 10.0, "busy": 0.5}, {**row, "busy": None}]
    (run.path / "device.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = script[1].about(SimpleNamespace(folder=run))
    assert found["gpu_busy"] == pytest.approx(0.2) and found["measuring"] == pytest.approx(0.5)
    (run.path / "device.jsonl").unlink()
    assert script[1].about(SimpleNamespace(folder=run))["gpu_busy"] is None


def test_one_seed_of_the_report_is_whole_before_others_begin(script, monkeypatch, tmp_path):
    """All in one study, whichever session carries a part of it out; a seed that failed is tried with the next."""
    _, gpu_jobs = script
    assert list(gpu_jobs.JOBS)[:3] == ["smoke", "main", "report"] and list(gpu_jobs.JOBS)[-1] == "seeds"
    done, problems = [], []

    def study(path, design=None, progress=True):
        if design is not None:
            StudyFolder.create(path, design, {"label": "a card", "attrs": {}})
        definition = StudyFolder.open(path).definition
        done.append(definition.seeds)
        return SimpleNamespace(problems=[problems.pop()] if problems else [], path=path, definition=definition)

    monkeypatch.setattr(gpu_jobs.tvmlab, "study", study)
    design = gpu_jobs._design(SimpleNamespace(rehearse=False, target="cpu"), 0)
    assert len(design.models) == 3 and design.sources == design.models[:1]
    assert sum(bool(cell.arm) for cell in plan(design)) == 3 + 5 + 5
    problems.append("a cell failed")
    jobs = [gpu_jobs.report, gpu_jobs.seeds]
    assert session(*script, monkeypatch, jobs, tmp_path / "a") == 1
    assert done == [(0,)]
    (tmp_path / "a" / "work" / "runs" / "report").rename(tmp_path / "report")
    done.clear()
    (tmp_path / "b" / "work" / "runs").mkdir(parents=True)
    (tmp_path / "report").rename(tmp_path / "b" / "work" / "runs" / "report")
    assert session(*script, monkeypatch, jobs, tmp_path / "b") == 0
    assert done == [(0,), (0, 1)]
    assert [(row["job"], row["seed"]) for row in rows(tmp_path / "b")[1:]] == [("report", 0), ("seeds", 1)]


def test_of_upstream_s_records_those_that_ran_are_told_apart(script):
    good, failed, none = ([0, [[], seconds, {}, []]] for seconds in ([1e-3, 2e-3], [1e10], []))
    assert script[1].counted([json.dumps(row) for row in (good, failed, none, good)]) == (4, 2)
    assert script[1].counted([]) == (0, 0)


class Points:
    """A space of 80 points, every third not valid, and a measurer that measures them, some of them only."""

    overlaps = False

    def __init__(self, until=80):
        self.until, self.asked = until, []

    def realize(self, index):
        return index if index % 3 else None

    def measure(self, candidates):
        for index in candidates:
            if index >= self.until:
                raise KeyboardInterrupt
            self.asked.append(index)
            yield Measurement(TrialStatus.OK, (index * 1e-6,), build_s=0.1, run_s=0.2)


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_space_goes_on_where_it_was_interrupted(script, tmp_path, overlaps):
    import record_space

    about, path = {"task": "a", "points": 80}, tmp_path / "space_x.begun.jsonl"
    found = {}

    def measured(points):
        points.overlaps = overlaps
        left = [index for index in range(80) if index not in found]
        with path.open("a") as file:
            for batch in record_space.in_batches(points, points, left):
                file.write("".join(json.dumps(row) + "\n" for row in batch))
                file.flush()

    assert record_space.read_begun(path, about) == {}
    with pytest.raises(KeyboardInterrupt):
        measured(Points(until=50))
    with path.open("a") as file:
        file.write("[77, 1")  # it was killed as it wrote
    found = record_space.read_begun(path, about)
    assert sorted(found) == list(range(32)) and found[0] == (None, None) and found[4] == (4.0, [0.1, 0.2])
    again = Points()
    measured(again)
    assert again.asked == [index for index in range(32, 80) if index % 3]
    assert sorted(record_space.read_begun(path, about)) == list(range(80))
    assert record_space.read_begun(path, {**about, "task": "b"}) == {}


def test_the_command_for_a_lent_machine_says_what_there_is_and_runs_the_session(tmp_path):
    command = [str(BENCHMARKS / "gpu_session.sh"), str(tmp_path / "out"), "--list"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable})
    assert done.returncode == 0, done.stdout + done.stderr
    console = (tmp_path / "out" / "console.txt").read_text()
    assert "throughput   Seconds a trial" in done.stdout and done.stdout in console
    assert "driver" in console or "libcuda" in console  # what the loader knows of NVIDIA's


def test_packing_for_a_lent_machine_says_that_the_packer_is_not_there(tmp_path):
    command = ["bash", str(BENCHMARKS / "pack_gpu.sh"), str(tmp_path / "out")]
    missing = {"PYTHON": sys.executable, "PACK_ENV": str(tmp_path / "pack-env.sh")}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **missing})
    assert done.returncode == 1 and f"the packer {missing['PACK_ENV']} is missing" in done.stderr


@pytest.mark.slow
def test_a_session_survives_kernels_that_hang_or_write_elsewhere(script, tmp_path):
    import gpu_hazards

    found = gpu_hazards.measured(target("cpu"), tmp_path)
    assert found["default"] == "ok" and found["survived"], found
    assert found["kernels"]["endless"]["run_s"] > 3 and "SIGSEGV" in found["kernels"]["outside"]["message"]


@pytest.mark.skipif(not has_nvrtc(), reason="needs cuda-bindings and NVRTC")
@pytest.mark.parametrize("arch", ["sm_90a", "sm_80"])
def test_the_kernels_that_a_gpu_session_must_survive_compile(script, arch):
    import gpu_hazards
    import tvm

    device, codes = target(arch), {}
    _, found = gpu_hazards.candidates(device)
    for name, candidate in zip(gpu_hazards.EXPECTED, found, strict=True):
        with device.to_tvm():
            source = tvm.driver.build(candidate.payload.mod, target=device.to_tvm()).imports[0].inspect_source()
        codes[name] = compile_lean(lean_source(source), arch)
    assert codes["before"] == codes["after"] and len(codes["endless"]) > len(codes["before"])  # its loop is there


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
    smoke, hazards = (row for row in found if row["job"] == "smoke")
    assert smoke["tasks"] == 2 and smoke["failures"] == [] and hazards["survived"]
    assert (tmp_path / "a" / "runs.tar.xz").stat().st_size > 1000
    assert any(name.endswith("tiny-best/log.txt") for name in members(tmp_path / "a" / "logs.tar.xz"))
    assert (tmp_path / "a" / "space_tiny.json").exists() and not list((tmp_path / "a").glob("*.begun.jsonl"))
    again = subprocess.run(
        [*command, "--out", tmp_path / "b", "--resume", tmp_path / "a"], capture_output=True, text=True
    )
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    measured = [row for row in rows(tmp_path / "b") if row["job"] != "machine"]
    assert measured == [row for row in found if row["job"] != "machine"]
