"""Node leases: a silent node is given up; what it was running is ready again."""

from __future__ import annotations

import logging

from celery_mem.coordinator.duty import Duty
from celery_mem.graph.killed import killed_error

log = logging.getLogger("celery_mem.coordinator")


class NodeLeases(Duty):
    """Gives up nodes whose lease is over."""

    name = "nodes"
    every_s = 0.5

    def run_once(self, fence: str) -> int:
        overdue = self.store.overdue("nodes")
        for node in overdue:
            for slot in self.store.leave_node(node, fence=fence):
                keys, _, tickets = self.store.abandon_slot(slot, node, killed_error(slot))
                self.send_tickets(tickets)
                log.warning("slot %s of the silent node %s is given up with %d tasks", slot, node, len(keys))
            self.store.leave_node(node, fence=fence)
            log.warning("node %s was silent for longer than its lease and is given up", node)
        return len(overdue)
