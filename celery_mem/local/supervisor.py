"""Starts the processes of one LocalCluster, watches them, and ends them when its parent goes.

Run by path as a script and built on the quick part of the standard library (no dataclasses): up in 30 ms.

    supervisor.py FOLDER GRACE

stdin   one JSON object a line, each a process to start:
        {"name", "argv", "log": path or null, "stage": int, "restart": bool}.
        Its end (the parent closed it, or is gone for any reason) stops everything.
stdout  one JSON object a line: {"event": "started", "name", "pid"},
        {"event": "ended", "name", "pid", "code"}, {"event": "refused", "name", "error"}.
        Its end says that no process and no FOLDER is left.

What dies, and who cleans up:
- the parent, even by SIGKILL: stdin ends, the supervisor stops all;
- the supervisor by SIGKILL: its fork, the keeper, sees their pipe end, kills every process group and
  removes FOLDER;
- both at once: the kernel kills each direct child (Linux, PR_SET_PDEATHSIG), and a Celery pool child ends
  when it finds its parent gone.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from typing import Any, NoReturn

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
FIRST_DELAY_S, LONGEST_DELAY_S = 0.5, 30.0
BEREAVED_S = 15.0
"""What is left of a dead worker's group has so long to report and end; a node lease is 10 s."""
SETTLED_S = 30.0
"""A process that lived so long begins anew with the first delay when it dies."""


class Process:
    """One process to keep, leader of a session and a group of its own."""

    def __init__(self, name: str, argv: list[str], log: str | None, stage: int, restart: bool) -> None:
        self.name, self.argv, self.log = name, argv, log
        self.stage = stage  # the highest stage is stopped first
        self.restart = restart
        self.child: subprocess.Popen[bytes] | None = None
        self.started_s = 0.0
        self.delay_s = FIRST_DELAY_S
        self.due_s: float | None = None  # when to start it again


