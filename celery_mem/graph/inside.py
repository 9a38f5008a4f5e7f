"""What code that runs inside a task may ask of its worker, whichever client it uses.

Set by the worker, asked by clients; imports nothing, as workers load it before any task needs a client.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from celery import Celery

    from celery_mem.config import Settings

Wait = Callable[[float | None], bool]
"""Waits for something for so many seconds, None for ever; returns whether it came. May be called again."""


class Worker(Protocol):
    """The worker that this process belongs to.

    Attributes:
        app: its Celery app, for sending tickets.
        settings: where its namespace is.
        node: its name.
    """

    app: Celery
    settings: Settings
    node: str

    def help_until(self, wait: Wait, timeout: float | None) -> bool:
        """Wait; where this context runs a task, its slot runs others meanwhile. Returns whether it came."""

    def task_priority(self) -> float | None:
        """Return the priority of the task that this context runs; None outside of tasks."""

    def task_key(self) -> str | None:
        """Return the key text of the task that this context runs; None outside of tasks."""

    def running_task(self) -> tuple[str, str] | None:
        """Return key text and function's name of the task that this context runs; None outside of tasks."""

    def at_exit(self, call: Callable[[], Any]) -> None:
        """Have `call` called when this process ends in good order."""


worker: Worker | None = None


def wait_for(wait: Wait, timeout: float | None) -> bool:
    """Wait, and help where this is a task: a blocked slot might be the one that what it waits for needs."""
    return wait(timeout) if worker is None else worker.help_until(wait, timeout)


def inherited_priority() -> float:
    """Return what is added to the priority of what is submitted here: inside a task, enough to run next.

    Its slot waits for it, mostly. Were it queued behind all that was there before, each slot could get stuck
    under a pile of tasks that wait for something at the end of the queue.
    """
    priority = None if worker is None else worker.task_priority()
    return 0.0 if priority is None else priority + 1
