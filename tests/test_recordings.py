"""Recordings: what is packed comes back, nobody's paths with it, and what cannot be read says so."""

import importlib
import lzma
import tarfile

import orjson
import pandas as pd
import pytest

from tvmlab import Ansor, Study, StudyFolder, frames
from tvmlab.core import InputError, RecordError, RunError
from tvmlab.privacy import without_folders
from tvmlab.recordings import pack, recorded

recordings = importlib.import_module("tvmlab.recordings")  # tvmlab.recordings is the function of that name

ENVIRONMENT = {
    "target": {"label": "test-cpu", "roofline": {"peak_gflops": 100.0, "bandwidth_gbs": 10.0}},
    "versions": {"tvmlab": "0.1.0", "apache-tvm": "0.27.0"},
    "command": ["/home/somebody/tvmlab/search_process.py", "/home/somebody/runs/x"],
}


@pytest.fixture
def run(make_run):
    folder = make_run(environment=ENVIRONMENT)
    (folder.path / "log.txt").write_text("what was printed")
    (folder.path / "lock").touch()
    for name in ("database_workload.json", "database_tuning_record.json"):
        (folder.path / name).write_text('["/aGVsbG8/d29ybGQ="]\n')
    return folder


@pytest.fixture
def archive(run, tmp_path):
    return pack(run, tmp_path / "made" / "small.tar.xz", note="by a test")


def names(archive):
    with tarfile.open(archive) as found:
        return found.getnames()


def test_a_run_comes_back_as_it_was(run, archive, tmp_path):
    found = recorded(archive, cache=tmp_path / "cache")
    assert [folder.id for folder in found] == [run.id]
    pd.testing.assert_frame_equal(frames.trials(found, details=True), frames.trials(run, details=True))
    pd.testing.assert_frame_equal(frames.summary(found), frames.summary(run))
    assert found[0].experiment == run.experiment


def test_it_says_what_it_is(archive, tmp_path):
    found = recorded(archive, cache=tmp_path / "cache")
    assert found.name == "small" and found.about["note"] == "by a test"
    for part in ("recorded ", "test-cpu", "TVM 0.27.0"):
        assert part in found.label and part in repr(found) and part in found._repr_html_()


def test_the_databases_are_unpacked_when_asked_for(archive, tmp_path):
    name = "database_workload.json"
    without = recorded(archive, cache=tmp_path / "cache")
    assert not (without[0].path / name).exists()
    whole = recorded(archive, database=True, cache=tmp_path / "cache")
    assert (whole[0].path / name).read_text() == '["/aGVsbG8/d29ybGQ="]\n'