class Supervisor:
    """The loop that waits for its parent's words, its children's ends and nothing else."""

    def __init__(self, folder: str, grace_s: float) -> None:
        self.folder = folder
        self.grace_s = grace_s
        self.processes: dict[str, Process] = {}
        self.buffer = b""
        self.stopping = False
        self._bereaved: dict[int, float] = {}  # group whose leader died -> when what is left of it is killed
        self._pid = os.getpid()
        self._prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
        if self._prctl is not None:
            # Children of a dead worker become ours and not those of pid 1: so we can wait for their ends.
            self._prctl(PR_SET_CHILD_SUBREAPER, 1)
        self._wake, wake_end = os.pipe()
        for end in (self._wake, wake_end):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(wake_end, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])  # the thread that started us may have blocked some
        self._wake_end = wake_end
        self._start_keeper()

    def run(self) -> None:
        """Serve until the parent goes or a signal says stop; then stop everything."""
        while not self.stopping:
            readable, _, _ = select.select([0, self._wake], [], [], self._pause_s())
            if self._wake in readable:
                self._reap()
            if 0 in readable and not self.stopping:
                self._read_words()
            self._restart_due()
            self._forget_bereaved(time.monotonic())
        self.stop_all()

    def start(self, process: Process) -> None:
        """Start a process, or start it again."""
        try:
            with open(process.log, "ab") if process.log else nullcontext(sys.stderr.buffer) as log:
                process.child = subprocess.Popen(
                    process.argv,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=self._in_child,  # noqa: PLW1509 - this process has one thread
                )
        except (OSError, subprocess.SubprocessError) as error:
            self.processes.pop(process.name, None)
            self._say(event="refused", name=process.name, error=f"{process.argv[0]}: {error}")
            return
        self.processes[process.name] = process
        process.started_s, process.due_s = time.monotonic(), None
        self._say(event="started", name=process.name, pid=process.child.pid)

    def _start_keeper(self) -> None:
        self._keeper_pid, self._keeper_pipe = start_keeper(self.folder, (self._wake, self._wake_end))
        for pgid in [*self._bereaved, *(p.child.pid for p in self.processes.values() if p.child)]:
            self._tell_keeper(b"+%d\n" % pgid)

    def _tell_keeper(self, word: bytes) -> None:
        with suppress(BrokenPipeError):  # somebody killed it; the next one will be told all
            os.write(self._keeper_pipe, word)

    def stop_all(self) -> None:
        """Ask every process to end, the highest stage first, and kill what is left when the grace is over."""
        self.stopping = True
        for pgid in list(self._bereaved):
            self._end_group(pgid)
        deadline = time.monotonic() + self.grace_s
        for stage in sorted({p.stage for p in self.processes.values()}, reverse=True):
            members = [p for p in self.processes.values() if p.stage == stage]
            for process in members:
                # To the whole group: what a pool child is computing is worth nothing once its Redis is gone.
                self._signal_group(process, signal.SIGTERM)
            while any(p.child for p in members) and (left := deadline - time.monotonic()) > 0:
                select.select([self._wake], [], [], left)
                self._reap()
            for process in members:
                self._signal_group(process, signal.SIGKILL)
            while any(p.child for p in members):
                select.select([self._wake], [], [], 1.0)
                self._reap()
        os.close(self._keeper_pipe)
        os.waitpid(self._keeper_pid, 0)

    def _on_signal(self, number: int, _frame: object) -> None:
        if number != signal.SIGCHLD:
            self.stopping = True

    def _read_words(self) -> None:
        piece = os.read(0, 1 << 16)
        if not piece:
            self.stopping = True
            return
        *lines, self.buffer = (self.buffer + piece).split(b"\n")
        for line in lines:
            self.start(Process(**json.loads(line)))

    def _reap(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._wake, 4096)
        if os.waitpid(self._keeper_pid, os.WNOHANG)[0]:
            os.close(self._keeper_pipe)
            self._start_keeper()
        for process in list(self.processes.values()):
            if process.child is None or (code := process.child.poll()) is None:
                continue
            pid, process.child = process.child.pid, None
            if self.stopping:
                self._end_group(pid)
                continue
            # Pool children without their worker. Its agent heeds no SIGTERM: it has the death to report.
            kill_group(pid, signal.SIGTERM)
            self._bereaved[pid] = time.monotonic() + BEREAVED_S
            self._say(event="ended", name=process.name, pid=pid, code=code)
            if process.restart:
                self._plan_restart(process)

    def _forget_bereaved(self, now: float) -> None:
        for pgid, deadline in list(self._bereaved.items()):
            wait_for_group(pgid, os.WNOHANG)
            if now >= deadline or not group_exists(pgid):
                self._end_group(pgid)

    def _end_group(self, pgid: int) -> None:
        kill_group(pgid)
        wait_for_group(pgid)
        self._bereaved.pop(pgid, None)
        self._tell_keeper(b"-%d\n" % pgid)

    def _plan_restart(self, process: Process) -> None:
        now = time.monotonic()
        if now - process.started_s >= SETTLED_S:
            process.delay_s = FIRST_DELAY_S
        process.due_s = now + process.delay_s
        process.delay_s = min(2 * process.delay_s, LONGEST_DELAY_S)

    def _restart_due(self) -> None:
        now = time.monotonic()
        for process in list(self.processes.values()):
            if not self.stopping and process.due_s is not None and process.due_s <= now:
                self.start(process)

    def _pause_s(self) -> float | None:
        """Seconds until something is due, if nothing is heard before."""
        now = time.monotonic()
        due = [p.due_s for p in self.processes.values() if p.due_s is not None]
        if self._bereaved:
            due.append(min(self._bereaved.values()))
        return max(0.0, min(due) - now) if due else None

    def _in_child(self) -> None:
        """Between fork and exec: die with the supervisor, and let the keeper know of this process."""
        if self._prctl is not None:
            self._prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != self._pid:  # it died before it could be told so
                os._exit(1)
        os.write(self._keeper_pipe, b"+%d\n" % os.getpid())

    @staticmethod
    def _signal_group(process: Process, number: int) -> None:
        if process.child is not None:
            kill_group(process.child.pid, number)

    def _say(self, **event: Any) -> None:
        try:
            os.write(1, json.dumps(event).encode() + b"\n")
        except BrokenPipeError:
            self.stopping = True


def kill_group(pgid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process group, which may be gone."""
    with suppress(ProcessLookupError, PermissionError):  # it is gone, as in group_exists
        os.killpg(pgid, number)


def wait_for_group(pgid: int, options: int = 0) -> None:
    """Wait for the members of a group that are our children; with WNOHANG, only for those that ended."""
    with suppress(ChildProcessError):  # none is left
        while os.waitpid(-pgid, options)[0]:
            pass


def group_exists(pgid: int) -> bool:
    """Tell whether a process group has members left."""
    try:
        os.killpg(pgid, 0)
    except (ProcessLookupError, PermissionError):  # macOS answers EPERM for a group of zombies
        return False
    return True


def start_keeper(folder: str, not_mine: tuple[int, ...]) -> tuple[int, int]:
    """Fork the process that cleans up when this one cannot; returns its pid and the pipe it listens to."""
    listen, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        for end in (0, tell, *not_mine):
            os.close(end)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        keep(folder, listen)
    os.close(listen)
    return pid, tell


def keep(folder: str, listen: int) -> NoReturn:
    """Wait until the supervisor is gone, by whatever way; then remove what it left."""
    groups: set[int] = set()
    with open(listen, "rb") as words:
        for word in words:  # b"+<pid>" started, b"-<pid>" ended
            (groups.add if word[:1] == b"+" else groups.discard)(int(word[1:]))
    for _ in range(100):
        for pgid in groups:
            kill_group(pgid)
        shutil.rmtree(folder, ignore_errors=True)  # fails while a dying process still writes there
        if not os.path.exists(folder):
            break
        time.sleep(0.01)
    os._exit(0)


if __name__ == "__main__":
    Supervisor(sys.argv[1], float(sys.argv[2])).run()
