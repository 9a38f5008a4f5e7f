"""Pool children that are outdated, or beyond their share of memory, are replaced between two Celery tasks."""

from __future__ import annotations

import logging
import os
from typing import Any

from celery import signals

from celery_mem.memory.limits import private_memory
from celery_mem.worker.tickets import is_outdated, live_bytes

log = logging.getLogger("celery_mem.worker")

_NO_LIMIT = 1 << 62
"""KiB that no limit permits."""


def limit_memory(worker: Any, nbytes: int) -> None:
    """Have children of a prefork pool replaced when they have more than `nbytes` for themselves.

    Celery's own mechanism (`worker_max_memory_per_child`) does it; a limit that the user gave it stays. But
    it compares the most that a child ever had, files that it mapped included: one that once read a large
    result would be replaced. So it is told what the child has for itself now. A child that is outdated says
    that it has more than any limit.
    """
    is_ours = not worker.max_memory_per_child
    if is_ours:
        worker.max_memory_per_child = max(1, nbytes >> 10)

    def measure_well(**_: Any) -> None:
        from billiard import pool

        measure = pool.mem_rss
        pool.mem_rss = lambda: _NO_LIMIT if is_outdated() else _own_kib(nbytes) if is_ours else measure()

    signals.worker_process_init.connect(measure_well, weak=False)


def _own_kib(limit: int) -> int:
    nbytes = private_memory([os.getpid()]) - live_bytes()
    if nbytes > limit:
        log.warning(
            "this process has %.0f MB for itself, more than its share of %.0f MB: another takes its place",
            *(nbytes / 1e6, limit / 1e6),
        )
    return max(1, nbytes >> 10)
