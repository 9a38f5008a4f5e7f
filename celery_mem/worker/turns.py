"""One task at a time, though several may have begun: one that waits for others gives up its turn."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from celery_mem.state.store import Taken
    from celery_mem.worker.slot import Slot


class Driver:
    """A thread that takes tasks for a slot and runs them: the one with the ticket, or one that helps.

    Attributes:
        slot: whose tasks it runs.
        task: the task that it runs now, or that waits.
        lock: guards the attributes below.
        waiting: threads of its task that wait for other tasks; more than one only if it is a coroutine.
        helper: tells the thread that drives instead, while `waiting`, to end.
        stop: tells this one to end; never set for the thread with the ticket.
    """

    def __init__(self, slot: Slot, stop: threading.Event | None = None) -> None:
        self.slot = slot
        self.stop = stop or threading.Event()
        self.task: Taken | None = None
        self.lock = threading.Lock()
        self.waiting = 0
        self.helper = threading.Event()


class Turns:
    """Which of a slot's drivers may run. One whose task can go on comes before one that would begin one."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._owner: Driver | None = None
        self._resuming = 0

    def take(self, driver: Driver) -> bool:
        """Wait for the turn, to begin something; returns whether it came before `driver` was told to end."""
        with self._changed:
            while self._owner is not None or self._resuming:
                if driver.stop.is_set():
                    return False
                self._changed.wait()
            self._owner = driver
            return True

    def resume(self, driver: Driver) -> None:
        """Wait for the turn, to go on with what has begun."""
        with self._changed:
            self._resuming += 1
            self._changed.notify_all()  # a helper that was told to end may wait for its turn
            try:
                while self._owner is not None:
                    self._changed.wait()
                self._owner = driver
            finally:
                self._resuming -= 1

    def give(self, driver: Driver) -> None:
        """Give up the turn, if `driver` has it."""
        with self._changed:
            if self._owner is driver:
                self._owner = None
                self._changed.notify_all()

    def pass_on(self, driver: Driver) -> bool:
        """Let those go first that can go on; returns whether `driver` may then."""
        if self._resuming:
            self.give(driver)
            return self.take(driver)
        return not driver.stop.is_set()