def test_no_log_no_lock_no_command_no_path(make_run, tmp_path):
    from tvmlab.core import TrialStatus

    run = make_run([("dense", TrialStatus.BUILD_ERROR)], environment=ENVIRONMENT, model="/home/somebody/nets/mine.onnx")
    message = "ld:\\n/home/jürgen/x/a.so is missing\n/home/jo hn/my nets/b.onnx at Conv (/layer1/conv1/Conv_output_0)"
    run.write_json("state.json", {**run.read_json("state.json"), "message": message})
    run.write_json("transfer.json", {"steps": {"0": {"pool": ["/data/jürgen, his (old)/run", "run-2"]}}, "rows": []})
    with (run.path / "trials.jsonl").open("ab") as file:  # and a process that was killed as it wrote
        file.write('{"message": "in /home/jürgen/x/c.so'.encode())
    path = pack(run, tmp_path / "x.tar.xz")
    assert not [name for name in names(path) if name.endswith(("log.txt", "lock"))]
    with tarfile.open(path) as found:
        text = b"".join(found.extractfile(member).read() for member in found if "database" not in member.name)
    assert b"/home" not in text and b"mine.onnx" in text and b"search_process" not in text
    assert "jürgen" not in text.decode() and b'"in c.so' in text
    found = recorded(path, cache=tmp_path / "cache")[0]
    assert found.experiment.model == "mine.onnx" and found.read_json("transfer.json")["steps"]["0"]["pool"][0] == "run"
    assert found.state.message == "ld:\\na.so is missing\nb.onnx at Conv (/layer1/conv1/Conv_output_0)"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/home/jürgen/nets/m.onnx", "m.onnx"),
        ("/home/jo hn/nets/m.onnx", "m.onnx"),
        ("cannot read '/home/jo hn/my nets/m 2.onnx' (no such file)", "cannot read 'm 2.onnx' (no such file)"),
        ("before\n/home/u/x/m.onnx", "before\nm.onnx"),
        (r"before\n/home/u/x/m.onnx\nafter", r"before\nm.onnx\nafter"),
        ("/a/b.onnx is empty, see /c/d.txt", "b.onnx is empty, see d.txt"),
        ("there is none in /home/jürgen: export it", "there is none in ~: export it"),
        ("~/nets/m.onnx or ~jürgen/x/m.onnx", "m.onnx or m.onnx"),
        ("no '/home/u/a.so' nor \"/home/O'Brien/b.so\"", "no 'a.so' nor \"b.so\""),
        ("file:///home/u/m.onnx", "file:m.onnx"),
        ("/layer1/conv1/Conv_output_0", None),
        ("/features/features.0/BatchNormalization", None),
        ("/home/jürgen/Nets", "Nets"),
        ("see https://tvm.apache.org/docs/install, docs/tvm.md, 3/4/5 and (a)/(b)/c", None),
        ("../nets/m.onnx", None),
    ],
)
def test_of_an_absolute_path_its_name_is_left(text, left):
    found = orjson.loads(without_folders(orjson.dumps([{"message": text}, 1.5])))
    assert found == [{"message": text if left is None else left}, 1.5]


@pytest.mark.parametrize(
    "path", ["/srv/jürgen, x/m.onnx", "/srv/a: b/m.onnx", "~/nets (old)/m.onnx", "/srv/'x'/m.onnx"]
)
def test_a_field_that_holds_a_path_is_one_from_end_to_end(path):
    asked = {"experiment": {"model": path, "steps": [{"warm_start": [path], "steps": [{"source": [path, "alexnet"]}]}]}}
    found = orjson.loads(without_folders(orjson.dumps(asked)))["experiment"]
    assert (found["model"], found["steps"][0]["warm_start"]) == ("m.onnx", ["m.onnx"])
    assert found["steps"][0]["steps"][0]["source"] == ["m.onnx", "alexnet"]


def test_the_same_runs_give_the_same_archive(run, archive, tmp_path):
    again = pack(run, tmp_path / "again" / "small.tar.xz", note="by a test")
    assert again.read_bytes() == archive.read_bytes()


def test_a_folder_of_runs_is_packed_with_what_lies_in_it(make_run, tmp_path):
    first, second = make_run(environment=ENVIRONMENT), make_run(environment=ENVIRONMENT, seed=1)
    (first.path.parent / "study.json").write_text("{}")
    (first.path.parent / "comparisons").mkdir()
    (first.path.parent / "comparisons" / "a.json").write_text("[1]")
    found = recorded(pack(first.path.parent, tmp_path / "s.tar.xz"), cache=tmp_path / "cache")
    assert {run.id for run in found} == {first.id, second.id}
    assert (found.folder_path / "comparisons" / "a.json").read_text() == "[1]"
    assert (found.folder_path / "study.json").exists()
    assert set(frames.summary(found)["seed"]) == {0, 1}


def test_a_run_that_never_began_is_packed_with_the_others(make_run, tmp_path):
    good, failed = make_run(environment=ENVIRONMENT), make_run(environment=None, tasks=(), trials=[], status="failed")
    found = recorded(pack(good.path.parent, tmp_path / "s.tar.xz"), cache=tmp_path / "cache")
    assert {run.id for run in found} == {good.id, failed.id}
    assert found.about["targets"] == ["test-cpu"] and found.about["trials"] == good.state.trials
    alone = recorded(pack(failed, tmp_path / "one.tar.xz"), cache=tmp_path / "cache")
    assert [run.status for run in alone] == ["failed"] and alone.about["targets"] == []


