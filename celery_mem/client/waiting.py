"""Waiting for several futures: `wait` and `as_completed`."""

from __future__ import annotations

import queue
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from celery_mem.client.future import Future
from celery_mem.client.states import (
    CANCELLED,
    FINAL,
    Countdown,
    KeyState,
    seconds_left,
    unwatch,
    watch,
)
from celery_mem.errors import FuturesCancelledError
from celery_mem.graph import inside
from celery_mem.graph.collections import futures_of

if TYPE_CHECKING:
    from celery_mem.client.client import Client
    from celery_mem.client.session import Session

ALL_COMPLETED, FIRST_COMPLETED = "ALL_COMPLETED", "FIRST_COMPLETED"


class DoneAndNotDone(NamedTuple):
    """What `wait` returns."""

    done: set[Future]
    not_done: set[Future]


def wait(fs: Any, timeout: float | str | None = None, return_when: str = ALL_COMPLETED) -> DoneAndNotDone:
    """Wait for futures, or for the persisted parts of collections; errors are not raised.

    Args:
        fs: a future, a collection, or containers of them.
        timeout: seconds, or a text such as "10s"; None waits without end.
        return_when: ALL_COMPLETED or FIRST_COMPLETED.
    Raises:
        TimeoutError: not all (or none) are done in time; the tasks go on.
        FuturesCancelledError: some were cancelled.
    """
    if return_when not in (ALL_COMPLETED, FIRST_COMPLETED):
        raise ValueError(f"return_when is ALL_COMPLETED or FIRST_COMPLETED, not {return_when!r}")
    futures = futures_of(fs)
    seconds = _seconds(timeout)
    deadline = None if seconds is None else time.monotonic() + seconds
    if return_when == FIRST_COMPLETED:
        in_time = not futures or _wait_for_first(futures, deadline)
    else:
        in_time = all(_wait_for_all(c, states, deadline) for c, states in _by_client(futures))
    if not in_time:
        left = sum(f.status not in FINAL for f in futures)
        raise TimeoutError(f"wait: {left} of {len(futures)} futures not done after {timeout} s")
    if cancelled := [f for f in futures if f.status == CANCELLED]:
        raise FuturesCancelledError(tuple(f.key for f in cancelled))
    done = {f for f in futures if f.done()}
    return DoneAndNotDone(done, set(futures) - done)


def _wait_for_first(futures: Sequence[Future], deadline: float | None) -> bool:
    first = Countdown(1)
    groups = list(_by_client(futures))
    try:
        for client, states in groups:
            client.session.flush()
            with client.session.lock:
                if any(s.status in FINAL for s in states):
                    return True
                watch(states, first)
        return inside.wait_for(first.wait, seconds_left(deadline))
    finally:
        for client, states in groups:
            with client.session.lock:
                unwatch(states, first)


def _wait_for_all(client: Client, states: Sequence[KeyState], deadline: float | None) -> bool:
    client.session.flush()
    with client.session.lock:
        pending = [s for s in states if s.status not in FINAL]
        countdown = Countdown(len(pending))
        watch(pending, countdown)
    in_time = not pending or inside.wait_for(countdown.wait, seconds_left(deadline))
    with client.session.lock:
        unwatch(pending, countdown)
    return in_time


def _by_client(futures: Iterable[Future]) -> Iterator[tuple[Client, list[KeyState]]]:
    groups: dict[int, tuple[Client, list[KeyState]]] = {}
    for future in futures:
        client, state = future._bound()
        groups.setdefault(id(client), (client, []))[1].append(state)
    yield from groups.values()


def _seconds(timeout: float | str | None) -> float | None:
    if isinstance(timeout, str):
        from dask.utils import parse_timedelta

        seconds: float = parse_timedelta(timeout)
        return seconds
    return timeout


