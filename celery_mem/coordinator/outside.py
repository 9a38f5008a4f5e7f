"""What the coordinator does through Celery: it sends tickets, stops workers, and removes their queues."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol

from celery_mem.config import Settings
from celery_mem.state.store import Store, Tickets

if TYPE_CHECKING:
    from celery import Celery

    from celery_mem.graph.tickets import TicketOffice

log = logging.getLogger("celery_mem.coordinator")


class Outside(Protocol):
    """The world outside of Redis, as duties see it."""

    def send_tickets(self, tickets: Tickets) -> None:
        """Send tickets."""

    def stop_worker(self, node: str) -> None:
        """Ask a worker to end in good order: what it runs it runs to the end."""

    def delete_queue(self, queue: str) -> None:
        """Delete a queue that nobody will consume any more; one that is not there is no mistake."""


class CelerySide:
    """The outside of a real deployment.

    Args:
        store: to see which broker the workers have.
        app: the Celery app whose workers take the tickets; None makes one for the broker at `settings.url`.
    """

    def __init__(self, settings: Settings, store: Store, app: Celery | None = None) -> None:
        self._settings = settings
        self._store = store
        self._given = app
        self._office: TicketOffice | None = None

    @property
    def office(self) -> TicketOffice:
        """What sends tickets, made when it is first needed."""
        if self._office is None:
            from celery_mem.graph.tickets import TicketOffice

            self._office = TicketOffice(self._settings, self._given)
        return self._office

    def send_tickets(self, tickets: Tickets) -> None:
        """Send tickets."""
        if tickets:
            self.office.send(tickets, self._store)
            self.office.hang_up()  # it is seldom that others have not sent them

    def stop_worker(self, node: str) -> None:
        """Ask a worker to end, by Celery's remote control; a failure is logged, and the caller asks again."""
        try:
            # With a connection of its own: Celery would take two from the pool, which has one.
            with self.office.app.connection_for_write() as connection:
                self.office.app.control.shutdown(destination=[node], connection=connection)
        except Exception as error:  # whatever the broker's library raises
            log.warning("worker %s cannot be told to stop yet: %s", node, error)

    def delete_queue(self, queue: str) -> None:
        """Delete a queue; a failure is logged: what is left is one empty queue."""
        try:
            with self.office.app.connection_for_write() as connection:
                channel = connection.default_channel
                channel.queue_purge(queue)  # in Redis an empty queue is none
                channel.queue_delete(queue)
        except Exception as error:  # whatever the broker's library raises
            log.info("the queue %s of a node that is gone cannot be deleted: %s", queue, error)
