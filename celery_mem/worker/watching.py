"""What looks on while a task runs, and cannot change it: events, recordings, spans."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery_mem.errors import TaskInterrupt
from celery_mem.worker.interrupts import CANCELLED

if TYPE_CHECKING:
    from celery_mem.state.store import Done, Failed, Missing


class Watcher:
    """Is told what becomes of one attempt at a task, in this order and in the thread that runs it."""

    def calls(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The inputs are there, and the call begins; it may change its arguments."""

    def returned(self, result: Any, seconds: float) -> None:
        """The call has a result, which is still to be stored."""

    def raised(self, error: BaseException, data: bytes) -> None:
        """It failed, or was cancelled.

        Args:
            data: the error as it travels. To ask the exception itself for its text may run code of users.
        """

    def ends(self, outcome: Done | Failed | Missing | None) -> None:
        """It is over; None: it was broken off, and the task runs again."""


class Audience(Watcher):
    """All who watch one attempt."""

    def __init__(self, *watchers: Watcher | None) -> None:
        self.watchers = [w for w in watchers if w is not None]

    def calls(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for watcher in self.watchers:
            watcher.calls(func, args, kwargs)

    def returned(self, result: Any, seconds: float) -> None:
        for watcher in self.watchers:
            watcher.returned(result, seconds)

    def raised(self, error: BaseException, data: bytes) -> None:
        for watcher in self.watchers:
            watcher.raised(error, data)

    def ends(self, outcome: Done | Failed | Missing | None) -> None:
        for watcher in self.watchers:
            watcher.ends(outcome)


NOBODY = Audience()
"""For the many tasks that nobody watches."""


def is_cancelled(error: BaseException) -> bool:
    """Tell whether a task was stopped as nobody wants it any more."""
    return type(error) is TaskInterrupt and error.reason == CANCELLED
