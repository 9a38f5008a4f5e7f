"""Nodes: a silent one is given up, what it was running is ready again; of one that is gone nothing stays."""

from __future__ import annotations

import logging
from typing import Any

from celery_mem.config import Settings
from celery_mem.coordinator.duty import CALLS_AT_ONCE, Duty
from celery_mem.graph.killed import give_up_slot

log = logging.getLogger("celery_mem.coordinator")

DEATH = "its node was silent for longer than its lease"


class NodeLeases(Duty):
    """Gives up nodes whose lease is over, with all that they held."""

    name = "nodes"
    every_s = 0.5

    @classmethod
    def patience_s(cls, settings: Settings) -> float:
        return settings.node_lease / 2

    def run_once(self, fence: str) -> int:
        overdue = self.store.overdue("nodes")
        for node in overdue:
            log.warning("node %s was silent for longer than its lease and is given up", node)
            for slot in self.store.leave_node(node, fence=fence).slots:
                given_up = give_up_slot(self.store, slot, node, death=DEATH)
                self.send_tickets(given_up.tickets)
                log.warning("its slot %s had %d tasks", slot, len(given_up.keys))
                if given_up.killed:
                    log.error("tasks that ended too many processes: %s", ", ".join(given_up.killed))
            for _ in range(CALLS_AT_ONCE):  # what is left of it is for the next run
                leave = self.store.leave_node(node, fence=fence)
                self.send_tickets(leave.tickets)
                if not leave.left:
                    break
        return len(overdue)


class NodeQueues(Duty):
    """Deletes the Celery queues of nodes that are gone, however they went.

    It knows of the nodes that it has seen. Of one that came and went while no coordinator ran, an empty queue
    stays, which costs nothing.
    """

    name = "queues"
    every_s = 1.0

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._seen: dict[str, str] = {}

    def run_once(self, fence: str) -> int:
        keys = self.store.keys
        names = [name.decode() for name in self.store.link.call("ZRANGE", keys.fixed("nodes"), 0, -1)]
        now = {name: keys.own_queue(name) for name in names}
        gone = self._seen.keys() - now.keys()
        for node in gone:
            self.outside.delete_queue(self._seen[node])
        self._seen = now
        return len(gone)
