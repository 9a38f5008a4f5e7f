"""What a client knows of each key it holds, shared by all its futures of that key."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from celery_mem.client.parcels import Parcel

PENDING, FINISHED, ERROR, CANCELLED, LOST = "pending", "finished", "error", "cancelled", "lost"
FINAL = frozenset({FINISHED, ERROR, CANCELLED})


class KeyState:
    """One held key. Changed under the client's lock, read anywhere.

    Attributes:
        text: key text.
        epoch: the client's number for the call that took the hold; notices with another one belong to an
            earlier hold.
        refs: live futures. Invariant: the key leaves the client's table when this reaches 0.
        status: pending, finished, error, cancelled or lost.
        data: the inline result, if the notice brought it.
        error: bytes of the error.
        reason: why it was cancelled; of lost data the key, newline, why nothing makes it again.
        parcel: the call that makes it, while it is pending and the client keeps that.
    """

    __slots__ = ("data", "epoch", "error", "parcel", "reason", "refs", "status", "text", "watchers")

    def __init__(self, text: str, epoch: int) -> None:
        self.text = text
        self.epoch = epoch
        self.refs = 0
        self.status = PENDING
        self.data: bytes | None = None
        self.error = b""
        self.reason = ""
        self.parcel: Parcel | None = None
        self.watchers: list[Callable[[KeyState], Any]] | None = None


class Countdown:
    """Waits until a number of keys is final. Call it with the client's lock held.

    Args:
        left: the number.
        until_failure: also end with the first key that failed or was cancelled.
    """

    __slots__ = ("_event", "_until_failure", "left")

    def __init__(self, left: int, *, until_failure: bool = False) -> None:
        self.left = left
        self._until_failure = until_failure
        self._event = threading.Event()

    def __call__(self, state: KeyState) -> None:
        self.left -= 1
        if self.left <= 0 or (self._until_failure and state.status != FINISHED):
            self._event.set()

    @property
    def is_over(self) -> bool:
        """Whether it counted them all."""
        return self.left <= 0

    def wait(self, timeout: float | None) -> bool:
        """Return whether the count reached 0 in time."""
        return self._event.wait(timeout)


def watch(states: Iterable[KeyState], watcher: Callable[[KeyState], Any]) -> None:
    """Call `watcher` once for each state when it becomes final. The caller holds the client's lock."""
    for state in states:
        if state.watchers is None:
            state.watchers = [watcher]
        else:
            state.watchers.append(watcher)


def unwatch(states: Iterable[KeyState], watcher: Callable[[KeyState], Any]) -> None:
    """Undo `watch`. The caller holds the client's lock."""
    for state in states:
        if state.watchers and watcher in state.watchers:
            state.watchers.remove(watcher)


async def until_final(state: KeyState, lock: threading.RLock) -> None:
    """Wait in an event loop until a key is final.

    Args:
        lock: the client's lock.
    """
    loop, event = asyncio.get_running_loop(), asyncio.Event()

    def wake(_: KeyState) -> None:
        loop.call_soon_threadsafe(event.set)

    with lock:
        if state.status in FINAL:
            return
        watch([state], wake)
    try:
        await event.wait()
    finally:
        with lock:
            unwatch([state], wake)


def seconds_left(deadline: float | None) -> float | None:
    """Return what is left until a deadline of `time.monotonic`, at least 0; None stays None."""
    return None if deadline is None else max(0.0, deadline - time.monotonic())
