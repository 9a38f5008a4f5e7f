"""What a slot notes of one attempt, while somebody records what runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from celery_mem.graph.calls import call
from celery_mem.graph.errors import error_line
from celery_mem.profiling.lines import AGAIN, CANCELLED, DONE, FAILED, Line
from celery_mem.state.store import Done, Failed, Missing, Taken
from celery_mem.worker.shown import name_in_display, shown_name
from celery_mem.worker.watching import Watcher, is_cancelled


class Note(Watcher):
    """One attempt at a task.

    Attributes:
        line: about it, once it is over; none if it was broken off.
    """

    def __init__(self, task: Taken) -> None:
        self.line: Line | None = None
        self._key = task.key
        self._began = time.time()
        self._began_exact = time.perf_counter()
        self._called: float | None = None
        self._name = self._error = ""
        self._outcome = FAILED

    def calls(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note that the inputs are there, and the call begins."""
        self._name = shown_name(args[0] if func is call and args else func)
        self._called = self._passed()

    def raised(self, error: BaseException, data: bytes) -> None:
        """Note what went wrong."""
        self._outcome = CANCELLED if is_cancelled(error) else FAILED
        self._error = error_line(data)

    def ends(self, outcome: Done | Failed | Missing | None) -> None:
        """Write the line."""
        if outcome is None:
            return
        passed = self._passed()
        called = passed if self._called is None else self._called
        name = name_in_display(self._key, self._name)
        times = self._began, self._began + called, self._began + passed
        if isinstance(outcome, Done):
            self.line = Line(self._key, name, *times, outcome.nbytes, DONE)
        elif isinstance(outcome, Missing):
            self.line = Line(self._key, name, *times, 0, AGAIN, "its inputs were gone")
        else:
            self.line = Line(self._key, name, *times, 0, self._outcome, self._error)

    def _passed(self) -> float:
        return time.perf_counter() - self._began_exact  # the other clock may be set meanwhile
