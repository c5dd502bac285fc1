"""Who may import whom: the contracts hold, and no module is outside them."""

import pkgutil
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import tvmlab

ROOT = Path(tvmlab.__file__).parent.parent
CONTRACTS = {
    contract["name"]: contract
    for contract in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
}
MODULES = {module.name for module in pkgutil.iter_modules(tvmlab.__path__)}


def lint(folder):
    """What import-linter says of the package in a folder. Its own cache is left alone."""
    lint_imports = Path(sys.executable).with_name("lint-imports")
    return subprocess.run([lint_imports, "--no-cache"], cwd=folder, capture_output=True, text=True)


def test_the_contracts_are_kept():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout
    assert f"{len(CONTRACTS)} kept, 0 broken" in done.stdout


def test_every_module_has_its_layer():
    layers = CONTRACTS["Rooms are imported one way"]["layers"]
    placed = [name.strip() for layer in layers for name in re.split("[|:]", layer)]
    assert sorted(placed) == sorted(MODULES)


def test_every_module_but_the_widgets_is_kept_from_the_notebook():
    kept = CONTRACTS["Only widgets know the notebook"]["source_modules"]
    assert {name.removeprefix("tvmlab.") for name in kept} == MODULES - {"widgets"}


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("stray", "", "Rooms are imported one way"),
        ("core", "import tvmlab.tasks", "Rooms are imported one way"),
        ("search/evolution", "import tvmlab.measure.replay", "search never imports measure"),
        ("frames", "import tvm", "Reading results needs no TVM"),
        ("stats", "import tvmlab.compat", "Reading results needs no TVM"),
        ("loop", "import ipywidgets", "Only widgets know the notebook"),
    ],
)
def test_a_contract_that_is_broken_is_noticed(tmp_path, module, line, contract):
    shutil.copytree(ROOT / "tvmlab", tmp_path / "tvmlab", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "tvmlab" / f"{module}.py").open("a") as file:
        file.write(f"\n{line}\n")
    done = lint(tmp_path)
    assert done.returncode != 0
    assert module.split("/")[0] in done.stdout
    assert f"{contract} BROKEN" in done.stdout
