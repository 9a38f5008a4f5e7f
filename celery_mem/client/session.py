"""A client's session with the namespace: its lease, the keys it holds, and the order of its commands."""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from redis.exceptions import InvalidResponse, ResponseError

from celery_mem.client.legacy import Legacy
from celery_mem.client.listener import Listener, apply_notice
from celery_mem.client.outbox import Outbox
from celery_mem.client.parcels import CHUNK_TASKS, Ledger
from celery_mem.client.reading import Reading
from celery_mem.client.recovery import Recovery
from celery_mem.client.releases import RELEASE_CHUNK, Releases
from celery_mem.client.states import CANCELLED, ERROR, FINISHED, PENDING, KeyState
from celery_mem.config import Settings, mask_url
from celery_mem.errors import (
    CeleryMemError,
    ClosedClientError,
    NamespaceResetError,
    RedisUnavailableError,
    RestartedError,
    StateError,
    UnknownClientError,
    raise_for_reply,
)
from celery_mem.graph.calls import Function
from celery_mem.graph.errors import encode_error
from celery_mem.graph.tickets import TicketOffice
from celery_mem.memory import blobs
from celery_mem.memory.seal import Kind, seal_of, warn_if_unsigned
from celery_mem.state.eviction import Eviction
from celery_mem.state.link import Command, Link, make_pool
from celery_mem.state.store import NewData, NewTask, Store, Tickets

log = logging.getLogger("celery_mem.client")

REST_S = 3.0
"""The connection for large data is closed when it was not used for so long."""

RECOVERIES = 5
"""Times that one call is begun anew since Redis lost track of the client."""
SIGNED_FUNCTIONS = 1000
SIGN_OFF_S = 1.0
"""Time that a closing session gives a Redis that does not answer."""

_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


