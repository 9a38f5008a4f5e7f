"""The first process of a host made of namespaces: gives it a name and folders of its own, then only waits.

    init.py NAME SHM_BYTES KEPT...

NAME        what the host is called
SHM_BYTES   size of its /dev/shm; its temp folder may grow to half of the machine's memory
KEPT        folders that stay visible though the host's own temp folder lies over them

Run by path, as number 1 of a process namespace. It waits for whatever became an orphan there; when it ends,
the kernel ends every other process of the namespace.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys

TEMP = "/tmp"
MS_BIND, MS_REC = 4096, 16384


def mount(source: str, target: str, kind: str | None, flags: int = 0, options: str | None = None) -> None:
    """Call mount(2). The program of that name would resolve the links of /proc, and find what is hidden."""
    libc = ctypes.CDLL(None, use_errno=True)
    words = [None if word is None else os.fsencode(word) for word in (source, target, kind, options)]
    if libc.mount(*words[:3], ctypes.c_ulong(flags), words[3]):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), target)


def furnish(name: str, shm_bytes: int, kept: list[str]) -> None:
    """Set the host's name, and mount its folders."""
    socket.sethostname(name)
    hidden = [path for path in kept if os.path.realpath(path).startswith(TEMP + "/")]
    handles = [os.open(path, os.O_PATH) for path in hidden]
    mount("tmpfs", "/dev/shm", "tmpfs", options=f"size={shm_bytes},mode=1777")
    mount("tmpfs", TEMP, "tmpfs", options="mode=1777")
    for path, handle in zip(hidden, handles, strict=True):
        os.makedirs(path, exist_ok=True)
        mount(f"/proc/self/fd/{handle}", path, None, MS_BIND | MS_REC)
        os.close(handle)


def main() -> None:
    """Furnish the host, say so, and wait for the dead until told to end."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    furnish(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
    print("up", flush=True)  # noqa: T201 - its parent waits for it
    while True:
        try:
            os.wait()
        except ChildProcessError:
            signal.sigwait([signal.SIGCHLD])


if __name__ == "__main__":
    main()