@pytest.mark.parametrize("left", ["whole", "begun"])
def test_a_folder_that_a_killed_process_was_making_is_not_packed(make_run, tmp_path, left):
    good, other = make_run(environment=ENVIRONMENT), make_run(environment=ENVIRONMENT)
    scratch = good.path.with_name(".new-abc")
    scratch.mkdir()
    other.path.rename(scratch / other.id)
    if left == "begun":
        (scratch / other.id / "experiment.json").write_text("{")
    path = pack(good.path.parent, tmp_path / "s.tar.xz")
    assert not [name for name in names(path) if ".new" in name or other.id in name]
    assert [run.id for run in recorded(path, cache=tmp_path / "cache")] == [good.id]


def test_what_is_no_study_is_not_opened_as_one(archive, tmp_path):
    with pytest.raises(RecordError, match="is not a study"):
        _ = recorded(archive, cache=tmp_path / "cache").study


def test_what_a_session_on_a_gpu_brought_back_is_found(run, tmp_path, monkeypatch):
    """As gpu_session.py packs it: runs side by side with the folder of a study."""
    study = run.path.parent / "report"
    StudyFolder.create(study, Study(models=["alexnet"], arms={"ansor": [Ansor(8)]}), {"label": "an H200", "attrs": {}})
    pack(run.path.parent, tmp_path / "data" / "gpu-h200" / "runs.tar.xz")
    monkeypatch.setattr(recordings, "data_dir", lambda part: tmp_path / "data" / part)
    monkeypatch.setattr(recordings.platformdirs, "user_cache_dir", lambda name: tmp_path / "cache")
    (found,) = recordings.gpu_recordings()
    assert [folder.id for folder in found] == [run.id]
    assert [each.definition.models for each in found.studies] == [("alexnet",)]


def test_unpacking_twice_is_done_once(archive, tmp_path, monkeypatch):
    first = recorded(archive, cache=tmp_path / "cache")
    monkeypatch.setattr(recordings, "_unpack", None)
    assert recorded(archive, cache=tmp_path / "cache").folder_path == first.folder_path
    assert not list((tmp_path / "cache").glob(".*"))


def test_another_archive_of_the_same_name_is_unpacked_anew(make_run, archive, tmp_path):
    before = recorded(archive, cache=tmp_path / "cache")
    pack(make_run(environment=ENVIRONMENT, seed=7), archive)
    after = recorded(archive, cache=tmp_path / "cache")
    assert after.folder_path != before.folder_path and after[0].experiment.seed == 7


def test_what_was_unpacked_and_went_on_is_packed_as_it_is_now(make_run, tmp_path):
    """As a session on a lent machine does: unpack what an earlier one left, add a run, pack it again."""
    first = make_run(environment=ENVIRONMENT)
    folder = first.path.parent
    earlier = pack(folder, tmp_path / "s.tar.xz", note="the first session")
    with tarfile.open(earlier) as found:
        found.extractall(folder, filter="data")
    second = make_run(environment=ENVIRONMENT, seed=1)
    again = pack(folder, tmp_path / "again" / "s.tar.xz", note="the second session")
    assert names(again).count("recording.json") == 1 and names(again)[0] == "recording.json"
    opened = recorded(again, cache=tmp_path / "cache")
    assert {run.id for run in opened} == {first.id, second.id} and opened.about["note"] == "the second session"


def test_the_level_is_of_time_and_space_not_of_what_is_in_it(run, archive, tmp_path):
    (run.path / "database_workload.json").write_text("".join(f"[{number * number}]\n" for number in range(20_000)))
    small, large = (pack(run, tmp_path / str(level) / "x.tar.xz", level=level) for level in (9, 0))
    assert small.stat().st_size < large.stat().st_size
    with lzma.open(small) as one, lzma.open(large) as other:
        assert one.read() == other.read()
    with pytest.raises(InputError, match="xz has no level 10: choose one of 0 to 9"):
        pack(run, tmp_path / "x.tar.xz", level=10)


def test_a_running_run_is_not_packed(make_run, tmp_path):
    run = make_run(environment=ENVIRONMENT, status="running")
    with run.lock().acquire(), pytest.raises(RunError, match="still running"):
        pack(run, tmp_path / "x.tar.xz")


