"""Waiting for several futures: `wait` and `as_completed`."""

from __future__ import annotations

import queue
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any, NamedTuple

from celery_mem.client.future import Future
from celery_mem.client.states import (
    CANCELLED,
    ERROR,
    FINAL,
    Countdown,
    KeyState,
    seconds_left,
    unwatch,
    watch,
)
from celery_mem.errors import FuturesCancelledError
from celery_mem.graph.collections import futures_of

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
    for client, states in _by_client(futures):
        with client.session.lock:
            pending = [s for s in states if s.status not in FINAL]
            enough = 1 if return_when == FIRST_COMPLETED else len(pending)
            if not pending or (return_when == FIRST_COMPLETED and len(pending) < len(states)):
                continue
            countdown = Countdown(enough)
            watch(pending, countdown)
        in_time = countdown.wait(seconds_left(deadline))
        with client.session.lock:
            unwatch(pending, countdown)
        if not in_time:
            left = sum(s.status not in FINAL for s in pending)
            raise TimeoutError(f"wait: {left} of {len(futures)} futures not done after {timeout} s")
    if cancelled := [f for f in futures if f.status == CANCELLED]:
        raise FuturesCancelledError(tuple(f.key for f in cancelled))
    done = {f for f in futures if f.done()}
    return DoneAndNotDone(done, set(futures) - done)


def _by_client(futures: Iterable[Future]) -> Iterator[tuple[Any, list[KeyState]]]:
    groups: dict[int, tuple[Any, list[KeyState]]] = {}
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
    """Iterate over futures as they become done.

    Args:
        futures: the first ones; more may be added while iterating.
        with_results: yield (future, result) pairs.
        raise_errors: with results, raise a task's error; False puts the error in the result's place.
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
        self._ready: queue.SimpleQueue[Future] = queue.SimpleQueue()
        self._left = 0
        self.update(futures)

    def add(self, future: Future) -> None:
        """Add a future."""
        self.update([future])

    def update(self, futures: Iterable[Future]) -> None:
        """Add futures."""
        for future in futures:
            client, state = future._bound()
            self._left += 1
            with client.session.lock:
                if state.status in FINAL:
                    self._ready.put(future)
                else:
                    watch([state], lambda _, f=future: self._ready.put(f))  # type: ignore[misc]

    def count(self) -> int:
        """Return how many futures were not yielded yet."""
        return self._left

    def is_empty(self) -> bool:
        """Whether all futures were yielded."""
        return self._left == 0

    def has_ready(self) -> bool:
        """Whether the next one is there already."""
        return not self._ready.empty()

    def clear(self) -> None:
        """Forget all futures."""
        self._ready = queue.SimpleQueue()
        self._left = 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._left == 0:
            raise StopIteration
        return self._shaped(self._next(block=True))

    def next_batch(self, block: bool = True) -> list[Any]:
        """Return all that are done now, at least one where `block` asks for it."""
        if self._left == 0:
            return []
        batch = [self._shaped(self._next(block=True))] if block else []
        while self.has_ready():
            batch.append(self._shaped(self._next(block=False)))
        return batch

    def batches(self) -> Iterator[list[Any]]:
        """Yield batches of what is done."""
        while self._left:
            yield self.next_batch()

    async def _anext(self) -> Any:
        import asyncio

        return await asyncio.get_running_loop().run_in_executor(None, self.__next__)

    async def __aiter__(self) -> AsyncIterator[Any]:
        while self._left:
            yield await self._anext()

    def _next(self, *, block: bool) -> Future:
        try:
            future = self._ready.get(block, seconds_left(self._deadline))
        except queue.Empty:
            raise TimeoutError(f"as_completed: {self._left} futures not done in time") from None
        self._left -= 1
        return future

    def _shaped(self, future: Future) -> Any:
        if not self.with_results:
            return future
        if not self.raise_errors and future.status in (ERROR, CANCELLED):
            error = future.exception() if future.status == ERROR else None
            return future, (type(error), error, future.traceback() if error else None)
        return future, future.result()
