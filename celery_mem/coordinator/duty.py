"""What a duty is: one thing done over and over, by the leader only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from celery_mem.state.store import Store, Tickets


class Duty(ABC):
    """One duty of the coordinator.

    Attributes:
        name: what logs and reports call it.
        every_s: seconds between two runs.
    """

    name: str
    every_s: float

    def __init__(self, store: Store, send_tickets: Callable[[Tickets], None]) -> None:
        self.store = store
        self.send_tickets = send_tickets

    @abstractmethod
    def run_once(self, fence: str) -> int:
        """Do what is due; returns how many things were done.

        Args:
            fence: the leader's term; every script that writes is told it.
        Raises:
            FencedError: another coordinator leads.
        """
