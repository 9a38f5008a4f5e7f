"""Peak memory of a contender, sampled by a process outside of it, every page counted once.

    python -m benchmarks.memory PID [GLOB]     samples until its input ends, then prints bytes

The proportional set size of a process divides a page among those that map it, so the sum over all
of a contender's processes counts each once. Shared memory that is in files and that nobody maps at
the moment has no such share; GLOB names those files, and the larger of the two sums counts.
"""

from __future__ import annotations

import glob
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

INTERVAL_S = 0.05


class PeakMemory:
    """Within the `with` block, memory of this process and of all it started is watched.

    Attributes:
        mib: the peak, once the block is over.
    """

    def __init__(self, shared_files: str = "") -> None:
        self.mib = 0.0
        self._shared_files = shared_files

    def __enter__(self) -> Self:
        self._sampler = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.memory", str(os.getpid()), self._shared_files],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._sampler.stdout is not None
        self._sampler.stdout.readline()  # it has taken its first sample
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        out, _ = self._sampler.communicate()
        if kind is None:
            self.mib = int(out) / 2**20


def memory_of(pids: Iterable[int], shared_files: str = "") -> int:
    """Bytes that these processes keep together; one that ends meanwhile counts for nothing."""
    private = shared = 0
    for pid in pids:
        pss, pss_shared = _shares(pid)
        private += pss - pss_shared
        shared += pss_shared
    return private + max(shared, _bytes_in(shared_files))


def _shares(pid: int) -> tuple[int, int]:
    """Proportional set size of a process, and what of it is shared memory, bytes."""
    kib = {"Pss:": 0, "Pss_Shmem:": 0}
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as lines:
            for line in lines:
                name, value, *_ = line.split()
                if name in kib:
                    kib[name] = int(value)
    except OSError:
        return 0, 0
    return kib["Pss:"] << 10, kib["Pss_Shmem:"] << 10


def _bytes_in(pattern: str) -> int:
    """Bytes of the files that any of some patterns, separated by colons, means."""
    total = 0
    for path in (p for part in pattern.split(":") if part for p in glob.iglob(part, recursive=True)):
        try:
            total += os.lstat(path).st_blocks * 512
        except OSError:
            pass  # gone
    return total


def family(known: set[int]) -> set[int]:
    """Those of `known` that live, and all processes below them; what lost its parent stays in."""
    children: dict[int, list[int]] = {}
    alive = set()
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                stat = Path(entry.path, "stat").read_text(errors="replace")
            except OSError:
                continue
            parent = int(stat.rpartition(")")[2].split()[1])
            alive.add(int(entry.name))
            children.setdefault(parent, []).append(int(entry.name))
    found: set[int] = set()
    left = list(known & alive)
    while left:
        pid = left.pop()
        if pid not in found:
            found.add(pid)
            left.extend(children.get(pid, ()))
    return found


def main() -> None:
    root, pattern = int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else ""
    known, peak, is_over = {root}, 0, False
    while not is_over:
        started = time.monotonic()
        known = family(known) - {os.getpid()}
        if peak == 0:
            print("watching", flush=True)
        peak = max(peak, memory_of(known, pattern))
        # To walk the page tables of gigabytes takes a while; it shall take no more than half of a processor.
        cost_s = time.monotonic() - started
        is_over = bool(select.select([sys.stdin], [], [], max(INTERVAL_S - cost_s, cost_s))[0])
    print(peak)


if __name__ == "__main__":
    main()
