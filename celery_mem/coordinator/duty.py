"""What a duty is: one thing done over and over, by the leader only."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod

from celery_mem.config import Settings
from celery_mem.coordinator.outside import Outside
from celery_mem.state.store import Store, Tickets

CALLS_AT_ONCE = 20
"""Script calls that one run of a duty makes at most, some 10 ms each: between runs leadership is renewed."""


class Duty(ABC):
    """One duty of the coordinator.

    Attributes:
        name: what logs and reports call it.
        every_s: seconds between two runs.
    """

    name: str
    every_s: float

    def __init__(self, store: Store, outside: Outside) -> None:
        self.store = store
        self.outside = outside

    @classmethod
    def patience_s(cls, settings: Settings) -> float:
        """Return for how long the coordinator must have reached Redis without a break before this duty runs.

        Who judges leases must not judge by a time in which nobody could renew them.
        """
        return 0.0

    @abstractmethod
    def run_once(self, fence: str) -> int:
        """Do what is due; returns how many things were done.

        Args:
            fence: the leader's term; every script that writes is told it.
        Raises:
            FencedError: another coordinator leads.
        """

    def send_tickets(self, tickets: Tickets) -> None:
        """Send tickets through Celery."""
        self.outside.send_tickets(tickets)

    def now_s(self) -> float:
        """Return the time: seconds since the epoch, or what the clock of a test says."""
        return time.time() if self.store.now_ms is None else self.store.now_ms / 1000
