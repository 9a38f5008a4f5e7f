"""The parent's end of the supervisor: starts processes through it, hears of their ends, and lets go."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from celery_mem.errors import CeleryMemError

log = logging.getLogger("celery_mem.local")

SUPERVISOR = Path(__file__).with_name("supervisor.py")
LOG_LINES = 30
"""Lines of a process's log that an error quotes."""


class LocalClusterError(CeleryMemError):
    """A process of a local cluster did not start, or died; the text ends with the last lines of its log."""


class Processes:
    """Child processes that live no longer than this one.

    Args:
        folder: made by the caller, for logs; removed when all processes are gone.
        environ: the whole environment of the processes.
        grace_s: time to end in good order before they are killed.
        to_stderr: let them write to this process's standard error instead of to `<name>.log` in the folder.
    """

    def __init__(
        self, folder: str, environ: Mapping[str, str], *, grace_s: float, to_stderr: bool = False
    ) -> None:
        self.folder = folder
        self.grace_s = grace_s
        self._to_stderr = to_stderr
        self._pids: dict[str, int] = {}
        self._troubles: dict[str, str] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._over = False
        self._awaited: str | None = None
        self._starting: set[str] = set()  # asked for, and neither started nor refused yet
        # A raw descriptor: a forked child closes its copy, so that only this process keeps the cluster alive.
        read_end, self._control = os.pipe()
        try:
            # -I -S: it needs nothing but the standard library, and so starts in a tenth of the time.
            self._supervisor = subprocess.Popen(
                [sys.executable, "-I", "-S", str(SUPERVISOR), folder, str(grace_s)],
                stdin=read_end,
                stdout=subprocess.PIPE,
                env=dict(environ),
                start_new_session=True,
            )
        except BaseException:
            os.close(self._control)
            raise
        finally:
            os.close(read_end)
        _live.add(self)
        self._listener = threading.Thread(target=self._listen, name="celery-mem-local", daemon=True)
        self._listener.start()

    def start(self, name: str, argv: Sequence[str], *, stage: int = 1, restart: bool = False) -> None:
        """Have a process started, without waiting for it; see `wait_until_started`.

        Args:
            name: unique among the processes; a dead one may be started again under its name.
            argv: the command.
            stage: at the end, processes of a higher stage are stopped first.
            restart: start it again when it dies, after 0.5 s, then 1 s, 2 s, ... up to 30 s.
        """
        path = None if self._to_stderr else self._log_path(name)
        word = {"name": name, "argv": list(argv), "log": path, "stage": stage, "restart": restart}
        with self._changed:
            self._troubles.pop(name, None)
            self._starting.add(name)
            try:
                _write_all(self._control, json.dumps(word).encode() + b"\n")
            except OSError as error:
                raise LocalClusterError(f"cannot start {name}: the supervisor is gone ({error})") from error

    def wait_until_started(self) -> None:
        """Wait until every process that was asked for runs, and shows in `pids`, or was refused."""
        self.wait_for(lambda: not self._starting or self._over)

    def start_and_wait(
        self, name: str, argv: Sequence[str], is_up: Callable[[], bool], timeout_s: float
    ) -> None:
        """Have a process of the lowest stage started, and wait until it is up.

        Raises:
            LocalClusterError: it died first, or `timeout_s` was over; the text ends with its log.
        """
        self._awaited = name
        self.start(name, argv, stage=0)
        self.wait_until_started()
        deadline = time.monotonic() + timeout_s
        # A server that starts gives no sign that every version and platform has, so it is asked.
        while not is_up():
            if trouble := self.trouble(name) or self.trouble("supervisor"):
                raise LocalClusterError(trouble)
            if time.monotonic() > deadline:
                raise LocalClusterError(self._with_log(name, f"{name} does not answer after {timeout_s:g} s"))
            time.sleep(0.002)
        self._awaited = None

    def pids(self) -> dict[str, int]:
        """Return the live processes by name."""
        with self._changed:
            return dict(self._pids)

    def trouble(self, name: str) -> str | None:
        """Return what happened to a process that should run and does not, with the end of its log."""
        with self._changed:
            return self._troubles.get(name)

    def troubles(self) -> list[str]:
        """Return what happened to every process that should run and does not."""
        with self._changed:
            return list(self._troubles.values())

    def wait_for(self, condition: Callable[[], bool], timeout: float | None = None) -> bool:
        """Wait until `condition` holds; it is asked again whenever a process starts or ends."""
        with self._changed:
            return self._changed.wait_for(condition, timeout)

    def is_over(self) -> bool:
        """Tell whether all processes, the supervisor too, are gone."""
        return self._over

    def log_tail(self, name: str, lines: int = LOG_LINES) -> str:
        """Return the last lines that a process wrote."""
        try:
            with open(self._log_path(name), "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 500 * lines))
                text = file.read().decode(errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def close(self) -> None:
        """Stop all processes and wait until they are gone; again, or in a forked child, it does nothing."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
            os.close(self._control)
        if threading.current_thread() is self._listener:  # the garbage collector may call us anywhere
            return
        self._listener.join(self.grace_s + 10)
        if self._listener.is_alive():
            log.error("the supervisor (pid %s) does not end; killing it", self._supervisor.pid)
            self._supervisor.kill()
            self._listener.join(5)
        _live.discard(self)

    def _listen(self) -> None:
        """Follow the supervisor's reports; the end of its output means that every process is gone."""
        output = self._supervisor.stdout
        assert output is not None
        with output:
            for line in output:
                self._hear(json.loads(line))
        code = self._supervisor.wait()
        with self._changed:
            self._pids.clear()
            self._over = True
            if not self._closing:
                self._troubles["supervisor"] = (
                    f"the supervisor ended ({_end(code)}) and the local cluster with it"
                )
                log.error(self._troubles["supervisor"])
            self._changed.notify_all()

    def _hear(self, report: dict[str, str | int]) -> None:
        name = str(report["name"])
        with self._changed:
            self._starting.discard(name)
            match report["event"]:
                case "started":
                    self._pids[name] = int(report["pid"])
                    self._troubles.pop(name, None)
                case "ended":
                    self._pids.pop(name, None)
                    self._note(name, f"{name} (pid {report['pid']}) ended: {_end(int(report['code']))}")
                case "refused":
                    self._note(name, f"{name} did not start: {report['error']}")
            self._changed.notify_all()

    def _note(self, name: str, what: str) -> None:
        self._troubles[name] = what = self._with_log(name, what)
        if not self._closing and name != self._awaited:  # who waits for it raises it
            log.warning("%s", what)

    def _with_log(self, name: str, what: str) -> str:
        tail = self.log_tail(name)
        return f"{what}; its log ends with\n{tail}" if tail else what

    def _log_path(self, name: str) -> str:
        return os.path.join(self.folder, f"{name}.log")

    def _forget_in_child(self) -> None:
        """In a forked child: give up every hold on the processes, which stay the parent's."""
        self._changed = threading.Condition()  # the old one may be held by a thread that does not exist here
        self._supervisor.returncode = 0  # not our child, so do not wait for it
        if not self._closing:
            self._closing = self._over = True
            os.close(self._control)
        self._pids.clear()


_live: weakref.WeakSet[Processes] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for processes in list(_live):
        processes._forget_in_child()
    _live.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def _end(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
