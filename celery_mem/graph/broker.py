"""The one connection to the broker by which a process sends tickets and events, however many threads it has.

Small plans of Redis have 20 connections for all, and kombu takes two for each of its own: one to publish, and
one to listen, which a sender never does.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from celery import Celery
    from kombu.connection import Connection


class Line:
    """A connection to an app's broker, opened when it is used."""

    def __init__(self, app: Celery) -> None:
        self.app = app
        self.pid = os.getpid()
        self._lock = threading.Lock()
        self._connection: Connection | None = None

    @contextlib.contextmanager
    def use(self) -> Iterator[Connection]:
        """Have the connection for oneself; after an error, whoever comes next gets a new one.

        Raises:
            Exception: whatever the broker's library raises where there is none.
        """
        with self._lock:
            try:
                connection = self._open()
                yield connection
            except BaseException:
                self._close()
                raise
            close_spare(connection, ("async_pool",))

    def hang_up(self) -> None:
        """Close the connection if nobody uses it now: it will be long till the next time."""
        if self._lock.acquire(blocking=False):
            try:
                self._close()
            finally:
                self._lock.release()

    def _open(self) -> Connection:
        if self._connection is not None and not self._connection.connected:
            self._close()
        if self._connection is None:
            connection = self.app.connection_for_write()
            connection.connect()  # tried once; what it would do by itself later is tried for ever
            self._connection = connection
        return self._connection

    def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):  # it may be gone already
                connection.close()


def line_of(app: Any) -> Line:
    """Return this process's line to the broker of an app."""
    with _making:
        line: Line | None = getattr(app, "mem_line", None)
        if line is None or line.pid != os.getpid():
            line = app.mem_line = Line(app)
        return line


_making = threading.Lock()
BOTH = ("pool", "async_pool")


def close_spare(connection: Any, pools: tuple[str, ...] = BOTH) -> None:
    """Close what a connection of kombu keeps open to Redis and does not use now; with other brokers, nothing.

    Args:
        pools: those that a channel has, by the names of its attributes: to send, and to listen.
    """
    for channel in tuple(getattr(connection.transport, "channels", None) or ()):
        for name in pools:
            pool = getattr(channel, name, None)
            if pool is not None:
                pool.disconnect(inuse_connections=False)
