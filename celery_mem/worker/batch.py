"""What a slot has in hand: tasks that wait their turn, tasks that run, reports that nobody has yet."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any, NamedTuple

from celery_mem.profiling.lines import Line
from celery_mem.state.store import Done, Failed, Missing, Taken


class Reports(NamedTuple):
    """What Redis is to be told: completions, failures, tasks handed back, and those that lack inputs.

    `kept` are results with futures inside, which pin those until Redis knows that the results do. `lines` are
    for recordings.
    """

    done: list[Done]
    failed: list[Failed]
    back: list[Taken]
    missing: list[Missing]
    kept: list[Any]
    lines: list[Line]


class Batch:
    """The tasks a slot has taken. Invariant: each is in exactly one of waiting, running, reports."""

    def __init__(self) -> None:
        self.has_several = threading.Event()
        """Set while a running task may have others behind it."""
        self._lock = threading.Lock()
        self._waiting: deque[Taken] = deque()
        self._running: dict[str, Taken] = {}  # by attempt; one runs, the others wait for tasks
        self._since = 0.0  # when the last task began or ended
        self._reports = Reports([], [], [], [], [], [])

    def begin(self, taken: list[Taken]) -> None:
        """Take up tasks."""
        with self._lock:
            self._waiting.extend(taken)
        if len(taken) > 1:
            self.has_several.set()

    def next(self) -> Taken | None:
        """Return the next task to run; None when there are no more."""
        with self._lock:
            if not self._waiting:
                return None
            task = self._waiting.popleft()
            self._running[task.attempt] = task
            self._since = time.monotonic()
            return task

    def add(
        self, task: Taken, outcome: Done | Failed | Missing, keep: Any = None, line: Line | None = None
    ) -> None:
        """Record what came of a task; `keep` lives until the report is sent."""
        with self._lock:
            self._running.pop(task.attempt, None)
            self._since = time.monotonic()
            if isinstance(outcome, Done):
                self._reports.done.append(outcome)
            elif isinstance(outcome, Missing):
                self._reports.missing.append(outcome)
            else:
                self._reports.failed.append(outcome)
            if keep is not None:
                self._reports.kept.append(keep)
            if line is not None:
                self._reports.lines.append(line)

    def discard(self, attempt: str) -> bool:
        """Drop an attempt that has not begun and is void; returns whether it was here."""
        with self._lock:
            kept = [task for task in self._waiting if task.attempt != attempt]
            was_here = len(kept) < len(self._waiting)
            self._waiting = deque(kept)
            return was_here

    def has_begun(self, attempt: str) -> bool:
        """Tell whether an attempt runs here now."""
        return attempt in self._running

    def give_up(self, task: Taken) -> None:
        """Hand back a task that was broken off."""
        with self._lock:
            if self._running.pop(task.attempt, None) is not None:
                self._reports.back.append(task)

    def give_up_all(self) -> None:
        """Hand back all that runs."""
        for task in list(self._running.values()):
            self.give_up(task)

    def drain(self) -> Reports:
        """Take out all that can be reported, and what waits, to be handed back."""
        self.has_several.clear()
        with self._lock:
            return self._drain()

    def drain_if_held_up(self, seconds: float) -> Reports | None:
        """Drain if no task has begun or ended for so long, and somebody may wait for the others."""
        with self._lock:
            if not self._running or self._is_empty() or time.monotonic() - self._since < seconds:
                return None
            self.has_several.clear()
            return self._drain()

    def restore(self, reports: Reports) -> None:
        """Undo a drain whose reports did not arrive; what was to be handed back still is."""
        with self._lock:
            mine = self._reports
            mine.done[:0] = reports.done
            mine.failed[:0] = reports.failed
            mine.back[:0] = reports.back
            mine.missing[:0] = reports.missing
            mine.kept[:0] = reports.kept
            mine.lines[:0] = reports.lines

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to report or hand back."""
        with self._lock:
            return self._is_empty()

    def _is_empty(self) -> bool:
        return not (self._waiting or any(self._reports))

    def _drain(self) -> Reports:
        reports = self._reports._replace(back=[*self._reports.back, *self._waiting])
        self._reports = Reports([], [], [], [], [], [])
        self._waiting.clear()
        return reports
