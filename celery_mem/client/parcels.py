"""What a client keeps of its unfinished calls, so that they can be sent again if Redis loses them.

A parcel is the tasks of one call. The states of the keys that the call holds refer to it until they are
final; so does each parcel that depends on it. When nobody does, it is gone: nothing here is counted per task.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from celery_mem.client.states import KeyState
from celery_mem.graph.calls import Function
from celery_mem.state.store import NewTask

CHUNK_TASKS = 500
CHUNK_BYTES = 4 << 20
"""What one script call takes in: it holds up everybody else."""
LAST_ORDER = (1 << 24) - 1
TASK_BYTES = 300
"""What a task takes beside its payload."""

_numbers = itertools.count()


class Parcel:
    """The tasks of one call.

    Attributes:
        tasks: in an order in which each comes after those that it depends on.
        functions: by hash, those that the tasks use.
        blobs: token -> payload that went to Redis as a blob.
        above: unfinished parcels with tasks that these depend on.
        number: parcels that were made earlier have lower ones.
    """

    __slots__ = ("_ledger", "_nbytes", "above", "blobs", "functions", "number", "tasks")

    def __init__(
        self,
        tasks: list[NewTask],
        functions: Mapping[str, Function],
        blobs: Mapping[str, bytes] | None = None,
    ) -> None:
        self.tasks = tasks
        self.functions = functions
        self.blobs = blobs or {}
        self.above: Collection[Parcel] = ()
        self.number = next(_numbers)
        self._ledger: Ledger | None = None
        self._nbytes = 0

    def __del__(self) -> None:
        if self._ledger is not None:
            self._ledger.gone.append(self._nbytes)  # may run at any moment in any thread: no lock


class Ledger:
    """The parcels of a session that are kept, and what they take.

    Args:
        most: bytes; calls that would go beyond are not kept.
    """

    def __init__(self, most: int) -> None:
        self.gone: deque[int] = deque()
        self._most = most
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        """What is kept. The caller holds `session.order`."""
        while self.gone:
            self._nbytes -= self.gone.popleft()
        return self._nbytes

    def keep(
        self, parcel: Parcel, states: Sequence[KeyState], nbytes: int, known: Mapping[str, KeyState]
    ) -> None:
        """Keep a parcel for as long as a key that it holds is not final. The caller holds `session.order`.

        Args:
            states: of the keys that the call holds and nobody here held before.
            nbytes: of its payloads.
            known: states of all keys that the session holds.
        """
        nbytes += TASK_BYTES * len(parcel.tasks)
        if self.nbytes + nbytes > self._most:
            return
        self._nbytes += nbytes
        parcel._ledger, parcel._nbytes = self, nbytes
        above = {}
        for task in parcel.tasks:
            for dep in task.deps:
                state = known.get(dep)
                if state is not None and state.parcel is not None:
                    above[state.parcel.number] = state.parcel
        parcel.above = tuple(above.values())
        for state in states:
            state.parcel = parcel


def cuts(tasks: Sequence[NewTask]) -> Iterator[tuple[int, int]]:
    """Yield begin and end of the chunks in which tasks are sent."""
    start, size = 0, 0
    for i, task in enumerate(tasks):
        size += len(task.payload)
        if i - start >= CHUNK_TASKS or (size > CHUNK_BYTES and i > start):
            yield start, i
            start, size = i, len(task.payload)
    yield start, len(tasks)


def lineage(parcels: Iterable[Parcel]) -> list[Parcel]:
    """Return parcels and all that they depend on, in the order in which they were made."""
    found: dict[int, Parcel] = {}
    stack = list(parcels)
    while stack:
        parcel = stack.pop()
        if parcel.number not in found:
            found[parcel.number] = parcel
            stack += parcel.above
    return [found[number] for number in sorted(found)]
