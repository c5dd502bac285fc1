"""The examples in docstrings do what they say."""

import doctest
import importlib
import tempfile
from pathlib import Path

import pytest

import tvmlab

ROOT = Path(tvmlab.__file__).parent
FILES = [path for path in sorted(ROOT.rglob("*.py")) if ">>> " in path.read_text()]


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_the_examples_of_a_module(path, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    module = importlib.import_module(".".join(path.relative_to(ROOT.parent).with_suffix("").parts))
    found = doctest.testmod(module)
    assert (found.failed, found.attempted) == (0, path.read_text().count(">>> "))  # what is not found is not tested
