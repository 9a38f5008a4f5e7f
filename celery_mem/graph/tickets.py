"""Sending tickets: Celery messages that lend one slot to the graph for a slice of time.

A ticket names no task. One that is lost is sent again when its lease ends, one that comes twice finds no
work.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from celery_mem.config import Settings
from celery_mem.errors import CeleryMemError
from celery_mem.graph.broker import line_of
from celery_mem.sentinels import is_sentinel, parse_sentinel
from celery_mem.state.store import Store, Tickets

if TYPE_CHECKING:
    from celery import Celery

log = logging.getLogger("celery_mem.tickets")

TASK_NAME = "celery_mem.ticket"
REDIS = "redis"
TRIES = 2
"""A connection that breaks in the middle is replaced; a broker that is away is left to the coordinator."""


LOOK_S = 10.0
"""So often somebody without an app looks whether the workers have another broker still."""


class TicketOffice:
    """Sends tickets for a process that is no worker.

    Args:
        app: the Celery app whose workers take them; None makes one for the broker at `settings.url`, once
            it is known that the workers have no other.
    """

    def __init__(self, settings: Settings, app: Celery | None = None) -> None:
        self._settings = settings
        self._app = app
        self._look_due = 0.0
        self._lock = threading.Lock()

    @property
    def app(self) -> Celery:
        """The app, made when it is first needed."""
        if self._app is None:
            self._app = make_app(self._settings)
        return self._app

    def send(self, tickets: Tickets, store: Store) -> None:
        """Send tickets, from any thread; those that would arrive nowhere are dropped with a warning."""
        with self._lock:
            if self._knows_broker(store):
                send_tickets(self.app, tickets)

    def hang_up(self) -> None:
        """Close the connection to the broker; the next ticket opens one."""
        if self._app is not None:
            line_of(self._app).hang_up()

    def _knows_broker(self, store: Store) -> bool:
        if self._app is not None:
            return True
        if time.monotonic() < self._look_due:
            return False
        try:
            brokers = {str(info.get("broker") or REDIS) for info in store.node_infos().values()} - {REDIS}
        except CeleryMemError as error:
            log.warning("tickets cannot be sent, the coordinator will: %s", error)
            return False
        if not brokers:
            return True
        self._look_due = time.monotonic() + LOOK_S
        log.warning(
            "the broker of the workers is %s, so their Celery app is needed to call them: Client(app=app), "
            "celery -A <app> mem coordinator. A client without it leaves that to the coordinator, which "
            "takes up to mem_ticket_lease (%g s)",
            ", ".join(sorted(brokers)),
            self._settings.ticket_lease,
        )
        return False


def broker_of(app: Celery) -> str:
    """Return the kind of an app's broker: "redis", "amqp", "sqs" and so on."""
    return str(app.connection_for_write().transport.driver_type)


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
                with line_of(app).use() as connection:
                    app.send_task(
                        TASK_NAME,
                        args=(ticket,),
                        **where,
                        ignore_result=True,
                        connection=connection,
                        retry=False,
                        argsrepr=f"({ticket})",
                    )
                break
            except Exception as error:  # whatever the broker's library raises
                if not left:
                    log.warning("tickets from %s on cannot be sent, the coordinator will: %s", ticket, error)
                    return False
    return True
