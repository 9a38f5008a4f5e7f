"""What a slot notes of one attempt, while somebody records what runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from celery_mem.errors import TaskInterrupt
from celery_mem.graph.calls import call, name_of
from celery_mem.graph.errors import message_of
from celery_mem.profiling.lines import AGAIN, CANCELLED, DONE, FAILED, Line
from celery_mem.state.store import Done, Failed, Missing, Taken
from celery_mem.worker import interrupts
from celery_mem.worker.events import shown_name


class Note:
    """One attempt at a task, from its begin on."""

    def __init__(self, task: Taken) -> None:
        self._key = task.key
        self._began = time.time()
        self._began_exact = time.perf_counter()
        self._called: float | None = None
        self._name = self._error = ""
        self._outcome = FAILED

    def calls(self, func: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """Note that the inputs are there, and the call begins."""
        self._name = name_of(args[0] if func is call else func)
        self._called = self._passed()

    def raised(self, error: BaseException) -> None:
        """Note what went wrong."""
        is_cancelled = isinstance(error, TaskInterrupt) and error.reason == interrupts.CANCELLED
        self._outcome = CANCELLED if is_cancelled else FAILED
        self._error = f"{type(error).__name__}: {message_of(error)}"

    def line(self, outcome: Done | Failed | Missing) -> Line:
        """Return the line about it, now that it is over."""
        passed = self._passed()
        called = passed if self._called is None else self._called
        name = shown_name(self._name, self._key)
        times = self._began, self._began + called, self._began + passed
        if isinstance(outcome, Done):
            return Line(self._key, name, *times, outcome.nbytes, DONE)
        if isinstance(outcome, Missing):
            return Line(self._key, name, *times, 0, AGAIN, "its inputs were gone")
        return Line(self._key, name, *times, 0, self._outcome, self._error)

    def _passed(self) -> float:
        return time.perf_counter() - self._began_exact  # the other clock may be set meanwhile
