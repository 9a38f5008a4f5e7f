"""What a worker does with a ticket: it lends the slot of the thread that took it."""

from __future__ import annotations

import itertools
import os
import threading
from typing import TYPE_CHECKING, Any

from celery_mem.config import Settings
from celery_mem.graph.tickets import send_tickets

if TYPE_CHECKING:
    from celery import Celery

_local = threading.local()
_numbers = itertools.count(1)


def run_ticket(app: Celery, settings: Settings, node: str, ticket: str) -> int:
    """Run the slot of this thread for one ticket; returns how many tasks ran."""
    slot: Any = getattr(_local, "slot", None)
    if slot is None or _local.pid != os.getpid() or slot.node != node:
        from celery_mem.worker.slot import Slot

        name = f"{node}|{os.getpid()}.{next(_numbers)}"
        slot = Slot(name, node, settings, lambda tickets: send_tickets(app, tickets))
        _local.slot, _local.pid = slot, os.getpid()
    ran: int = slot.run_ticket(ticket)
    return ran
