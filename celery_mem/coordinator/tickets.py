"""Tickets: ready work that no slot and no ticket on its way will take gets new ones."""

from __future__ import annotations

from celery_mem.coordinator.duty import Duty


class TicketCalls(Duty):
    """Makes up for lost tickets, and calls nodes that came while work was waiting."""

    name = "tickets"
    every_s = 0.5

    def run_once(self, fence: str) -> int:
        tickets = self.store.call_tickets(fence)
        self.send_tickets(tickets)
        return len(tickets)
