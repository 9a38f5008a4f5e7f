"""Makes a node's files and the records in Redis agree, where a death or a lost lease came in between."""

from __future__ import annotations

import logging
import time

from celery_mem.memory.audit_files import copies_on, is_here, unknown_files
from celery_mem.memory.files import NodeFolder
from celery_mem.state.store import Location, Store

log = logging.getLogger("celery_mem.agent")


class Replicas:
    """The copies that are on one node, by its folder and by Redis.

    Args:
        node: its name.
    """

    def __init__(self, node: str, folder: NodeFolder, store: Store) -> None:
        self.node = node
        self.folder = folder
        self.store = store

    def report_lost(self) -> int:
        """Tell Redis of copies that are neither in a file nor in a process that lives; returns how many.

        What had no other copy is made again.
        """
        n = 0
        for page in copies_on(self.store, self.node):
            lost = [(place.key, place.token) for place in page if not is_here(self.folder, place, self.node)]
            if lost:
                # The tickets that this asks for are left to the coordinator: an agent can send none.
                self.store.lose(self.node, lost)
                n += len(lost)
        if n:
            log.warning("%d results of node %s were lost with a process, or with their files", n, self.node)
        return n

    def remove_unknown(self) -> int:
        """Drop files that no record names any more; returns how many."""
        started = time.time()
        known = {place.token for page in copies_on(self.store, self.node) for place in page}
        unknown = unknown_files(self.folder, known, started)
        if unknown:
            log.info("dropped %d results of node %s that nobody knows any more", len(unknown), self.node)
            self.folder.drop(unknown)
        return len(unknown)

    def unique(self) -> list[Location]:
        """Return the results that are here and nowhere else, the smallest first."""
        pages = copies_on(self.store, self.node)
        found = [place for page in pages for place in page if place.places == (self.node,)]
        return sorted(found, key=lambda place: place.nbytes)
