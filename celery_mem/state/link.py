"""One connection to Redis that comes back by itself, for callers whose commands may be repeated.

redis-py would re-send a command up to ten times on its own; here its retries are off, and a repeat happens
only in this file, because every script of ours is safe to repeat (docs/design.md, "Calls that are repeated").
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from redis import ConnectionPool
from redis.backoff import NoBackoff
from redis.connection import AbstractConnection
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ConnectionError,
    NoScriptError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,
)
from redis.retry import Retry

from celery_mem.config import Settings, check_url, mask_url
from celery_mem.errors import RedisUnavailableError, raise_for_reply
from celery_mem.state.loader import Script

Command = tuple[Any, ...]
Repeat = Callable[[tuple[Any, ...]], tuple[Any, ...]]
BROKEN = (ConnectionError, TimeoutError, OSError)
"""Errors after which the connection is replaced; whether the last command was carried out is unknown."""


def make_pool(
    url: str, *, connect_timeout: float = 5.0, socket_timeout: float | None = 60.0
) -> ConnectionPool:
    """Return a pool for `url` without retries of its own and with plain replies (RESP2)."""
    if check_url(url).startswith("redis+socket://"):
        url = "unix://" + url.removeprefix("redis+socket://")
    pool: ConnectionPool = ConnectionPool.from_url(
        url,
        protocol=2,
        retry=Retry(NoBackoff(), 0),
        socket_timeout=socket_timeout,
        socket_connect_timeout=connect_timeout,
        **({} if url.startswith("unix:") else {"socket_keepalive": True}),
    )
    if url.startswith("unix:"):
        pool.connection_kwargs.pop("socket_connect_timeout", None)
    return pool


class Flight:
    """A script that was sent and goes on while its caller does something else; `Link.launch` makes it."""

    def __init__(self, link: Link, script: Script, args: tuple[Any, ...]) -> None:
        self.reply: Any = None
        self._link = link
        self._script = script
        self._args = args

    def land(self) -> Any:
        """Wait for the reply and return it; raises what `Link.run` does."""
        self._link.await_flight(self)
        if self.reply is None or isinstance(self.reply, ResponseError):
            # The connection broke, or Redis refused, for now or for good: the ordinary way deals with it.
            return self._link.run(self._script, *self._args)
        return self.reply


class Link:
    """A connection used by one command, or one batch of commands, at a time; threads wait for each other.

    Args:
        pool: where connections come from.
        retry_timeout: seconds for which a broken connection is tried again.
        address: what error texts call the server; never holds a password.
    """

    def __init__(self, pool: ConnectionPool, *, retry_timeout: float = 60.0, address: str = "") -> None:
        self.pool = pool
        self.retry_timeout = retry_timeout
        self.address = address
        self.lock = threading.RLock()
        self._conn: AbstractConnection | None = None
        self._flight: Flight | None = None  # whose reply is the next that the connection brings
        self._pid = os.getpid()
        self._aborted = False

    @classmethod
    def connect(cls, settings: Settings, *, blocking: bool = False) -> Link:
        """Return a link for `settings`; `blocking` gives one whose reads may wait without limit."""
        pool = make_pool(
            settings.url,
            connect_timeout=settings.connect_timeout,
            socket_timeout=None if blocking else 60.0,
        )
        return cls(pool, retry_timeout=settings.retry_timeout, address=mask_url(settings.url))

    def twin(self) -> Link:
        """Return a second, independent link to the same server."""
        return Link(self.pool, retry_timeout=self.retry_timeout, address=self.address)

    def call(self, *command: Any) -> Any:
        """Send one command and return its reply."""
        return self.batch([command])[0]

    def run(
        self, script: Script, *args: Any, before: Sequence[Command] = (), repeat: Repeat | None = None
    ) -> Any:
        """Run one script, after the plain commands in `before`, in one round trip.

        Args:
            repeat: gives the arguments of a repeat after a lost reply, where they differ.
        Raises:
            StateError: the script refused; the class tells why.
            RedisUnavailableError: no answer for `retry_timeout` seconds.
        """
        again = None if repeat is None else lambda: [*before, ("EVALSHA", script.sha, *repeat(args))]
        try:
            return self.batch([*before, ("EVALSHA", script.sha, *args)], again)[-1]
        except NoScriptError:
            self.call("SCRIPT", "LOAD", script.source)
            # A reply may have been lost with the Redis that knew the script.
            return self.run(script, *(args if repeat is None else repeat(args)), before=before, repeat=repeat)
        except ResponseError as reply:
            raise_for_reply(reply, script.name)

    def launch(self, script: Script, *args: Any) -> Flight:
        """Send one script that may be repeated, and do not wait for its reply.

        The link can be used meanwhile; who uses it first waits for that reply.
        """
        flight = Flight(self, script, args)
        with self.lock:
            try:
                conn = self.connection()
                self._take_reply(conn)
                conn.send_packed_command(conn.pack_command("EVALSHA", script.sha, *args), check_health=False)
                self._flight = flight
            except (*BROKEN, RedisError):
                self.close()
        return flight

    def await_flight(self, flight: Flight) -> None:
        """Read the reply of a flight, unless that was done or its connection is gone."""
        with self.lock:
            if self._flight is not flight or self._conn is None or self._pid != os.getpid():
                return
            try:
                self._take_reply(self._conn)
            except BROKEN:
                self.close()

    def _take_reply(self, conn: AbstractConnection) -> None:
        flight, self._flight = self._flight, None
        if flight is None:
            return
        try:
            flight.reply = conn.read_response()
        except ResponseError as error:
            flight.reply = error
        except BaseException:
            self.close()
            raise

    def batch(
        self, commands: Sequence[Command], again: Callable[[], Sequence[Command]] | None = None
    ) -> list[Any]:
        """Send commands together and return their replies.

        Args:
            again: gives what to send once a reply may have been lost, where that differs.
        Raises:
            RedisUnavailableError: the connection stayed broken for `retry_timeout` seconds.
            redis.ResponseError: the first error among the replies.
        """
        deadline = time.monotonic() + self.retry_timeout
        delay = 0.01
        while True:
            try:
                with self.lock:
                    return self._batch_once(commands)
            except AuthenticationError as error:
                raise RedisUnavailableError(
                    f"Redis at {self.address} refuses the password: {error}"
                ) from error
            except (*BROKEN, BusyLoadingError, ReadOnlyError) as error:
                if isinstance(
                    error, ReadOnlyError
                ):  # after the others it is closed, or another thread's by now
                    with self.lock:
                        self.close()
                if self._aborted or time.monotonic() + delay > deadline:
                    raise RedisUnavailableError(
                        f"no Redis at {self.address} for {self.retry_timeout:g} s: {error}"
                    ) from error
                commands = commands if again is None else again()
            except ResponseError as error:
                if not str(error).startswith(("BUSY ", "MASTERDOWN ")) or time.monotonic() + delay > deadline:
                    raise
            time.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311 (jitter, not a secret)
            delay = min(delay * 2, 1.0)

    def _batch_once(self, commands: Sequence[Command]) -> list[Any]:
        conn = self.connection()
        self._take_reply(conn)
        try:
            if len(commands) == 1:
                conn.send_packed_command(conn.pack_command(*commands[0]), check_health=False)
                return [conn.read_response()]
            conn.send_packed_command(conn.pack_commands(commands), check_health=False)
            replies, failed = [], None
            for _ in commands:
                try:
                    replies.append(conn.read_response())
                except ResponseError as error:
                    failed = failed or error
            if failed is not None:
                raise failed
            return replies
        except ResponseError:
            raise
        except BaseException:
            self.close()  # a reply may be under way: nobody must read it as the answer to something else
            raise

    def connection(self) -> AbstractConnection:
        """Return the live connection, made anew after a fork or a failure. The caller holds `lock`."""
        if self._conn is None or self._pid != os.getpid():
            self._pid = os.getpid()
            self._flight = None
            conn = self.pool.connection_class(**self.pool.connection_kwargs)
            conn.connect()
            self._conn = conn
        return self._conn

    def abort(self) -> None:
        """End the read that another thread is waiting in, for good: the link is of no use afterwards."""
        self._aborted = True
        sock = getattr(self._conn, "_sock", None)
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection; the next command opens a new one."""
        conn, self._conn = self._conn, None
        self._flight = None
        if conn is not None and self._pid == os.getpid():
            with contextlib.suppress(RedisError, OSError):  # it may be gone already
                conn.disconnect()
