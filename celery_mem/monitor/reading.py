"""What the Memory page and the metrics show, read at most once per period however many look."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from celery_mem.graph.overview import overview
from celery_mem.state.inspect import iter_results
from celery_mem.state.store import Store

PERIOD_S = 2.0
"""How old an answer may be: a reading is a scan over all keys, and pages poll."""
SHOWN = 100
"""Rows of a table; of more, those with most bytes."""


class Reading:
    """The latest picture of a namespace; several threads may ask."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._lock = threading.Lock()  # who comes while another reads takes what that one finds
        self._picture: dict[str, Any] | None = None
        self._read_at = 0.0

    def picture(self) -> dict[str, Any]:
        """Return what `memory_picture` does, at most `PERIOD_S` old."""
        with self._lock:
            if self._picture is None or self._clock() - self._read_at >= PERIOD_S:
                self._picture = memory_picture(self._store)
                self._read_at = self._clock()
            return self._picture


def memory_picture(store: Store) -> dict[str, Any]:
    """Measure a namespace.

    Returns:
        what `celery_mem.graph.overview.overview` returns, and
        - prefixes, each: prefix (of keys, such as "inc"), tasks (number), nbytes (of results)
        - holders, each: holder (client id, or "@key" for a result that contains futures), tasks, nbytes that
          it pins, and lease (s left; None for a result, or for a client that is gone)
    """
    from dask.utils import key_split

    status = overview(store)
    tasks: dict[str, Counter[str]] = {"prefix": Counter(), "holder": Counter()}
    nbytes: dict[str, Counter[str]] = {"prefix": Counter(), "holder": Counter()}
    for key, holders, size in iter_results(store):
        for kind, names in (("prefix", [key_split(key)]), ("holder", holders)):
            tasks[kind].update(names)
            nbytes[kind].update(dict.fromkeys(names, size))
    rows = {
        kind: [
            {kind: name, "tasks": tasks[kind][name], "nbytes": size}
            for name, size in nbytes[kind].most_common(SHOWN)
        ]
        for kind in tasks
    }
    for row in rows["holder"]:
        row["lease"] = status["clients"].get(row["holder"], {}).get("lease")
    return {**status, "prefixes": rows["prefix"], "holders": rows["holder"]}
