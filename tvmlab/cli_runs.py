"""`tvmlab runs`: list, filter, export, import and delete what is in a runs folder. Each is one call of the API."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from tvmlab.console import show
from tvmlab.core import InputError

__all__ = ["add_runs_flags", "call_runs", "runs_dir_flag"]


_NAMES = (
    "runs by id or folder, to export, to delete, or to tell the failed trials of; the folder of the TVM database to "
    "import; the task whose past is to be shown"
)


def runs_dir_flag(parser: argparse.ArgumentParser) -> None:
    """The flag that says where runs are."""
    parser.add_argument("--runs-dir", metavar="FOLDER", help="where runs are kept (default: runs, or $TVMLAB_RUNS)")


def add_runs_flags(parser: argparse.ArgumentParser) -> None:
    """The action, what it is done to, and the flags of all actions."""
    parser.add_argument("action", nargs="?", choices=list(_ACTIONS), default="list", help="what to do (default: list)")
    parser.add_argument("names", nargs="*", metavar="NAME", help=_NAMES)
    parser.add_argument("--model", default="", help="list the runs of this model")
    parser.add_argument("--status", default="", help="list the runs with this status")
    parser.add_argument("--target", help="list the runs for this target; show the past on it; import for it")
    parser.add_argument("-o", "--output", metavar="FILE", help="the archive to export to, which ends in .tar.xz")
    parser.add_argument("--yes", action="store_true", help="delete without being asked")
    runs_dir_flag(parser)


def call_runs(args: argparse.Namespace) -> int:
    """Do the action. Raises InputError where it lacks a name, or has one too many."""
    action, (least, most) = _ACTIONS[args.action]
    if not least <= len(args.names) <= most:
        raise InputError(f"tvmlab runs {args.action} cannot be done with {len(args.names)} names",
                         remedy=f"write tvmlab runs {_USAGES[args.action]}")  # fmt: skip
    return action(args)


def _list(args: argparse.Namespace) -> int:
    from tvmlab.run import runs

    return show(runs(args.runs_dir, model=args.model, target=args.target or "", status=args.status))


def _past(args: argparse.Namespace) -> int:
    from tvmlab.store import past

    task = args.names[0] if args.names else None
    return show(past(task, target=args.target, runs_dir=args.runs_dir))


def _failures(args: argparse.Namespace) -> int:
    from tvmlab.frames import failures
    from tvmlab.records import RunFolder

    return show(failures([RunFolder.open(name, args.runs_dir) for name in args.names]))


def _export(args: argparse.Namespace) -> int:
    from tvmlab.recordings import pack
    from tvmlab.records import RunFolder

    if not args.output:
        raise InputError("there is nowhere to export to", remedy="name an archive, such as -o runs.tar.xz")
    print(pack([RunFolder.open(name, args.runs_dir) for name in args.names], args.output))
    return 0


def _import(args: argparse.Namespace) -> int:
    from tvmlab.imported import import_records

    for run in import_records(args.names[0], args.target, runs_dir=args.runs_dir):
        print(f"{run.id}: {run.state.message}")
    return 0


def _delete(args: argparse.Namespace) -> int:
    from tvmlab.records import RunFolder
    from tvmlab.store import delete_runs

    names = [RunFolder.open(name, args.runs_dir).path for name in args.names]
    if not args.yes and not _agreed(f"delete {', '.join(path.name for path in names)}?"):
        print("nothing was deleted")
        return 0
    print(f"deleted {', '.join(delete_runs(names))}")
    return 0


def _agreed(question: str) -> bool:
    """Ask at the terminal. Raises InputError where there is none."""
    if not sys.stdin.isatty():
        raise InputError("there is nobody to ask", remedy="add --yes to delete without being asked")
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


_MANY = 10**6
# What each action calls, and how many names it takes.
_ACTIONS: dict[str, tuple[Callable[[argparse.Namespace], int], tuple[int, int]]] = {
    "list": (_list, (0, 0)),
    "past": (_past, (0, 1)),
    "failures": (_failures, (1, _MANY)),
    "export": (_export, (1, _MANY)),
    "import": (_import, (1, 1)),
    "delete": (_delete, (1, _MANY)),
}
_USAGES = {
    "list": "[--model MODEL] [--target TARGET] [--status STATUS]",
    "past": "past [TASK] [--target TARGET]",
    "failures": "failures RUN ...",
    "export": "export RUN ... -o FILE.tar.xz",
    "import": "import FOLDER [--target TARGET]",
    "delete": "delete RUN ... [--yes]",
}
