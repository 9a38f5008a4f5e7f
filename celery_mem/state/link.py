"""One connection to Redis that comes back by itself, for callers whose commands may be repeated.

redis-py would re-send a command up to ten times on its own; here its retries are off, and a repeat happens
only in this file, because every script of ours is safe to repeat (docs/design.md, "Calls that are repeated").
"""

from __future__ import annotations

import contextlib
import os
import random
import re
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
    ClusterDownError,
    ConnectionError,
    MasterDownError,
    NoPermissionError,
    NoScriptError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,
    TryAgainError,
)
from redis.retry import Retry
from redis.sentinel import Sentinel, SentinelConnectionPool

from celery_mem.config import Settings, check_url, mask_url
from celery_mem.errors import RedisUnavailableError, raise_for_reply
from celery_mem.sentinels import SentinelAddress, is_sentinel, parse_sentinel
from celery_mem.state.keys import META, Keys
from celery_mem.state.loader import Script, load_script

Command = tuple[Any, ...]
Repeat = Callable[[tuple[Any, ...]], tuple[Any, ...]]
_PASSING = re.compile(
    r"(?:ERR Error running script .*-)?"  # as Redis 6 says it
    r"(BUSY|LOADING|READONLY|MASTERDOWN|MISCONF|NOREPLICAS|CLUSTERDOWN|TRYAGAIN|UNBLOCKED)\b"
)
"""Errors that pass: a script runs too long, a replica has no master, the disk is full..."""
_RUN_ID = re.compile(rb"^run_id:(\w+)", re.MULTILINE)
IN_PROCESS: dict[str, ConnectionPool] = {}
"""Servers that are simulated in this process, by address; `celery_mem.testing` enters its own."""
LONGEST_BLOCK_S = 10.0
"""How long a blocking command may wait in Redis. Silence beyond that is a connection that died unseen."""
BROKEN = (ConnectionError, TimeoutError, OSError)
"""Errors after which the connection is replaced; whether the last command was carried out is unknown."""


def make_pool(
    url: str, *, connect_timeout: float = 5.0, socket_timeout: float | None = 60.0
) -> ConnectionPool:
    """Return a pool for `url` without retries of its own and with plain replies (RESP2)."""
    if url in IN_PROCESS:
        return IN_PROCESS[url]
    if is_sentinel(check_url(url)):
        return _sentinel_pool(parse_sentinel(url), connect_timeout, socket_timeout)
    if url.startswith("redis+socket://"):
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


def _sentinel_pool(
    address: SentinelAddress, connect_timeout: float, socket_timeout: float | None
) -> ConnectionPool:
    """Return a pool whose connections each ask the Sentinels first which server is the master."""
    asking = {"socket_timeout": connect_timeout, "socket_connect_timeout": connect_timeout, "protocol": 2}
    sentinels = Sentinel(
        address.hosts, sentinel_kwargs={**asking, "password": address.sentinel_password}, protocol=2
    )
    return SentinelConnectionPool(
        address.service,
        sentinels,
        db=address.db,
        username=address.username,
        password=address.password,
        protocol=2,
        retry=Retry(NoBackoff(), 0),
        socket_timeout=socket_timeout,
        socket_connect_timeout=connect_timeout,
        socket_keepalive=True,
    )


class Flight:
    """A script that was sent and goes on while its caller does something else; `Link.launch` makes it."""

    def __init__(self, link: Link, script: Script, args: tuple[Any, ...]) -> None:
        self.reply: Any = None
        self._link = link
        self._script = script
        self._args = args

    def land(self) -> Any:
        """Wait for the reply and return it; raises what `Link.run` does."""
        reply = self.wait()
        if reply is None or isinstance(reply, ResponseError):
            # The connection broke, or Redis refused, for now or for good: the ordinary way deals with it.
            return self._link.run(self._script, *self._args)
        return reply

    def wait(self) -> Any:
        """Wait for the reply and return it: an error if Redis refused, None if the connection broke."""
        self._link.await_flight(self)
        return self.reply


