"""Client leases: what a silent client holds is released, as if it had deleted its futures."""

from __future__ import annotations

import logging

from celery_mem.config import Settings
from celery_mem.coordinator.duty import CALLS_AT_ONCE, Duty

log = logging.getLogger("celery_mem.coordinator")


class ClientLeases(Duty):
    """Releases what clients hold whose lease is over."""

    name = "clients"
    every_s = 0.5

    @classmethod
    def patience_s(cls, settings: Settings) -> float:
        return settings.client_lease / 2

    def run_once(self, fence: str) -> int:
        calls = 0
        for client in self.store.overdue("clients"):
            log.warning("client %s was silent for longer than its lease: its futures are released", client)
            left = 1
            while left:
                if calls == CALLS_AT_ONCE:
                    return calls
                left, tickets = self.store.expire_client(client, fence=fence)
                self.send_tickets(tickets)
                calls += 1
        return calls
