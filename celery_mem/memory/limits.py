"""How much memory this process may count on, and how much others take: what the system says."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterable

CGROUPS = "/sys/fs/cgroup"
_UNLIMITED = 1 << 60  # cgroup v1 writes a number near 2**63


def available_memory(root: str = CGROUPS, membership: str = "/proc/self/cgroup") -> int:
    """Return the least of the host's memory and the limits of the cgroups that this process is in, bytes."""
    return min([_host_memory(), *_cgroup_limits(root, membership)])


def memory_limit(told: int, share: int = 1) -> int:
    """Return the bytes that a node may use.

    Args:
        told: what the settings say; 0 leaves it to the system.
        share: nodes among which the system's memory is divided.
    """
    return told or available_memory() // max(1, share)


def private_memory(pids: Iterable[int]) -> int:
    """Return the bytes that processes have for themselves: without the files that they map."""
    own = [_private_memory(pid) for pid in pids]
    return sum(n for n in own if n is not None)


def child_processes(parent: int) -> list[int]:
    """Return the pids of the direct children of a process."""
    with contextlib.suppress(OSError):
        found = []
        for thread in os.listdir(f"/proc/{parent}/task"):
            with open(f"/proc/{parent}/task/{thread}/children") as file:
                found += [int(pid) for pid in file.read().split()]
        return found
    return [int(pid) for pid in _ask_ps("-o", "pid=", "--ppid", str(parent))]


def _private_memory(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            for line in file:
                if line.startswith(b"RssAnon:"):
                    return int(line.split()[1]) << 10
    except OSError:
        if os.path.isdir("/proc/self"):
            return None  # it has ended
    resident = _ask_ps("-o", "rss=", "-p", str(pid))
    return int(resident[0]) << 10 if resident else None


def _ask_ps(*args: str) -> list[str]:
    try:
        return subprocess.run(["ps", *args], capture_output=True, text=True, check=False).stdout.split()  # noqa: S607
    except OSError:
        return []


def _host_memory() -> int:
    return int(os.sysconf("SC_PAGE_SIZE")) * int(os.sysconf("SC_PHYS_PAGES"))


def _cgroup_limits(root: str, membership: str) -> list[int]:
    limits = []
    try:
        with open(membership) as file:
            lines = file.read().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            limits += _limits_above(root, path, "memory.max")
        elif "memory" in controllers.split(","):
            limits += _limits_above(f"{root}/memory", path, "memory.limit_in_bytes")
    return [n for n in limits if n < _UNLIMITED]


def _limits_above(root: str, path: str, name: str) -> list[int]:
    """Read the limits of a cgroup and of those it is in. In a container the path may be the host's."""
    found = []
    while True:
        try:
            with open(f"{root}/{path.strip('/')}/{name}") as file:
                text = file.read().strip()
            if text.isdigit():
                found.append(int(text))
        except OSError:
            pass
        if path.strip("/") == "":
            return found
        path = os.path.dirname(path.rstrip("/"))
