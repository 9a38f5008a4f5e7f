"""What Celery takes for its current task while a slot runs tasks of the graph.

Celery's formats of log lines, and libraries, ask the current task for its name and its request for an id.
That would be the ticket, which says nothing. What stands in for it looks at what its slot runs when it is
asked, so that a task costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from celery._state import _task_stack
from celery.app.task import Context

from celery_mem.graph import inside
from celery_mem.graph.tickets import TASK_NAME

if TYPE_CHECKING:
    from celery_mem.worker.turns import Driver


class StandIn:
    """The task that a thread runs for its slot; between two tasks the ticket, if it has one.

    Args:
        driver: of the thread.

    Attributes:
        ticket: the Celery task that the thread runs; None if it helps another.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self.ticket = _task_stack.top

    @property
    def name(self) -> str:
        """The name of the function."""
        slot, task = self._driver.slot, self._driver.task
        return TASK_NAME if task is None else slot.runner.name_of(task)

    @property
    def request(self) -> Context:
        """A request whose id is the key. Called directly, so that it is no parent of what the task sends."""
        slot, task = self._driver.slot, self._driver.task
        if task is not None:
            return Context(id=task.key, root_id=task.key, hostname=slot.node, called_directly=True)
        if self.ticket is not None:
            return self.ticket.request
        return Context(id=slot.name, hostname=slot.node, called_directly=True)

    def __getattr__(self, name: str) -> Any:
        """Be the ticket in all else."""
        if inside.worker is None:
            raise AttributeError(name)
        return getattr(inside.worker.app.tasks[TASK_NAME], name)


@contextmanager
def standing_in(driver: Driver) -> Iterator[None]:
    """Let what runs in this thread until the end of the block find its task."""
    with _as_current(StandIn(driver)):
        yield


def stand_in_of_thread() -> StandIn | None:
    """Return what stands in here, for a thread that goes on with the same task."""
    return next((task for task in reversed(_task_stack.stack) if isinstance(task, StandIn)), None)


@contextmanager
def going_on(stand_in: StandIn | None) -> Iterator[None]:
    """Let what runs in this thread until the end of the block find the task of another one."""
    if stand_in is None:
        yield
        return
    with _as_current(stand_in):
        yield


@contextmanager
def _as_current(stand_in: StandIn) -> Iterator[None]:
    _task_stack.push(stand_in)
    try:
        yield
    finally:
        _task_stack.pop()
