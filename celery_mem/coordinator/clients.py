"""Client leases: what a silent client holds is released, as if it had deleted its futures."""

from __future__ import annotations

import logging

from celery_mem.coordinator.duty import Duty

log = logging.getLogger("celery_mem.coordinator")


class ClientLeases(Duty):
    """Releases what clients hold whose lease is over."""

    name = "clients"
    every_s = 0.5

    def run_once(self, fence: str) -> int:
        overdue = self.store.overdue("clients")
        for client in overdue:
            left = 1
            while left:
                left, tickets = self.store.expire_client(client, fence=fence)
                self.send_tickets(tickets)
            log.warning("client %s was silent for longer than its lease: its futures are released", client)
        return len(overdue)
