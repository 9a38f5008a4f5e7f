"""Sending tickets: Celery messages that lend one slot to the graph for a slice of time.

A ticket names no task. One that is lost is sent again when its lease ends, one that comes twice finds no
work.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from celery_mem.config import Settings
from celery_mem.sentinels import is_sentinel, parse_sentinel
from celery_mem.state.store import Tickets

if TYPE_CHECKING:
    from celery import Celery

log = logging.getLogger("celery_mem.tickets")

TASK_NAME = "celery_mem.ticket"
TRIES = 2
"""A connection that breaks in the middle is replaced; a broker that is away is left to the coordinator."""


def make_app(settings: Settings) -> Celery:
    """Return a Celery app that can send tickets where broker and state are the same Redis."""
    from celery import Celery

    app = Celery("celery_mem", broker=broker_url(settings.url), set_as_current=False)
    app.conf.update(
        task_ignore_result=True, broker_pool_limit=1, broker_transport_options=broker_options(settings.url)
    )
    return app


def broker_url(url: str) -> str:
    """Return `url` as kombu spells it."""
    if is_sentinel(url):
        return parse_sentinel(url).for_kombu
    return url.replace("unix://", "redis+socket://", 1)


def broker_options(url: str) -> dict[str, Any]:
    """Return the `broker_transport_options` that `url` needs."""
    if not is_sentinel(url):
        return {}
    address = parse_sentinel(url)
    options: dict[str, Any] = {"master_name": address.service}
    if address.sentinel_password:
        options["sentinel_kwargs"] = {"password": address.sentinel_password}
    return options


def send_tickets(app: Celery, tickets: Tickets) -> bool:
    """Send tickets; returns whether the broker took them.

    A failure is logged and left to their lease: the coordinator sends them again.
    """
    from kombu.entity import Queue

    for queue, ticket in tickets:
        # Who consumes a queue has declared it. To do so here too would need the same properties, and a node's
        # own queue goes with the node.
        where = {"queue": Queue(queue), "declare": []} if queue else {"queue": app.conf.task_default_queue}
        for left in reversed(range(TRIES)):
            try:
                # Not by Celery's own retry, which trips over the channel that broke (kombu 5.7).
                app.send_task(
                    TASK_NAME,
                    args=(ticket,),
                    **where,
                    ignore_result=True,
                    retry=False,
                    argsrepr=f"({ticket})",
                )
                break
            except Exception as error:  # whatever the broker's library raises
                if not left:
                    log.warning("tickets from %s on cannot be sent, the coordinator will: %s", ticket, error)
                    return False
    return True