@pytest.mark.parametrize(
    ("name", "problem"), [("x.zip", "end it with .tar.xz"), ("x.tar.xz", "holds no runs")], ids=["ending", "empty"]
)
def test_what_cannot_be_packed(tmp_path, name, problem):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=problem):
        pack(tmp_path / "empty", tmp_path / name)


def test_an_unknown_name_lists_what_there_is(tmp_path, archive, monkeypatch):
    monkeypatch.setattr(recordings, "data_dir", lambda part: archive.parent)
    with pytest.raises(InputError, match="there is no recording 'smal': there are small"):
        recorded("smal")
    with pytest.raises(InputError, match="no recording"):
        recorded(tmp_path / "nothing.tar.xz")
    assert recordings.recordings().loc["small", "runs"] == 1
    assert recorded("small", cache=tmp_path / "cache").name == "small"


def cut(content):
    return content[: len(content) // 2]


def overwritten(content):
    return content[:40] + bytes(40) + content[80:]


@pytest.mark.parametrize("damage", [cut, overwritten, lambda content: b"", lambda content: b"no archive"])
@pytest.mark.parametrize("database", [False, True])
def test_a_damaged_archive_is_named_and_leaves_nothing(archive, tmp_path, damage, database):
    archive.write_bytes(damage(archive.read_bytes()))
    with pytest.raises(RecordError, match=r"small\.tar\.xz is damaged .*restore it"):
        recorded(archive, database=database, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*")) if (tmp_path / "cache").exists() else True


def written(path, content):
    """An archive with this recording.json."""
    with lzma.open(path, "w") as packed, tarfile.open(fileobj=packed, mode="w") as found:
        (path.parent / "about").write_bytes(content)
        found.add(path.parent / "about", "recording.json")
    return path


def test_an_archive_of_a_newer_tvmlab_or_of_something_else(tmp_path):
    newer = written(tmp_path / "n.tar.xz", orjson.dumps({"format": recordings.FORMAT + 1}))
    with pytest.raises(RecordError, match="install a newer tvmlab"):
        recorded(newer, cache=tmp_path)
    for content in (b"[]", b"{}", b'{"format": 1}', b'{"format": "one", "name": "x", "runs": []}'):
        other = written(tmp_path / "o.tar.xz", content)
        with pytest.raises(RecordError, match="is not a recording"):
            recorded(other, cache=tmp_path)


@pytest.mark.parametrize("name", ["../elsewhere", "runs/../../elsewhere", "/etc", 7])
def test_an_archive_that_names_what_is_not_in_it_is_refused(tmp_path, name):
    about = {"format": recordings.FORMAT, "name": "x", "runs": ["fine", name]}
    path = written(tmp_path / "o.tar.xz", orjson.dumps(about))
    for _ in range(2):
        with pytest.raises(RecordError, match=r"o\.tar\.xz .*make another with tvmlab\.pack"):
            recorded(path, cache=tmp_path / "cache")


def test_an_archive_with_a_second_description_is_read_by_what_was_unpacked(tmp_path):
    good, bad = (orjson.dumps({"format": 1, "name": "x", "runs": runs}) for runs in ([], ["../elsewhere"]))
    with tarfile.open(tmp_path / "two.tar.xz", "w:xz") as archive:
        for content in (good, bad):
            (tmp_path / "about").write_bytes(content)
            archive.add(tmp_path / "about", "recording.json")
    with pytest.raises(RecordError, match="names a run that is not in it"):
        recorded(tmp_path / "two.tar.xz", cache=tmp_path / "cache")


def test_what_came_with_the_project_opens(tmp_path):
    """Every recording in data/ is whole, its runs are done, and the README names it."""
    table = recordings.recordings()
    readme = (recordings.data_dir("recorded_runs") / "README.md").read_text()
    for name in table.index:
        assert f"`{name}`" in readme
        found = recorded(name, cache=tmp_path)
        assert len(found) == table.loc[name, "runs"]
        assert {run.status for run in found} == {"done"}
