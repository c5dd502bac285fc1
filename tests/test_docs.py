"""What README and docs/howto.md show works as they show it: names, commands, and what needs no search."""

import ast
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

import tvmlab
from tvmlab import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs" / "howto.md"]


def blocks(kind):
    """The fenced blocks of a language."""
    return [
        found
        for page in PAGES
        for found in re.findall(rf"^```{kind}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    ]


def the_block_with(text):
    (code,) = [code for code in blocks("python") if text in code]
    return code


def commands():
    """Each line that starts with tvmlab, in a block of shell or in the text."""
    for page in PAGES:
        text = page.read_text()
        shown = "".join(re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)).splitlines()
        for line in [*shown, *re.findall(r"`(tvmlab [^`]+)`", text)]:
            if line.startswith("tvmlab "):
                yield line


@pytest.mark.parametrize("code", blocks("python"))
def test_every_name_of_tvmlab_is_there(code):
    """Of modules too: tvmlab.frames.tasks."""
    names = [ast.unparse(node) for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Attribute)]
    for name in filter(re.compile(r"tvmlab\.[\w.]+").fullmatch, names):
        found = tvmlab
        for part in name.split(".")[1:]:
            found = getattr(found, part)


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_every_command_is_one(line, monkeypatch):
    """argparse ends the process with 2 where a command or a flag is none."""
    done = []
    known = {
        name: replace(command, call=lambda args, name=name: done.append(name) or 0)
        for name, command in cli._COMMANDS.items()
    }
    monkeypatch.setattr(cli, "_COMMANDS", known)
    arguments = shlex.split(line, comments=True)[1:]
    if "--help" in arguments:
        with pytest.raises(SystemExit, match="0"):
            cli.main(arguments)
    else:
        assert cli.main(arguments) == 0 and done == [arguments[0]]


def test_the_demonstration_in_class_runs():
    shown = {}
    exec(f"import tvmlab\n{the_block_with('tuner_curves')}", shown)
    assert set(shown["found"]["tuner"]) == {"xgb", "droplet", "random"}


def test_the_study_is_one():
    shown = {}
    exec(f"import tvmlab\n{the_block_with('tvmlab.Study(').split('print(')[0]}", shown)
    assert [len(steps) for steps in shown["study"].arms.values()] == [1, 2]
