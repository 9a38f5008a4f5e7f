"""`install(app)`: makes the workers of a Celery app run graph tasks beside its own."""

from __future__ import annotations

import functools
import logging
from typing import Any

import click
from celery import Celery
from celery.worker.request import Request
from kombu.asynchronous import get_event_loop
from redis.exceptions import ResponseError

from celery_mem.config import Settings
from celery_mem.graph.tickets import TASK_NAME
from celery_mem.worker.node import NodeStep
from celery_mem.worker.tickets import run_ticket

log = logging.getLogger("celery_mem.worker")

ACK_RETRY_S = 1.0


class TicketRequest(Request):  # type: ignore[misc]
    """A ticket in the worker's main process, which would end if its message could not be acknowledged."""

    acknowledged: bool

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


def install(app: Celery, **settings: Any) -> Celery:
    """Add celery-mem to a Celery app.

    The settings are read when a worker starts, which ends with an error text if one is unknown or no Redis
    address is found.

    Args:
        app: the app; its own tasks, queues and result backend stay as they are.
        settings: `mem_*` settings without the prefix, which go before those of the app's configuration.
    Returns:
        the app.
    """
    if hasattr(app, "mem_settings"):
        return app
    app.mem_settings = functools.cache(lambda: Settings.load(app, **settings))

    # acks_late: a ticket that runs counts against the worker's prefetch, so no worker hoards tickets.
    @app.task(
        name=TASK_NAME,
        bind=True,
        acks_late=True,
        ignore_result=True,
        track_started=False,
        Request=f"{TicketRequest.__module__}:{TicketRequest.__name__}",
    )
    def ticket(self: Any, ticket_id: str) -> int:
        return run_ticket(self.app, self.app.mem_settings(), self.request.hostname, ticket_id)

    app.steps["worker"].add(NodeStep)
    app.user_options["worker"].add(
        click.Option(
            ["--mem-resources"],
            default="",
            metavar="NAME=AMOUNT,...",
            help="What tasks may ask for with resources=, and how much this node has of it, e.g. GPU=2.",
        )
    )
    return app
