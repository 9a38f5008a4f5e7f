"""Node leases: a silent node is given up; what it was running is ready again."""

from __future__ import annotations

import logging

from celery_mem.config import Settings
from celery_mem.coordinator.duty import Duty
from celery_mem.graph.killed import give_up_slot

log = logging.getLogger("celery_mem.coordinator")


class NodeLeases(Duty):
    """Gives up nodes whose lease is over."""

    name = "nodes"
    every_s = 0.5

    @classmethod
    def patience_s(cls, settings: Settings) -> float:
        return settings.node_lease / 2

    def run_once(self, fence: str) -> int:
        overdue = self.store.overdue("nodes")
        for node in overdue:
            log.warning("node %s was silent for longer than its lease and is given up", node)
            for slot in self.store.leave_node(node, fence=fence):
                given_up = give_up_slot(self.store, slot, node)
                self.send_tickets(given_up.tickets)
                log.warning("its slot %s had %d tasks", slot, len(given_up.keys))
                if given_up.killed:
                    log.error("tasks that ended too many processes: %s", ", ".join(given_up.killed))
            self.store.leave_node(node, fence=fence)
        return len(overdue)
