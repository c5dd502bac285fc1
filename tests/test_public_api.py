"""The public names: all there, loaded lazily, and not shadowed by the modules of the same name."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tvmlab

HEAVY = ["tvm", "ipywidgets", "IPython", "pandas", "numpy", "matplotlib", "onnx", "pydantic"]
SAME_NAME = ["models", "targets", "tasks", "compare", "report", "study", "doctor", "presets"]


def python(code):
    """What a fresh interpreter prints for a piece of code, parsed as JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_importing_tvmlab_imports_nothing_heavy():
    loaded = python("import tvmlab, sys, json; print(json.dumps(sorted(sys.modules)))")
    assert "tvmlab" in loaded
    assert not set(HEAVY) & set(loaded)


def test_reading_a_run_needs_no_tvm():
    read = "tvmlab.RunFolder, tvmlab.Experiment, tvmlab.frames"
    assert python(f"import tvmlab, sys, json; {read}; print(json.dumps('tvm' in sys.modules))") is False


def test_functions_stay_callable_after_their_modules_were_imported():
    modules = "; ".join(f"import tvmlab.{name}" for name in SAME_NAME)
    kinds = python(
        f"import json, tvmlab; {modules}; "
        f"print(json.dumps([type(getattr(tvmlab, name)).__name__ for name in {SAME_NAME}]))"
    )
    assert kinds == ["function"] * len(SAME_NAME)


@pytest.mark.parametrize("name", tvmlab.__all__)
def test_every_public_name_resolves(name):
    found = getattr(tvmlab, name)
    assert getattr(tvmlab, name) is found
    modules = ("claims", "descent", "frames", "gains", "plots", "published", "published_selective", "stats")
    if name not in modules:
        assert callable(found) and found.__doc__


def test_what_the_data_are_said_to_be_opened_by_is_public():
    data = Path(__file__).parents[1] / "data"
    said = {name for path in data.rglob("README.md") for name in re.findall(r"\btvmlab\.(\w+)", path.read_text())}
    assert "recorded" in said and said <= set(tvmlab.__all__)


def test_dir_lists_the_public_names_and_no_more():
    assert dir(tvmlab) == sorted(tvmlab.__all__)
    assert {"tune", "Experiment", "Ansor", "models", "compare"} <= set(dir(tvmlab))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'tunes'"):
        _ = tvmlab.tunes
