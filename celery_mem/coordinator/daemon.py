"""The coordinator's loop: lead, or stand by; while leading, run the duties that are due."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from celery_mem.config import Settings
from celery_mem.coordinator.clients import ClientLeases
from celery_mem.coordinator.duty import Duty
from celery_mem.coordinator.freeing import Freeing
from celery_mem.coordinator.nodes import NodeLeases
from celery_mem.coordinator.tickets import TicketCalls
from celery_mem.errors import FencedError, NamespaceResetError, RedisUnavailableError, StoreFullError
from celery_mem.state.store import Store, Tickets

if TYPE_CHECKING:
    from celery import Celery

log = logging.getLogger("celery_mem.coordinator")

DUTIES: tuple[type[Duty], ...] = (Freeing, ClientLeases, NodeLeases, TicketCalls)


class Coordinator:
    """One coordinator; any number may run, one leads.

    Args:
        store: the namespace.
        send_tickets: sends tickets through Celery.
    """

    def __init__(self, store: Store, send_tickets: Callable[[Tickets], None]) -> None:
        self.store = store
        self.name = f"{os.uname().nodename}-{os.getpid()}-{secrets.token_hex(3)}"
        self.duties = [duty(store, send_tickets) for duty in DUTIES]
        self._due = dict.fromkeys((d.name for d in self.duties), 0.0)
        self._lead_due = 0.0
        self._term = ""

    @property
    def is_leading(self) -> bool:
        """Whether it led when it last asked."""
        return bool(self._term)

    def run_once(self, now_s: float) -> dict[str, int]:
        """Stay leader or try to become it, and run the duties that are due; returns what each did."""
        if now_s >= self._lead_due:
            leads, term, _ = self.store.lead(self.name)
            if leads and term != self._term:
                log.info("%s leads, term %s", self.name, term)
            elif self._term and not leads:
                log.warning("%s does not lead any more", self.name)
            self._term = term if leads else ""
            self._lead_due = now_s + self.store.settings.leader_lease / 4
        if not self._term:
            return {}
        report = {}
        for duty in self.duties:
            if now_s >= self._due[duty.name]:
                try:
                    report[duty.name] = duty.run_once(self._term)
                except FencedError as error:
                    log.warning("fenced: %s", error)
                    self._term = ""
                    break
                self._due[duty.name] = now_s + duty.every_s
        return report

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set, then resign."""
        pause = min(d.every_s for d in self.duties)
        while not stop.is_set():
            try:
                self.run_once(time.monotonic())
            except NamespaceResetError:
                log.warning("the namespace was reset; joining the new one")
                self.store.generation = Store.connect(self.store.settings).generation
                self._term = ""
            except (RedisUnavailableError, StoreFullError) as error:
                log.warning("%s", error)
            stop.wait(pause)
        self.store.lead(self.name, resign=True)


def run(settings: Settings, app: Celery | None = None) -> None:
    """Run a coordinator in this process until SIGTERM or SIGINT.

    Args:
        app: the Celery app whose workers take the tickets; None makes one for the broker at `settings.url`.
    """
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    celery_app = app

    def send(tickets: Tickets) -> None:
        nonlocal celery_app
        if not tickets.ids:
            return
        from celery_mem.graph.tickets import make_app, send_tickets

        celery_app = celery_app or make_app(settings)
        send_tickets(celery_app, tickets)

    Coordinator(Store.connect(settings), send).run(stop)
