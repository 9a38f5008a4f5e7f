"""What the coordinator does through Celery: it sends tickets, stops workers, and removes their queues."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Protocol

from celery_mem.config import Settings
from celery_mem.state.store import Tickets

if TYPE_CHECKING:
    from celery import Celery

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
        app: the Celery app whose workers take the tickets; None makes one for the broker at `settings.url`.
    """

    def __init__(self, settings: Settings, app: Celery | None = None) -> None:
        self._settings = settings
        self._app = app

    @property
    def app(self) -> Celery:
        """The app, made when it is first needed."""
        if self._app is None:
            from celery_mem.graph.tickets import make_app

            self._app = make_app(self._settings)
        return self._app

    def send_tickets(self, tickets: Tickets) -> None:
        """Send tickets."""
        if tickets:
            from celery_mem.graph.tickets import send_tickets

            send_tickets(self.app, tickets)

    def stop_worker(self, node: str) -> None:
        """Ask a worker to end, by Celery's remote control; a failure is logged, and the caller asks again."""
        try:
            # With a connection of its own: Celery would take two from the pool, which has one.
            with self.app.connection_for_write() as connection:
                self.app.control.shutdown(destination=[node], connection=connection)
        except Exception as error:  # whatever the broker's library raises
            log.warning("worker %s cannot be told to stop yet: %s", node, error)

    def delete_queue(self, queue: str) -> None:
        """Delete a queue; a failure is logged: what is left is one empty queue."""
        try:
            from kombu import entity

            with self.app.connection_for_write() as connection:
                # As its worker declares it: what is bound where is known only to who has declared it.
                kombu: Any = entity
                exchange = kombu.Exchange(queue, durable=False)
                gone = kombu.Queue(queue, exchange, queue, durable=False)(connection)
                gone.declare()
                gone.purge()
                gone.delete()
                gone.exchange.delete()
        except Exception as error:  # whatever the broker's library raises
            log.info("the queue %s of a node that is gone cannot be deleted: %s", queue, error)