class as_completed:  # noqa: N801 (the name that everybody knows)
    """Iterate over futures as they become done: finished, failed or cancelled; also with `async for`.

    Args:
        futures: the first ones; more may be added while iterating.
        with_results: yield (future, result) pairs.
        raise_errors: with results, raise a task's error; False puts (class, error, traceback) in the place of
            the result.
        timeout: seconds for the whole iteration.
    Raises:
        TimeoutError: from the iteration, when the time is over.
    """

    def __init__(
        self,
        futures: Iterable[Future] = (),
        *,
        with_results: bool = False,
        raise_errors: bool = True,
        timeout: float | str | None = None,
    ) -> None:
        self.with_results = with_results
        self.raise_errors = raise_errors
        seconds = _seconds(timeout)
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._arrivals = _Arrivals()
        # The futures are kept here and not by what waits for them: they are free when this object is.
        self._waiting: dict[KeyState, list[Future]] = {}
        self._sessions: set[Session] = set()
        self.update(futures)

    def add(self, future: Future) -> None:
        """Add a future."""
        self.update([future])

    def update(self, futures: Iterable[Future]) -> None:
        """Add futures."""
        for future in futures:
            client, state = future._bound()
            self._waiting.setdefault(state, []).append(future)
            self._sessions.add(client.session)
            with client.session.lock:
                if state.status in FINAL:
                    self._arrivals(state)
                else:
                    watch([state], self._arrivals)

    def count(self) -> int:
        """Return how many futures were not yielded yet."""
        return sum(map(len, self._waiting.values()))

    def is_empty(self) -> bool:
        """Whether all futures were yielded."""
        return not self._waiting

    def has_ready(self) -> bool:
        """Whether the next one is there already."""
        return self._arrivals.has_next()

    def clear(self) -> None:
        """Forget all futures."""
        for state, futures in self._waiting.items():
            for future in futures:
                if future.client is not None:
                    with future.client.session.lock:
                        unwatch([state], self._arrivals)
        self._waiting.clear()
        while self.has_ready():
            self._arrivals.take()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self._waiting:
            raise StopIteration
        return self._shaped(self._next())

    def next_batch(self, block: bool = True) -> list[Any]:
        """Return all that are done now.

        Args:
            block: wait for the first one if none is; False may return none.
        Raises:
            TimeoutError: the time of the whole iteration is over.
        """
        batch = [self._shaped(self._next())] if block and self._waiting else []
        while self.has_ready():
            batch.append(self._shaped(self._next()))
        return batch

    def batches(self) -> Iterator[list[Any]]:
        """Yield lists of what is done, until all were yielded."""
        while self._waiting:
            yield self.next_batch()

    async def __aiter__(self) -> AsyncIterator[Any]:
        import asyncio

        loop, event = asyncio.get_running_loop(), asyncio.Event()
        self._arrivals.tell = lambda: loop.call_soon_threadsafe(event.set)
        try:
            while self._waiting:
                event.clear()
                self._send()
                if not self.has_ready() and inside.worker is not None:
                    # Where this is a task, its slot has to help, which needs a thread.
                    left = seconds_left(self._deadline)
                    if not await asyncio.to_thread(inside.wait_for, self._arrivals.wait, left):
                        raise self._timeout()
                elif not self.has_ready():
                    try:
                        await asyncio.wait_for(event.wait(), seconds_left(self._deadline))
                    except TimeoutError:
                        raise self._timeout() from None
                elif self.with_results:
                    yield await asyncio.to_thread(self._shaped, self._next())
                else:
                    yield self._next()
        finally:
            self._arrivals.tell = None

    def _send(self) -> None:
        """Have sent what is about to be waited for."""
        if not self.has_ready():
            for session in self._sessions:
                session.flush()

    def _next(self) -> Future:
        self._send()
        if not inside.wait_for(self._arrivals.wait, seconds_left(self._deadline)):
            raise self._timeout()
        state = self._arrivals.take()
        futures = self._waiting[state]
        future = futures.pop(0)
        if not futures:
            del self._waiting[state]
        return future

    def _timeout(self) -> TimeoutError:
        return TimeoutError(f"as_completed: {self.count()} futures not done in time")

    def _shaped(self, future: Future) -> Any:
        if not self.with_results:
            return future
        try:
            return future, future.result()
        except Exception as error:
            if self.raise_errors:
                raise
            return future, (type(error), error, error.__traceback__)


class _Arrivals:
    """Keys that became final, in order; `tell` is called for each where an event loop waits for them."""

    def __init__(self) -> None:
        self.tell: Callable[[], Any] | None = None
        self._states: queue.SimpleQueue[KeyState] = queue.SimpleQueue()
        self._next: KeyState | None = None

    def has_next(self) -> bool:
        return self._next is not None or not self._states.empty()

    def wait(self, timeout: float | None) -> bool:
        """Wait for the next one; returns whether it came."""
        if self._next is None:
            try:
                self._next = self._states.get(timeout=timeout)
            except queue.Empty:
                return False
        return True

    def take(self) -> KeyState:
        """Return the next one, which is there."""
        state, self._next = self._next or self._states.get(), None
        return state

    def __call__(self, state: KeyState) -> None:
        self._states.put(state)
        if (tell := self.tell) is not None:
            tell()
