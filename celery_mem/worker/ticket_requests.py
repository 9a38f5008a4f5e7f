"""Tickets in the worker's main process: when the broker hears that one is done."""

from __future__ import annotations

import logging
import time
from typing import Any

from celery.worker import state
from celery.worker.request import Request
from kombu.asynchronous import get_event_loop
from redis.exceptions import ResponseError

log = logging.getLogger("celery_mem.worker")

ACK_RETRY_S = 1.0
ACK_BY_S = 300.0
"""A ticket that is here for longer is acknowledged, done or not, as no broker waits for ever: RabbitMQ closes
the channel of its worker after 30 minutes, which ends it; Redis gives it to another worker after an hour."""


class TicketRequest(Request):  # type: ignore[misc]
    """A ticket in the worker's main process, which would end if its message could not be acknowledged."""

    acknowledged: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.came = time.monotonic()

    def acknowledge(self) -> None:
        """Tell the broker that the ticket is done; again and again while a full Redis refuses."""
        hub: Any = get_event_loop()
        if hub is None:
            super().acknowledge()
        elif not self.acknowledged:
            self.acknowledged = True
            hub.call_soon(self._acknowledge, hub)

    def _acknowledge(self, hub: Any) -> None:
        try:
            self.message.ack_log_error(log, self.connection_errors)
        except ResponseError as error:
            log.warning("the broker refuses to hear that a ticket is done: %s", error)
            hub.call_later(ACK_RETRY_S, self._acknowledge, hub)


def acknowledge_old_tickets() -> None:
    """Acknowledge tickets that came long ago, whether they run or wait for a slot.

    Nothing is lost by it: a ticket names no task, and what its slot runs is guarded by a lease of its own.
    """
    by = time.monotonic() - ACK_BY_S
    for request in tuple(state.reserved_requests):
        if isinstance(request, TicketRequest) and request.came < by:
            request.acknowledge()
