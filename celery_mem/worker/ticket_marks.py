"""Whether a process runs a ticket, told by a lock on a file: also of one whose task lets no thread answer."""

from __future__ import annotations

import contextlib
import fcntl
import os

_ENDING = ".work"


class TicketMark:
    """The mark of this process. It falls with the process, however that ends.

    Args:
        folder: of the sockets by which the processes of a node speak.
        process: identity.
    """

    def __init__(self, folder: str, process: str) -> None:
        self._fd = os.open(
            _path(folder, process), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )

    def set(self) -> None:
        """A ticket begins."""
        fcntl.flock(self._fd, fcntl.LOCK_EX)  # whoever looks holds it for a moment

    def clear(self) -> None:
        """It is over."""
        fcntl.flock(self._fd, fcntl.LOCK_UN)

    def close(self) -> None:
        """Give the mark up."""
        os.close(self._fd)


def is_marked(folder: str, process: str) -> bool:
    """Tell whether a process runs a ticket."""
    try:
        fd = os.open(_path(folder, process), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def remove_mark(folder: str, process: str) -> None:
    """Remove what a process left that is gone."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(_path(folder, process))


def _path(folder: str, process: str) -> str:
    return f"{folder}/{process}{_ENDING}"
