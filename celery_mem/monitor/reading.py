"""What the Memory page and the metrics show, read at most once per period however many look."""

from __future__ import annotations

import heapq
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from celery_mem.graph.overview import overview
from celery_mem.state.inspect import TaskRow, neighbourhood
from celery_mem.state.store import Store

PERIOD_S = 2.0
"""How old an answer may be: a reading is a scan over all keys, and pages poll."""
SHOWN = 100
"""Rows of a table; of more, those with most bytes."""
FEW = 10
"""Rows of the table of single tasks."""
DRAWN = 60
"""Tasks of a graph that are drawn."""
AT_WORK = ("ready", "processing", "erred")
"""States that are counted by queue."""


class Reading:
    """The latest picture of a namespace; several threads may ask."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._lock = threading.Lock()  # who comes while another reads takes what that one finds
        self._picture: dict[str, Any] | None = None
        self._read_at = 0.0
        self._seen_since: dict[str, float] = {}

    def picture(self) -> dict[str, Any]:
        """Return what `memory_picture` does, at most `PERIOD_S` old."""
        with self._lock:
            if self._picture is None or self._clock() - self._read_at >= PERIOD_S:
                self._picture = memory_picture(self._store)
                self._read_at = self._clock()
                self._note_ages(self._picture.get("holders", []))
            return self._picture

    def graph(self, key: str) -> dict[str, Any] | None:
        """Return what `neighbourhood` does of at most `DRAWN` tasks."""
        return neighbourhood(self._store, key, DRAWN)

    def _note_ages(self, holders: list[dict[str, Any]]) -> None:
        """Add how long each has been seen; nobody keeps books of when a client began to hold."""
        since = self._seen_since
        self._seen_since = {row["holder"]: since.get(row["holder"], self._read_at) for row in holders}
        for row in holders:
            row["seen"] = self._read_at - self._seen_since[row["holder"]]


def memory_picture(store: Store) -> dict[str, Any]:
    """Measure a namespace.

    Returns:
        what `celery_mem.graph.overview.overview` returns, and
        - prefixes, each: prefix (of keys, such as "inc"), tasks (number), nbytes (of results)
        - holders, each: holder (client id, or "@key" for a result that contains futures), tasks, nbytes that
          it pins, and lease (s left; None for a result, or for a client that is gone)
        - at_work, each: queue (a node, a constraint, or "any node"), and how many tasks are ready, processing
          and erred
        - largest, each: key, state and nbytes, of the results that take most
    """
    from dask.utils import key_split

    tasks: dict[str, Counter[str]] = {"prefix": Counter(), "holder": Counter()}
    nbytes: dict[str, Counter[str]] = {"prefix": Counter(), "holder": Counter()}
    queues: dict[str, Counter[str]] = {}
    largest: list[tuple[int, str, str]] = []

    def see(row: TaskRow) -> None:
        for kind, names in (("prefix", [key_split(row.key)]), ("holder", row.holders)):
            tasks[kind].update(names)
            nbytes[kind].update(dict.fromkeys(names, row.nbytes))
        if row.state in AT_WORK:
            queues.setdefault(row.queue or "any node", Counter())[row.state] += 1
        if row.holders or row.state in AT_WORK:
            item = (row.nbytes, row.key, row.state)
            (heapq.heappush if len(largest) < FEW else heapq.heappushpop)(largest, item)

    status = overview(store, see)
    rows = {
        kind: [
            {kind: name, "tasks": tasks[kind][name], "nbytes": size}
            for name, size in nbytes[kind].most_common(SHOWN)
        ]
        for kind in tasks
    }
    for row in rows["holder"]:
        row["lease"] = status["clients"].get(row["holder"], {}).get("lease")
    return {
        **status,
        "prefixes": rows["prefix"],
        "holders": rows["holder"],
        "at_work": [
            {"queue": name, **{state: counts[state] for state in AT_WORK}}
            for name, counts in sorted(queues.items())[:SHOWN]
        ],
        "largest": [
            {"key": key, "state": state, "nbytes": size} for size, key, state in sorted(largest, reverse=True)
        ],
    }
