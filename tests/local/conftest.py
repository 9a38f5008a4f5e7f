import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil
import pytest

from celery_mem.local.processes import Processes

SLEEPER = ["sleep", "1000"]
POOL = ["sh", "-c", "sleep 1000 & sleep 1000 & echo pool is up; wait"]
"""Stands in for a worker: a main process with two children in its group."""


def members(pid: int) -> list[psutil.Process]:
    """Live processes of the group that `pid` leads."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == pid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            pass
    return found


def all_gone(processes: Iterable[psutil.Process], timeout: float = 10) -> bool:
    """Wait until processes have ended; a zombie has, whoever is to wait for it."""
    deadline = time.monotonic() + timeout
    for process in processes:
        try:
            watch = os.pidfd_open(process.pid)  # readable once the process has ended
        except ProcessLookupError:
            continue
        try:
            left = max(0, deadline - time.monotonic())
            if process.is_running() and not select.select([watch], [], [], left)[0]:
                return False
        finally:
            os.close(watch)
    return True


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    folder = tmp_path / "cluster"
    folder.mkdir()
    with_grace = Processes(str(folder), os.environ, grace_s=2)
    yield with_grace
    with_grace.close()
    assert not folder.exists()


@pytest.fixture
def parent() -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Run Python code in a process of its own, which a test may kill."""
    running: list[subprocess.Popen[str]] = []

    def run(code: str) -> subprocess.Popen[str]:
        # 3.12 warns about a fork beside threads; some of these parents fork on purpose.
        command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code]
        running.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return running[-1]

    yield run
    for process in running:
        process.kill()
        process.communicate()
