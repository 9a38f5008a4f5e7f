"""The broker of an in-process cluster: tickets go from those who send them to threads, in no message."""

from __future__ import annotations

import threading
from typing import Any

from celery import Celery

from celery_mem.config import Settings
from celery_mem.worker.control import Control


class TicketApp(Celery):  # type: ignore[misc]
    """What stands in for the user's Celery app: it keeps tickets until a thread of a node takes them."""

    def __init__(self, settings: Settings, queue: str) -> None:
        super().__init__("celery_mem_testing", broker="memory://", set_as_current=False)
        self.conf.task_default_queue = queue
        self.mem_settings = lambda: settings
        self.mem_control = Control("", "threads")  # nobody from outside ends a task
        self._sent: list[tuple[str, str]] = []
        self._changed = threading.Condition()
        self._closed = False

    def send_task(self, name: str, *, args: tuple[str], queue: Any, **_: Any) -> None:
        """Take a ticket."""
        with self._changed:
            self._sent.append((getattr(queue, "name", queue), args[0]))
            self._changed.notify_all()

    def take(self, queues: tuple[str, ...]) -> str | None:
        """Wait for the next ticket of these queues; None at the end."""
        with self._changed:
            while not self._closed:
                for i, (queue, ticket) in enumerate(self._sent):
                    if queue in queues:
                        del self._sent[i]
                        return ticket
                self._changed.wait()
        return None

    def stop(self) -> None:
        """Have everybody who waits go home."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
