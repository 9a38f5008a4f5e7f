"""A client's session with the namespace: its lease, the keys it holds, and the order of its commands."""

from __future__ import annotations

import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from redis.exceptions import ResponseError

from celery_mem.client.listener import Listener, apply_notice
from celery_mem.client.states import CANCELLED, PENDING, KeyState
from celery_mem.config import Settings
from celery_mem.errors import (
    CeleryMemError,
    ClosedClientError,
    NamespaceResetError,
    StateError,
    UnknownClientError,
    raise_for_reply,
)
from celery_mem.memory import blobs
from celery_mem.memory.serialize import loads_inline
from celery_mem.state.keys import TASK
from celery_mem.state.link import Command
from celery_mem.state.store import NewData, NewTask, Store, Tickets

log = logging.getLogger("celery_mem.client")

RELEASE_CHUNK = 500
RELEASE_WINDOW_S = 0.005
"""Releases that come within this time go together: futures are mostly dropped many at once."""


class Session:
    """What a client has in Redis.

    Two locks. `lock` guards the table of key states and is held for moments only. `order` is held while a command
    that takes or drops holds is sent: whether a key is still referenced is decided and sent under it, so a release
    never overtakes a hold of the same key. `order` is taken before `lock`, never the other way round.

    Args:
        settings: where and how.
        name: beginning of the client's id.
        send_tickets: sends tickets that a script asked for.
        first_timeout: seconds to wait for Redis at first.
    """

    def __init__(
        self, settings: Settings, name: str, send_tickets: Callable[[Tickets], None], *, first_timeout: float
    ) -> None:
        self.settings = settings
        self.id = f"{name}-{secrets.token_hex(5)}"
        self.pid = os.getpid()
        self.send_tickets = send_tickets
        self.store = Store.connect(settings.replace(retry_timeout=first_timeout))
        self.store.link.retry_timeout = settings.retry_timeout
        self.bulk = self.store.link.twin()  # large data, so that small commands need not wait behind it
        self.known_functions: set[str] = set()
        self.lock = threading.RLock()
        self.order = threading.RLock()
        self.states: dict[str, KeyState] = {}
        self.closed = False
        self._epoch = 0
        self._released: queue.SimpleQueue[KeyState | None] = queue.SimpleQueue()
        self.store.renew_client(self.id, join=True)
        self.listener = Listener(self)
        self.listener.start()
        self._keeper = threading.Thread(target=self._keep, name="celery-mem-keeper", daemon=True)
        self._keeper.start()

    # --- holds ---

    def next_epoch(self) -> int:
        """Return a new number for a call that takes holds. The caller holds `lock`."""
        self._epoch += 1
        return self._epoch

    def refer(self, text: str, epoch: int) -> tuple[KeyState, bool]:
        """Count one more future of a key; returns its state and whether it is new. The caller holds `lock`."""
        state = self.states.get(text)
        new = state is None
        if state is None:
            state = self.states[text] = KeyState(text, epoch)
        state.refs += 1
        return state, new

    def release_later(self, state: KeyState) -> None:
        """Count one future less, soon; safe to call from a finalizer."""
        self._released.put(state)

    def submit(
        self,
        chunks: Iterable[tuple[list[NewTask], list[tuple[str, bytes]], list[Command]]],
        epoch: int,
        generation: int | None = None,
    ) -> int:
        """Send chunks of tasks: (tasks, functions they use, commands ahead of them); returns their rank."""
        with self.order:
            for tasks, functions, before in chunks:
                self.check_open()
                generation, tickets = self._guarded(
                    lambda t=tasks, f=functions, b=before, g=generation: self.store.submit(  # type: ignore[misc]
                        self.id, epoch, t, f, generation=g, before=b
                    )
                )
                self.send_tickets(tickets)
        return generation or 0

    def put(self, data: Sequence[NewData], epoch: int, before: Sequence[Command]) -> None:
        """Send data to be held."""
        with self.order:
            self.check_open()
            self.send_tickets(self._guarded(lambda: self.store.put(self.id, epoch, data, before=before)))

    def hold(self, texts: Sequence[str], epoch: int) -> list[str]:
        """Hold existing keys; returns those that do not exist."""
        with self.order:
            self.check_open()
            unknown, tickets = self._guarded(lambda: self.store.hold(self.id, epoch, texts))
            self.send_tickets(tickets)
        return unknown

    def cancel(self, texts: Sequence[str], force: bool, reason: str) -> None:
        """Drop holds on keys and what depends on them; their futures here are cancelled when this returns."""
        with self.order:
            self.check_open()
            dropped, tickets = self._guarded(
                lambda: self.store.cancel(self.id, texts, force=force, reason=reason)
            )
            with self.lock:
                for text in {*texts, *dropped}:
                    state = self.states.pop(text, None)
                    if state is not None:
                        state.status, state.reason = CANCELLED, reason or "cancelled by this client"
                        self._finish(state)
        self.send_tickets(tickets)

    def retry(self, texts: Sequence[str]) -> None:
        """Run failed tasks again; their futures here are pending when this returns."""
        with self.order:
            self.check_open()
            with self.lock:
                states = [s for t in texts if (s := self.states.get(t)) is not None and s.status == "error"]
                for state in states:
                    state.status, state.error = PENDING, b""
            tickets = self._guarded(lambda: self.store.retry([s.text for s in states]))
        self.send_tickets(tickets)

    def drop_loans(self, texts: Sequence[str]) -> None:
        """Drop holds that were taken only while a large graph was being sent."""
        with self.order, self.lock:
            mine = [t for t in texts if t not in self.states]
        for i in range(0, len(mine), RELEASE_CHUNK):
            with self.order:
                self.send_tickets(self.store.release(self.id, mine[i : i + RELEASE_CHUNK]))

    def forget(self, states: Iterable[KeyState], reason: str) -> None:
        """Give up states whose call failed."""
        with self.lock:
            for state in states:
                if self.states.get(state.text) is state:
                    del self.states[state.text]
                state.status, state.reason = CANCELLED, reason
                self._finish(state)

    # --- reads and large data ---

    def write(self, commands: Sequence[Command]) -> None:
        """Write a blob. Raises StoreFullError if Redis has no room."""
        try:
            blobs.write(self.bulk, commands)
        except ResponseError as error:
            raise_for_reply(error, "write")

    def fetch(self, text: str, what: str) -> tuple[bool, Any]:
        """Read a result that no notice brought; returns whether it is there, and the object."""
        value, token = self.bulk.call("HMGET", self.store.keys.of("task", text), TASK["value"], TASK["blob"])
        if value is not None:
            return True, loads_inline(value, what)
        found = None
        if token is not None:
            found = blobs.load(self.bulk, self.store.keys.blob(token.decode(), text), what)
        return (False, None) if found is None else (True, found[0])

    def task_fields(self, texts: Sequence[str], *names: str) -> list[list[bytes | None]]:
        """Read fields of task records."""
        fields = [TASK[name] for name in names]
        return (
            self.bulk.batch([("HMGET", self.store.keys.of("task", t), *fields) for t in texts])
            if texts
            else []
        )

    def processing(self) -> dict[str, list[str]]:
        """Read what each node is running."""
        keys = self.store.keys
        out: dict[str, list[str]] = {}
        for node in self.bulk.call("ZRANGE", keys.fixed("nodes"), 0, -1):
            slots = self.bulk.call("SMEMBERS", keys.of("node_slots", node.decode()))
            running = (
                self.bulk.batch([("HKEYS", keys.of("slot", s.decode())) for s in slots]) if slots else []
            )
            out[node.decode()] = [key.decode() for found in running for key in found]
        return out

    def count_nodes(self) -> int:
        """Count the nodes that have joined."""
        n: int = self.bulk.call("ZCARD", self.store.keys.fixed("nodes"))
        return n

    # --- notices ---

    def apply(self, entries: Iterable[Sequence[bytes]]) -> None:
        """Take in notices, each a flat list of key, notice, key, notice, ..."""
        with self.lock:
            states = self.states
            for fields in entries:
                for i in range(0, len(fields), 2):
                    state = states.get(fields[i].decode())
                    if state is None:
                        continue
                    epoch, _, rest = fields[i + 1].partition(b" ")
                    if int(epoch) == state.epoch and apply_notice(state, rest[0], rest[1:]):
                        if state.status == CANCELLED:
                            del states[state.text]
                        self._finish(state)

    def _finish(self, state: KeyState) -> None:
        watchers, state.watchers = state.watchers, None
        for watcher in watchers or ():
            watcher(state)

    # --- lease, releases, end ---

    def _keep(self) -> None:
        """Send releases as they come, and renew the lease."""
        pause = self.settings.client_lease / 4
        due = time.monotonic() + pause
        while not self.closed:
            try:
                state = self._released.get(timeout=max(0.0, due - time.monotonic()))
            except queue.Empty:
                state = None
            try:
                if state is not None:
                    self._release([state])
                if time.monotonic() >= due and not self.closed:
                    due = time.monotonic() + pause
                    self._guarded(lambda: self.store.renew_client(self.id))
            except (CeleryMemError, OSError) as error:
                if not self.closed:
                    log.warning("client %s: %s", self.id, error)

    def _release(self, dropped: list[KeyState]) -> None:
        """Send the release of `dropped` and of whatever else is queued, unless somebody refers to it again."""
        time.sleep(RELEASE_WINDOW_S)
        while len(dropped) < 10 * RELEASE_CHUNK:
            try:
                state = self._released.get_nowait()
            except queue.Empty:
                break
            if state is not None:
                dropped.append(state)
        with self.order:
            with self.lock:
                gone = []
                for state in dropped:
                    state.refs -= 1
                    if state.refs == 0 and self.states.get(state.text) is state:
                        del self.states[state.text]
                        gone.append(state.text)
            for i in range(0, len(gone), RELEASE_CHUNK):
                self.send_tickets(
                    self._guarded(lambda i=i: self.store.release(self.id, gone[i : i + RELEASE_CHUNK]))  # type: ignore[misc]
                )

    def _guarded(self, call: Callable[[], Any]) -> Any:
        """Run a script; if it says that this session's state is gone, tell all futures before raising."""
        try:
            return call()
        except (UnknownClientError, NamespaceResetError) as error:
            self._state_lost(error)
            raise

    def _state_lost(self, error: StateError) -> None:
        with self.lock:
            lost = list(self.states.values())
        self.forget(lost, str(error))
        if isinstance(error, NamespaceResetError):
            self.store.generation = Store.connect(self.settings, self.store.link).generation
        self.store.renew_client(self.id, join=True)

    def check_open(self) -> None:
        """Raise ClosedClientError if the session is closed, or belongs to the process that forked this one."""
        if self.closed:
            raise ClosedClientError("this client is closed; make a new one")
        if self.pid != os.getpid():
            raise ClosedClientError(
                "this client belongs to the parent process; make a new one in this process"
            )

    def close(self) -> None:
        """Release everything and end; harmless when repeated."""
        with self.order:
            if self.closed or self.pid != os.getpid():
                self.closed = True
                return
            self.closed = True
        self._released.put(None)
        with self.lock:
            states = list(self.states.values())
        self.forget(states, "its client was closed")
        self.listener.stop()
        try:
            left = 1
            while left:
                left, tickets = self.store.expire_client(self.id)
                self.send_tickets(tickets)
        except (CeleryMemError, OSError) as error:
            log.warning("client %s could not sign off, its lease will: %s", self.id, error)
        current = threading.current_thread()
        for thread in (self.listener, self._keeper):
            if thread is not current:
                thread.join(timeout=5.0)
        self.listener.link.close()
        self.store.link.close()
        self.bulk.close()