class Session:
    """What a client has in Redis.

    Two locks. `lock` guards the table of key states and is held for moments only. `order` is held while a
    command that takes or drops holds is sent: whether a key is still referenced is decided and sent under it,
    so a release never overtakes a hold of the same key. `order` is taken before `lock`, never the other way
    round.

    Args:
        settings: where and how.
        name: beginning of the client's id.
        office: sends tickets that a script asked for.
        first_timeout: seconds to wait for Redis at first.
        lease_s: lets the session outlive its process by this time, under `name`; None: it ends with it.
    """

    def __init__(
        self,
        settings: Settings,
        name: str,
        office: TicketOffice,
        *,
        first_timeout: float,
        lease_s: float | None = None,
    ) -> None:
        self.settings = settings
        self.lease_s = lease_s or settings.client_lease
        self.id = f"{name}-{secrets.token_hex(5)}"
        self.pid = os.getpid()
        self._office = office
        self.seal = seal_of(settings)
        warn_if_unsigned(settings)
        self.store = _connect(settings, first_timeout)
        self.bulk = self.store.link.twin()  # large data, so that small commands need not wait behind it
        self.store.adopts = False  # first it is to be seen what became of the holds
        self.known_functions: set[str] = set()
        self._signed: dict[str, Function] = {}
        self.lock = threading.RLock()
        self.order = threading.RLock()
        self.states: dict[str, KeyState] = {}
        self.closed = False
        self.releases = Releases(self)
        self.outbox = Outbox(self)
        self.ledger = Ledger(settings.resubmit_bytes)
        self.lost_keys: dict[str, str] = {}  # keys that Redis lost and nobody can make again -> why
        self.bringing: set[str] = set()  # keys of data that is being sent
        self.reading = Reading(self)
        self._why_closed = "this client is closed; make a new one"
        self._has_given_way = False
        self._epoch = 0
        self.legacy = Legacy(self, name) if lease_s is not None else None
        self._renews_soon = False
        self._lost_because = ""  # why Redis lost track of this client, until both agree again
        self._n_restarts = 0
        self._why_restarted = ""
        _sessions.add(self)
        self._join()
        self.listener = Listener(self)
        self.listener.start()
        self._eviction = Eviction(self.store.link)
        self._eviction.warn()
        self._keeper = threading.Thread(target=self._keep, name="celery-mem-keeper", daemon=True)
        self._keeper.start()
        if self.legacy is not None:
            try:
                self.legacy.take()
            except BaseException:
                self.close(release=False)
                raise

    def _join(self) -> None:
        if self.legacy is not None:
            self.legacy.claim()
        else:
            self.store.renew_client(self.id, join=True)

    def send_tickets(self, tickets: Tickets) -> None:
        """Send tickets that a script asked for."""
        if tickets:
            self._office.send(tickets, self.store)

    # --- holds ---

    def next_epoch(self) -> int:
        """Return a new number for a call that takes holds. The caller holds `order`."""
        self._epoch += 1
        return self._epoch

    def refer(self, text: str, epoch: int) -> tuple[KeyState, bool]:
        """Count one more future of a key; returns its state and whether it is new. The caller holds `order`.

        A key whose last future is gone already begins anew: its release is sent first, or the call would get
        what an earlier one under the same key made.
        """
        if text in self.states or self.releases.owes(text):
            self.releases.count()
            if self.releases.owes(text):
                self.releases.flush()
        state = self.states.get(text)
        new = state is None
        if state is None:
            with self.lock:
                state = self.states[text] = KeyState(text, epoch)
        state.refs += 1
        return state, new

    def signed(self, function: Function) -> Function:
        """Return a function whose code is signed; each is signed once."""
        found = self._signed.get(function.hash)
        if found is None:
            code = self.seal.close(Kind.FUNCTION, function.hash, function.code)
            if len(self._signed) >= SIGNED_FUNCTIONS:
                self._signed.clear()  # a bound, not a policy
            found = self._signed[function.hash] = function._replace(code=code)
        return found

    def submit(
        self,
        chunks: Iterable[tuple[list[NewTask], list[tuple[str, bytes]]]],
        generation: int | None = None,
    ) -> int:
        """Send chunks of tasks, each with the functions that they use; returns their rank."""
        with self.order:
            self.flush_outbox()
            for tasks, functions in chunks:
                self.check_open()
                generation, tickets = self._guarded(
                    lambda t=tasks, f=functions, g=generation: self.store.submit(  # type: ignore[misc]
                        self.id, 0, t, f, generation=g
                    )
                )
                self.send_tickets(tickets)
        return generation or 0

    def launch(
        self, tasks: list[NewTask], functions: list[tuple[str, bytes]], generation: int | None
    ) -> Callable[[], int]:
        """Send a chunk of tasks; what is returned waits until Redis has them and returns their rank.

        The caller holds `order` until then.
        """
        self.flush_outbox()
        self.check_open()
        land = self.store.launch_submit(self.id, 0, tasks, functions, generation=generation)

        def arrive() -> int:
            rank: int
            rank, tickets = self._guarded(land)
            self.send_tickets(tickets)
            return rank

        return arrive

    def put(self, data: Sequence[NewData], epoch: int) -> None:
        """Send data to be held."""
        with self.order:
            self.check_open()
            self.flush_outbox()
            self.bringing = {d.key for d in data}
            try:
                self.send_tickets(self._guarded(lambda: self.store.put(self.id, epoch, data)))
            finally:
                self.bringing = set()

    def hold(self, texts: Sequence[str], epoch: int) -> list[str]:
        """Hold existing keys; returns those that do not exist."""
        with self.order:
            self.check_open()
            self.flush_outbox()
            unknown: list[str]
            unknown, tickets = self._guarded(lambda: self.store.hold(self.id, epoch, texts))
            self.send_tickets(tickets)
        return unknown

    def cancel(self, texts: Sequence[str], force: bool, reason: str) -> None:
        """Drop holds on keys and what depends on them; their futures here are cancelled when this returns."""
        with self.order:
            self.check_open()
            self.flush_outbox()
            dropped, tickets = self._guarded(
                lambda: self.store.cancel(self.id, texts, force=force, reason=reason)
            )
            with self.lock:
                for text in {*texts, *dropped}:
                    state = self.states.pop(text, None)
                    if state is not None:
                        state.reason, state.status = reason or "cancelled by this client", CANCELLED
                        self.finish(state)
        self.send_tickets(tickets)

    def retry(self, texts: Sequence[str]) -> None:
        """Run failed tasks again, with the failed inputs behind them and all that these took down.

        Their futures here are pending when this returns.
        """
        with self.order:
            self.check_open()
            epoch = self.next_epoch()
            with self.lock:
                failed = self._expect_anew(texts, epoch)
            try:
                more, tickets = self._guarded(lambda: self.store.retry(self.id, texts))
                self.send_tickets(tickets)
                with self.lock:
                    failed += self._expect_anew(more, epoch)
                # How they stand is told again: notices that do not count any more may have said it.
                again = list(dict.fromkeys((*texts, *more)))
                for start in range(0, len(again), CHUNK_TASKS):
                    page = again[start : start + CHUNK_TASKS]
                    self.hold([text for text in page if text in self.states], epoch)
            except BaseException:
                with self.lock:
                    for state in failed:
                        if state.status == PENDING:
                            state.status = ERROR
                            self.finish(state)
                raise

    def _expect_anew(self, texts: Sequence[str], epoch: int) -> list[KeyState]:
        """Have failed futures pend; returns their states. The caller holds `lock`.

        Their errors may be under way to this client still: notices so far do not count any more.
        """
        states = [s for text in texts if (s := self.states.get(text)) is not None]
        failed = [s for s in states if s.status == ERROR]
        for state in states:
            state.epoch = epoch
        for state in failed:
            state.status = PENDING
        return failed

    def expect_again(self, state: KeyState) -> None:
        """Wait for a result from now on that was there and is not any more."""
        with self.order:
            self.check_open()
            epoch = self.next_epoch()
            with self.lock:
                if state.status != FINISHED:
                    return  # it is known already
                # That it is there may still be under way to this client: notices so far do not count any
                # more.
                state.epoch, state.status, state.data = epoch, PENDING, None
            if self.hold([state.text], epoch) and state.status == PENDING:  # else a recovery has told more
                self.forget([state], "its task is gone")

    def confirm(self) -> None:
        """See that Redis knows this client; if it lost track of it, make them agree again."""
        with self.order:
            self.check_open()
            self._guarded(lambda: self.store.renew_client(self.id, lease_s=self.lease_s))

    def make_durable(self, texts: Sequence[str]) -> None:
        """Have results outlive all workers. The caller knows that they were submitted, or are about to be."""
        for _, tickets in self._in_pages(self.store.make_durable, texts):
            self.send_tickets(tickets)

    def entrust(self, texts: Sequence[str]) -> None:
        """Have tasks run to their end though nobody holds them any more."""
        self._in_pages(self.store.entrust, texts)

    def _in_pages(self, call: Callable[[Sequence[str]], Any], texts: Sequence[str]) -> list[Any]:
        """Run a script for keys, so many at a time, after what was submitted; returns its replies."""
        replies = []
        with self.order:
            self.check_open()
            self.flush_outbox()
            for start in range(0, len(texts), RELEASE_CHUNK):
                page = texts[start : start + RELEASE_CHUNK]
                replies.append(self._guarded(lambda p=page: call(p)))  # type: ignore[misc]
        return replies

    def flush_releases(self) -> None:
        """Release now what has no futures any more."""
        with self.order:
            if not self.closed:
                self.releases.flush()

    def flush(self) -> None:
        """Send what was submitted and still waits for company."""
        if not self.outbox.is_empty:
            with self.order:
                if not self.closed:
                    self.flush_outbox()

    def flush_outbox(self) -> None:
        """Send what waits, ahead of a call that the caller, who holds `order`, is about to send.

        Raises:
            RestartedError: the cluster was; what the call is about is cancelled.
        """
        before = self._n_restarts
        self.outbox.flush()
        if self._n_restarts != before:
            raise RestartedError(self._why_restarted)

    def release(self, texts: Sequence[str]) -> None:
        """Drop holds. The caller holds `order` and knows that no future needs them."""
        self.flush_outbox()
        self.send_tickets(self._guarded(lambda: self.store.release(self.id, texts)))

    def launch_release(self, texts: Sequence[str]) -> Callable[[], Tickets | None]:
        """Send a release that is not waited for, as `Store.launch_release` tells; else as `release`."""
        self.flush_outbox()
        return self.store.launch_release(self.id, texts)

    def forget(self, states: Iterable[KeyState], reason: str) -> None:
        """Give up states whose call failed, or whose keys are gone; their futures are cancelled."""
        with self.lock:
            for state in states:
                if self.states.get(state.text) is state:
                    del self.states[state.text]
                state.reason, state.status = reason, CANCELLED
                self.finish(state)

    def fail(self, states: Iterable[KeyState], error: BaseException) -> None:
        """Give up states whose tasks could not be sent; their futures raise `error`."""
        data = self.seal.close(Kind.ERROR, "", encode_error(error))
        with self.lock:
            for state in states:
                if state.status != PENDING:
                    continue
                if self.states.get(state.text) is state:
                    del self.states[state.text]
                state.error, state.status = data, ERROR
                self.finish(state)
        self.releases.owe([s.text for s in states])  # a part may have arrived

    # --- reads and large data ---

    def write(self, commands: Sequence[Command]) -> None:
        """Write a blob. Raises StoreFullError if Redis has no room."""
        self.check_open()
        try:
            blobs.write(self.bulk, commands)
        except ResponseError as error:
            raise_for_reply(error, "write")

    def processing(self) -> dict[str, list[str]]:
        """Read what each node is running."""
        self.check_open()
        keys = self.store.keys
        out: dict[str, list[str]] = {}
        for node in self.store.link.call("ZRANGE", keys.fixed("nodes"), 0, -1):
            slots = self.store.link.call("SMEMBERS", keys.of("node_slots", node.decode()))
            running = (
                self.store.link.batch([("HKEYS", keys.of("slot", s.decode())) for s in slots])
                if slots
                else []
            )
            out[node.decode()] = [key.decode() for found in running for key in found]
        return out

    def count_nodes(self) -> int:
        """Count the nodes that have joined."""
        self.check_open()
        n: int = self.store.link.call("ZCARD", self.store.keys.fixed("nodes"))
        return n

    # --- notices ---

    def apply(self, entries: Iterable[Sequence[bytes]], era: int = 0) -> None:
        """Take in notices, each a flat list of key, notice, key, notice, ..."""
        with self.lock:
            if era != self.listener.era:
                return
            for fields in entries:
                for i in range(0, len(fields), 2):
                    try:
                        self._take(fields[i], fields[i + 1])
                    except (ValueError, IndexError) as error:  # those behind it are not to be lost with it
                        log.error("left out an unreadable notice about %r: %s", fields[i][:200], error)

    def _take(self, key: bytes, notice: bytes) -> None:
        """Take in one notice. The caller holds `lock`."""
        state = self.states.get(key.decode())
        if state is None:
            if not key:
                self._hear(notice)
            return
        epoch, _, rest = notice.partition(b" ")
        if int(epoch) == state.epoch and apply_notice(state, rest[0], rest[1:]):
            if state.status == CANCELLED:
                del self.states[state.text]
            self.finish(state)

    def _hear(self, notice: bytes) -> None:
        """Take in a notice that is about no key. The caller holds `lock`."""
        if notice.endswith(b" r"):
            self.renew_soon()  # the cluster is restarted
        elif self.legacy is not None:
            self.legacy.hear(notice)

    def finish(self, state: KeyState) -> None:
        """Tell whoever waits that a key is final. The caller holds `lock`."""
        state.parcel = None
        watchers, state.watchers = state.watchers, None
        for watcher in watchers or ():
            try:
                watcher(state)
            except Exception:  # an event loop that is closed, say; others wait for the same key
                log.exception("could not tell that %s is %s", state.text, state.status)

    # --- lease, releases, end ---

    def _keep(self) -> None:
        """Send releases as they come, renew the lease, close the connection for large data when it rests."""
        pause = min(self.lease_s, self.settings.client_lease) / 4
        due = time.monotonic() + pause
        while not self.closed:
            left = max(0.0, due - time.monotonic())
            self.releases.wait(min(left, REST_S) if self.bulk.rest(REST_S) else left)
            try:
                self._send_until(due)
                if (time.monotonic() >= due or self._renews_soon) and not self.closed:
                    self._renews_soon = False
                    due = time.monotonic() + pause
                    if self._eviction.happened():
                        self._lost_because = "it evicted keys that were in use: see maxmemory-policy"
                    self._guarded(lambda: self.store.renew_client(self.id, lease_s=self.lease_s))
            except Exception as error:  # without this thread nothing would be released any more
                if self.closed:
                    return
                if isinstance(error, CeleryMemError):
                    log.warning("client %s: %s", self.id, error)
                else:
                    log.exception("client %s could not release or renew", self.id)
                time.sleep(0.2)

    def _send_until(self, due: float) -> None:
        """Send what waits and what was let go, until there is no more or the lease is due.

        Others have their turn while a part of it is under way.
        """
        while not self.closed:
            # A large submission may hold `order` for longer than the lease.
            if not self.order.acquire(timeout=max(0.0, due - time.monotonic())):
                break
            try:
                if self.closed:
                    return
                self.flush_outbox()
                if not self.releases.launch():
                    return
            finally:
                self.order.release()
            self.releases.land()
            if time.monotonic() >= due:
                break
        self.releases.ring()  # to go on

    def renew_soon(self) -> None:
        """Have the lease renewed at once."""
        self._renews_soon = True
        self.releases.ring()

    def _guarded(self, call: Callable[[], Any]) -> Any:
        """Run a script; if Redis lost track of this client, recover what can be and run it again."""
        for _ in range(RECOVERIES):
            try:
                if self._lost_because:
                    self._recover(None)  # the last time it was broken off
                return call()
            except (UnknownClientError, NamespaceResetError) as error:
                self._recover(error)
            except RedisUnavailableError:
                self.check_open()  # closing ends what other threads wait for
                raise
        return call()

    def _recover(self, error: StateError | None) -> None:
        """Make Redis and this client agree again; `error` says that they do not; None: they still do not."""
        with self.order:
            self.check_open()
            if error is None:
                pass
            elif isinstance(error, UnknownClientError):
                if self.legacy is not None and self.legacy.is_taken():
                    self.give_way(self.legacy.why_taken)
                    self.check_open()
                self._lost_because = (
                    f"its lease ran out, Redis did not hear of its client for {self.lease_s:g} s"
                )
            elif self._is_known():
                return  # another thread was here first
            elif self.store.rejoin():
                self._lost_because = "another server took over, which lacks the last writes"
            elif reason := self.store.why_restarted():
                self._begin_anew(reason)
                raise RestartedError(reason)
            else:
                self._lost_because = "it was emptied or replaced"
            if not self._lost_because:
                return
            log.warning("client %s: Redis lost track of it: %s", self.id, self._lost_because)
            try:
                Recovery(self, self._lost_because).run()
                self._join()
                self._lost_because = ""
            except (UnknownClientError, NamespaceResetError) as again:
                log.warning("client %s: once more: %s", self.id, again)  # _guarded goes on
            except BaseException:
                self._renews_soon = True
                raise

    def restart(self) -> None:
        """Give up all that anybody has in the namespace, and begin anew."""
        with self.order:
            self.check_open()
            reason = f"the cluster was restarted by client {self.id}"
            try:
                self._guarded(lambda: self.store.restart(reason))
            except RestartedError:
                return  # by somebody else, at the same moment
            self._begin_anew(reason)

    def _begin_anew(self, reason: str) -> None:
        """The namespace was restarted: cancel all futures, and join again. The caller holds `order`."""
        self._n_restarts += 1
        self._why_restarted = reason
        self.known_functions.clear()
        with self.lock:
            self.listener.begin_anew()
            states = list(self.states.values())
            self.outbox.forget()
            self.releases.forget()
        if self.legacy is not None:
            self.legacy.forget()
        self.forget(states, reason)
        self.store.hold_again(self.id, [], begin=True, lease_s=self.lease_s)
        self._join()

    def _is_known(self) -> bool:
        try:
            self.store.renew_client(self.id, lease_s=self.lease_s)
            return True
        except (UnknownClientError, NamespaceResetError):
            return False

    def give_way(self, reason: str) -> None:
        """End without a word to Redis, where everything belongs to another process by now."""
        with self.lock:
            if self.closed:
                return
            self.closed, self._has_given_way, self._why_closed = True, True, reason
            states = list(self.states.values())
            self.outbox.forget()
            self.releases.forget()
        self.forget(states, reason)
        self.releases.ring()

    def check_open(self) -> None:
        """Raise ClosedClientError if the session is closed, or another process's that forked this one."""
        if self.closed:
            raise ClosedClientError(self._why_closed)

    def leave_to_parent(self) -> None:
        """In a forked child: be closed, without a word to Redis, where everything belongs to the parent.

        The locks are replaced, for other threads may have held them at the moment of the fork.
        """
        self.lock, self.order = threading.RLock(), threading.RLock()
        self.closed = True
        self.outbox.forget()
        self._why_closed = "this client belongs to the parent process; make a new one in this process"
        for state in self.states.values():
            state.reason, state.status, state.watchers = self._why_closed, CANCELLED, None
        self.states = {}

    def close(self, *, release: bool = True) -> None:
        """Release everything and end; harmless when repeated.

        Args:
            release: False leaves what is held to whoever comes back under the name of this session.
        """
        if not release:
            self._send_all()  # what was submitted and dropped before counts
        with self.lock:
            if self.closed and not self._has_given_way:
                return
            is_ours, self._has_given_way, self.closed = not self.closed, False, True
            states = list(self.states.values())
        self.forget(states, "its client was closed")
        self.releases.ring()
        if is_ours:
            self._sign_off(release)
        for link in (self.store.link, self.bulk):
            link.abort()
        self.reading.close()
        deadline = time.monotonic() + 5.0
        for thread in (self.listener, self._keeper):
            while (
                thread.is_alive() and thread is not threading.current_thread() and time.monotonic() < deadline
            ):
                self.listener.stop()  # again: it may have been about to connect
                thread.join(timeout=0.05)
        for link in (self.listener.link, self.store.link, self.bulk):
            link.close()
        self._office.hang_up()

    def _send_all(self) -> None:
        if self.closed or not self.order.acquire(timeout=SIGN_OFF_S):
            return
        self.store.link.retry_timeout = SIGN_OFF_S
        try:
            self.flush_outbox()
            self.releases.flush()
        except (CeleryMemError, OSError) as error:
            log.warning("client %s closes, and could not tell what it let go: %s", self.id, error)
        finally:
            self.order.release()

    def _sign_off(self, release: bool) -> None:
        last = self.store.twin()  # the others may be busy, or waiting for a Redis that is gone
        last.link.retry_timeout = SIGN_OFF_S
        try:
            left = 1 if release else 0
            while left:
                left, tickets = last.expire_client(self.id)
                self.send_tickets(tickets)
            if not release:
                last.renew_client(self.id, lease_s=self.lease_s)
        except (CeleryMemError, OSError) as error:
            log.info("client %s could not sign off, its lease will: %s", self.id, error)
        finally:
            last.link.close()


def _connect(settings: Settings, timeout: float) -> Store:
    """Return a store once Redis answered, within `timeout` seconds; its link is more patient from then on.

    Raises:
        RedisUnavailableError: it did not.
    """
    pool = make_pool(
        settings.url,
        connect_timeout=min(timeout, settings.connect_timeout),
        socket_timeout=timeout,  # something else may listen there, and never answer
    )
    first = Link(pool, retry_timeout=timeout, address=mask_url(settings.url))
    try:
        store = Store.connect(settings, first)
    except InvalidResponse as error:
        raise RedisUnavailableError(f"what answers at {first.address} is no Redis: {error}") from error
    finally:
        first.close()
    store.link = Link.connect(settings)
    return store


def _leave_all_to_parent() -> None:
    for session in list(_sessions):
        session.leave_to_parent()


os.register_at_fork(after_in_child=_leave_all_to_parent)
