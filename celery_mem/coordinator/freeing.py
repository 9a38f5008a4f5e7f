"""Freeing: goes on where a release or an error reached more records than one call may visit."""

from __future__ import annotations

from celery_mem.coordinator.duty import Duty


class Freeing(Duty):
    """Settles what is left unsettled."""

    name = "freeing"
    every_s = 0.05

    def run_once(self, fence: str) -> int:
        calls = 0
        left = 1
        while left:
            left, tickets = self.store.sweep(fence)
            self.send_tickets(tickets)
            calls += 1
        return calls - 1