class Link:
    """A connection used by one command, or one batch of commands, at a time; threads wait for each other.

    Each new connection is greeted before it carries a command: what its forerunner may still have under way
    is made void (by CLIENT KILL), and where another server process answers than before, the namespace gets a
    new generation: it may lack the last writes. See docs/design.md, "Another server".

    Args:
        pool: where connections come from.
        retry_timeout: seconds for which a broken connection is tried again.
        address: what error texts call the server; never holds a password.
        meta: Redis key of the namespace's `meta`; empty if there is none.
    """

    def __init__(
        self, pool: ConnectionPool, *, retry_timeout: float = 60.0, address: str = "", meta: str = ""
    ) -> None:
        self.pool = pool
        self.retry_timeout = retry_timeout
        self.address = address
        self.meta = meta
        self.run_id = ""  # of the server process; empty if it does not tell
        self.n_connects = 0
        self.lock = threading.RLock()
        self._conn: AbstractConnection | None = None
        self._flight: Flight | None = None  # whose reply is the next that the connection brings
        self._id = b""  # of the last connection, as the server calls it
        self._pid = os.getpid()
        self._aborted = False
        self._used = 0.0  # when, by `time.monotonic`

    @classmethod
    def connect(cls, settings: Settings, *, blocking: bool = False) -> Link:
        """Return a link for `settings`; `blocking` gives one whose reads may wait for `LONGEST_BLOCK_S`."""
        pool = make_pool(
            settings.url,
            connect_timeout=settings.connect_timeout,
            socket_timeout=settings.reply_timeout + (LONGEST_BLOCK_S if blocking else 0.0),
        )
        meta = Keys(settings.namespace).fixed("meta")
        return cls(pool, retry_timeout=settings.retry_timeout, address=mask_url(settings.url), meta=meta)

    def twin(self) -> Link:
        """Return a second, independent link to the same server."""
        return Link(self.pool, retry_timeout=self.retry_timeout, address=self.address, meta=self.meta)

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
            # With its traceback the flight would hold our callers' frames, and what is in them, until a gc.
            flight.reply = error.with_traceback(None)
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
        deadline = 0.0
        delay = 0.01
        while True:
            try:
                with self.lock:
                    return self._batch_once(commands)
            except AuthenticationError as error:
                raise RedisUnavailableError(
                    f"Redis at {self.address} refuses the password: {error}"
                ) from error
            except (*BROKEN, BusyLoadingError, ReadOnlyError, ResponseError) as error:
                if isinstance(error, ResponseError) and not _passes(error):
                    raise
                if "CERTIFICATE_VERIFY_FAILED" in str(error):
                    raise RedisUnavailableError(
                        f"the certificate of Redis at {self.address} is not trusted: {error}; set "
                        "mem_ssl_ca_certs to the file of its authority, or mem_ssl_cert_reqs = 'none' to "
                        "take any, as on Heroku"
                    ) from error
                if isinstance(error, ReadOnlyError) or "READONLY" in str(error):
                    with self.lock:
                        self.close()  # another is the master now; after the others it is closed already
                # It may have taken `reply_timeout` to find that a connection is dead: the time begins now.
                deadline = deadline or time.monotonic() + self.retry_timeout
                if self._aborted or time.monotonic() + delay > deadline:
                    raise RedisUnavailableError(
                        f"no Redis at {self.address} for {self.retry_timeout:g} s: {error}"
                    ) from error
                if not isinstance(error, ResponseError) and again is not None:
                    commands = again()
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
            if self._pid != os.getpid():
                self._pid, self._id = os.getpid(), b""  # that one is the parent's
            self._flight = None
            conn = self.pool.connection_class(**self.pool.connection_kwargs)
            conn.connect()
            try:
                self._greet(conn)
            except BaseException:
                conn.disconnect()
                raise
            self._conn = conn
            self.n_connects += 1
        self._used = time.monotonic()
        return self._conn

    def _greet(self, conn: AbstractConnection) -> None:
        """Let nothing that was sent before be carried out any more; see whether the server is the same."""
        asked: list[Command] = [("CLIENT", "ID"), ("INFO", "server")]
        if self.meta:
            asked.append(("HGET", self.meta, META["run"]))
        own_id, info, *run = _ask(conn, asked)
        found = _RUN_ID.search(info) if isinstance(info, bytes) else None
        run_id = found[1].decode() if found else ""
        if self._id and run_id and run_id == self.run_id:
            _ask(conn, [("CLIENT", "KILL", "ID", self._id)])
        # Of a server that does not say who it is, the number might be anybody's after a restart.
        self._id = str(own_id).encode() if isinstance(own_id, int) and run_id else b""
        if run_id and run and isinstance(run[0], bytes) and run[0] != run_id.encode():
            script = load_script("new_run")
            (answer,) = _ask(conn, [("EVAL", script.source, 1, self.meta, run_id)])
            if isinstance(answer, ResponseError) and not isinstance(answer, NoPermissionError):
                raise answer  # who may only look leaves it to those who do more
        self.run_id = run_id

    def interrupt(self) -> None:
        """Have a read that another thread is waiting in fail, and be tried again on a new connection."""
        sock = getattr(self._conn, "_sock", None)
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def abort(self) -> None:
        """End the read that another thread is waiting in, for good: the link is of no use afterwards."""
        self._aborted = True
        self.interrupt()

    def rest(self, idle_s: float) -> bool:
        """Close the connection if it was not used for a while and nobody uses it now.

        Returns whether it is still open.
        """
        if self.lock.acquire(blocking=False):
            try:
                if self._flight is None and time.monotonic() - self._used >= idle_s:
                    self.close()
            finally:
                self.lock.release()
        return self._conn is not None

    def close(self) -> None:
        """Close the connection; the next command opens a new one."""
        conn, self._conn = self._conn, None
        self._flight = None
        if conn is not None and self._pid == os.getpid():
            with contextlib.suppress(RedisError, OSError):  # it may be gone already
                conn.disconnect()


def _ask(conn: AbstractConnection, commands: Sequence[Command]) -> list[Any]:
    """Send commands and return their replies; what the server refuses (an ACL, say) is an error among them.

    Raises:
        ResponseError: it takes no commands at all for now.
    """
    conn.send_packed_command(conn.pack_commands(commands), check_health=False)
    replies: list[Any] = []
    passing = None
    for _ in commands:
        try:
            replies.append(conn.read_response())
        except ResponseError as error:
            replies.append(error)
            passing = passing or (error if _passes(error) else None)
    if passing is not None:
        raise passing
    return replies


def _passes(error: ResponseError) -> bool:
    """Whether a server refuses commands for a while, before it carries out anything of them."""
    # Of some, redis-py keeps the class and drops the word.
    passing = (ReadOnlyError, MasterDownError, ClusterDownError, TryAgainError)
    return isinstance(error, passing) or _PASSING.match(str(error)) is not None
