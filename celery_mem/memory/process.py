"""Processes by an identity that is never given twice: the pid, and when it started.

A pid alone comes back, in a container that starts anew even at once: what died there would seem alive.
"""

from __future__ import annotations

import os


def own_identity() -> str:
    """Return "<pid>-<start>" of this process."""
    pid = os.getpid()
    return f"{pid}-{_started(pid) or 0}"


def is_alive(identity: str) -> bool:
    """Tell whether a process runs; one that ended and waits for its parent to notice does not."""
    pid, _, started = identity.partition("-")
    if os.path.isdir("/proc/self"):
        return _started(int(pid)) == int(started or 0)
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _started(pid: int) -> int | None:
    """Return when a process started, in ticks since the machine did; None if it does not run."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()  # the name before it may contain anything
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])
