"""Freeing: goes on where a release or an error reached more records than one call may visit."""

from __future__ import annotations

from celery_mem.coordinator.duty import CALLS_AT_ONCE, Duty


class Freeing(Duty):
    """Settles what is left unsettled."""

    name = "freeing"
    every_s = 0.05

    def run_once(self, fence: str) -> int:
        for calls in range(CALLS_AT_ONCE):
            left, tickets = self.store.sweep(fence)
            self.send_tickets(tickets)
            if not left:
                return calls
        return CALLS_AT_ONCE
