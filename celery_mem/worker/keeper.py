"""Keeps a node within its memory: spills what nobody read for long, and else has the slots pause."""

from __future__ import annotations

import contextlib
import logging
import os

from celery_mem.config import Settings
from celery_mem.memory.files import NodeFolder, NoSpace
from celery_mem.memory.limits import child_processes, private_memory

log = logging.getLogger("celery_mem.agent")

PAUSED = "paused"
"""Name of the file in a node's folder that tells its slots to take nothing new. A file and no message: a slot
that begins later must know too."""
HYSTERESIS = 0.95
"""A node that paused goes on when it is so far below the limit, or the slots would flutter."""


class MemoryKeeper:
    """Watches one node's memory.

    Args:
        folder: the node's results.
        limit: bytes that the node may use.
        parent: pid of the worker's main process.
    """

    def __init__(self, folder: NodeFolder, limit: int, parent: int, settings: Settings) -> None:
        self.folder = folder
        self.limit = limit
        self.parent = parent
        self.settings = settings
        self.is_paused = os.path.exists(f"{folder.path}/{PAUSED}")
        self._is_hopeless = False  # nothing can be spilled; said once

    def look(self) -> dict[str, int]:
        """Count, act on what was counted, and return the figures in bytes."""
        processes = private_memory([self.parent, *child_processes(self.parent)])
        figures = self._count(processes)
        over = figures["total"] - int(self.settings.memory_target * self.limit)
        if over > 0 and self.folder.is_memory:
            self._make_room(over)
            figures = self._count(processes)
        self._pause_or_go_on(figures["total"])
        return figures

    def _count(self, processes: int) -> dict[str, int]:
        usage = self.folder.usage()
        in_files = usage.nbytes + usage.pool_nbytes if self.folder.is_memory else 0
        return {
            "files": usage.nbytes,
            "pool": usage.pool_nbytes,
            "spilled": usage.spilled_nbytes,
            "processes": processes,
            "total": processes + in_files,
            "limit": self.limit,
        }

    def _make_room(self, nbytes: int) -> None:
        nbytes -= self.folder.trim_pool(max(0, self.folder.usage().pool_nbytes - nbytes))
        if nbytes <= 0:
            return
        freed = n = 0
        for token, _ in self.folder.coldest():
            if freed >= nbytes:
                break
            try:
                size = self.folder.spill(token)
            except NoSpace as error:
                if not self._is_hopeless:
                    self._is_hopeless = True
                    log.warning("memory is short and nothing can be spilled: %s", error)
                break
            freed += size
            n += size > 0
        if n:
            self._is_hopeless = False
            log.info("memory is short: spilled %d results, %.0f MB", n, freed / 1e6)

    def _pause_or_go_on(self, total: int) -> None:
        pause_at = self.settings.memory_pause * self.limit
        if not self.is_paused and total > pause_at:
            log.warning(
                "the node uses %.0f MB of its %.0f MB: it takes no new task until some are free",
                *(total / 1e6, self.limit / 1e6),
            )
            self._set_paused(True)
        elif self.is_paused and total < HYSTERESIS * pause_at:
            log.info("the node uses %.0f MB of its %.0f MB: it goes on", total / 1e6, self.limit / 1e6)
            self._set_paused(False)

    def _set_paused(self, paused: bool) -> None:
        self.is_paused = paused
        mark = os.path.join(self.folder.path, PAUSED)
        with contextlib.suppress(FileNotFoundError):
            if paused:
                os.close(os.open(mark, os.O_WRONLY | os.O_CREAT, 0o600))
            else:
                os.unlink(mark)
