"""Whether a lock file is held, for who may only read it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

__all__ = ["is_held"]


def is_held(path: Path) -> bool | None:
    """Whether a living process has locked a file; None where that cannot be told.

    `filelock` opens a lock to write, which another user's does not allow. A shared lock needs no more than reading it,
    and is had for an instant unless somebody holds the file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
