"""What a run is made on: the commits of the user's repository and of tvmlab's."""

import subprocess

import pytest

from tvmlab import environment


def commit(folder):
    """A repository in a folder with one commit, whose hash is returned."""
    as_somebody = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
    for arguments in (["init", "-q"], [*as_somebody, "commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", "-C", folder, *arguments], check=True)
    found = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


@pytest.fixture
def repositories(tmp_path, monkeypatch):
    """The user's repository, where runs are started, and tvmlab's, where the package is; their commits."""
    user, ours = tmp_path / "user", tmp_path / "tvmlab"
    (ours / "tvmlab").mkdir(parents=True)
    user.mkdir()
    monkeypatch.chdir(user)
    monkeypatch.setattr(environment, "_PACKAGE", ours / "tvmlab")
    return commit(user), commit(ours)


def test_the_commit_of_tvmlab_is_noted_beside_that_of_the_users_repository(repositories):
    user, ours = repositories
    facts = environment.describe()
    assert facts["git"] == {"commit": user, "changed": False}
    assert facts["tvmlab_git"] == {"commit": ours, "changed": False}


def test_an_installed_package_has_no_commit_even_within_the_users_repository(repositories, tmp_path, monkeypatch):
    installed = tmp_path / "user" / "venv" / "tvmlab"
    installed.mkdir(parents=True)
    monkeypatch.setattr(environment, "_PACKAGE", installed)
    facts = environment.describe()
    assert facts["git"] is not None and facts["tvmlab_git"] is None


def test_outside_any_checkout_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "_PACKAGE", tmp_path)
    facts = environment.describe()
    assert facts["git"] is None and facts["tvmlab_git"] is None
