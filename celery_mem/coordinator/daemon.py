"""The coordinator's loop: lead, or stand by; while leading, run the duties that are due."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from celery_mem.config import Settings
from celery_mem.coordinator.clients import ClientLeases
from celery_mem.coordinator.copies import Copies
from celery_mem.coordinator.durability import Durability
from celery_mem.coordinator.duty import Duty
from celery_mem.coordinator.failures import Failures
from celery_mem.coordinator.freeing import Freeing
from celery_mem.coordinator.jobs import Jobs
from celery_mem.coordinator.nodes import NodeLeases, NodeQueues
from celery_mem.coordinator.outside import CelerySide, Outside
from celery_mem.coordinator.surplus import Surplus
from celery_mem.coordinator.tickets import TicketCalls
from celery_mem.coordinator.unrunnable import Unrunnable
from celery_mem.errors import CeleryMemError, FencedError, NamespaceResetError, RedisUnavailableError
from celery_mem.memory.seal import warn_if_unsigned
from celery_mem.state.eviction import Eviction
from celery_mem.state.store import Store

if TYPE_CHECKING:
    from celery import Celery

log = logging.getLogger("celery_mem.coordinator")

DUTIES: tuple[type[Duty], ...] = (
    Freeing,
    ClientLeases,
    NodeLeases,
    TicketCalls,
    Copies,
    Jobs,
    Durability,
    Failures,
    Surplus,
    Unrunnable,
    NodeQueues,
)
RETRY_S = 1.0
"""How long one call waits for a Redis that is away; then the loop looks whether it is to stop."""


class Coordinator:
    """One coordinator; any number may run, one leads.

    Args:
        store: the namespace.
        outside: what it does through Celery.

    Attributes:
        totals: what each duty did so far, by its name: nodes given up, tickets sent, and so on.
    """

    def __init__(self, store: Store, outside: Outside) -> None:
        self.store = store
        store.adopts = False  # leases that were renewed in the writes that are missing must not count as over
        self.name = f"{os.uname().nodename}-{os.getpid()}-{secrets.token_hex(3)}"
        self.duties = [duty(store, outside) for duty in DUTIES]
        self.totals = Counter({duty.name: 0 for duty in self.duties})
        self._due = dict.fromkeys((d.name for d in self.duties), 0.0)
        self._lead_due = 0.0
        self._term = ""
        self._in_touch_since_s: float | None = None

    @property
    def is_leading(self) -> bool:
        """Whether it led when it last asked."""
        return bool(self._term)

    def run_once(self, now_s: float) -> dict[str, int]:
        """Stay leader or try to become it, and run the duties that are due; returns what each did."""
        if now_s >= self._lead_due:
            self._lead(now_s)
        report: dict[str, int] = {}
        for duty in self.duties:
            if not self._term:
                break
            if now_s >= self._due[duty.name] and self._is_patient(duty, now_s):
                try:
                    report[duty.name] = duty.run_once(self._term)
                    self.totals[duty.name] += report[duty.name]
                except FencedError as error:
                    log.warning("fenced: %s", error)
                    self._term = ""
                except (RedisUnavailableError, NamespaceResetError):
                    raise
                except Exception:  # the other duties are not to suffer for it
                    log.exception("duty %s failed", duty.name)
                self._due[duty.name] = now_s + duty.every_s
        return report

    def _lead(self, now_s: float) -> None:
        leads, term, _ = self.store.lead(self.name)
        if leads and term != self._term:
            log.info("%s leads, term %s", self.name, term)
        elif self._term and not leads:
            log.warning("%s does not lead any more", self.name)
        self._term = term if leads else ""
        self._lead_due = now_s + self.store.settings.leader_lease / 4
        if self._in_touch_since_s is None:
            self._in_touch_since_s = now_s

    def _is_patient(self, duty: Duty, now_s: float) -> bool:
        since = now_s if self._in_touch_since_s is None else self._in_touch_since_s
        return now_s - since >= duty.patience_s(self.store.settings)

    def lose_touch(self) -> None:
        """Redis did not answer: who leads is open, and so is whether anybody could renew a lease."""
        self._term = ""
        self._lead_due = 0.0
        self._in_touch_since_s = None

    def rejoin(self) -> None:
        """Join the namespace that is there now."""
        self.store.rejoin()

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set, then resign."""
        pause = min(d.every_s for d in self.duties)
        self.store.link.retry_timeout = RETRY_S
        while not stop.is_set():
            try:
                self.run_once(time.monotonic())
            except Exception as error:  # one that ends here would leave everybody without a coordinator
                self.lose_touch()
                self._heal(error)
                stop.wait(RETRY_S)
            stop.wait(pause)
        try:
            self.store.lead(self.name, resign=True)
        except CeleryMemError as error:
            log.warning("%s could not resign, its lease will: %s", self.name, error)

    def _heal(self, error: Exception) -> None:
        if not isinstance(error, CeleryMemError):
            log.error("a run failed", exc_info=error)
        elif not isinstance(error, NamespaceResetError):
            log.warning("%s", error)
        else:
            log.warning("the namespace was reset; joining the new one")
            try:
                self.rejoin()
            except CeleryMemError as again:
                log.warning("%s", again)


def run(
    settings: Settings, app: Celery | None = None, *, watch: Callable[[Coordinator], None] | None = None
) -> None:
    """Run a coordinator in this process until SIGTERM or SIGINT.

    Args:
        app: the Celery app whose workers take the tickets; None makes one for the broker at `settings.url`.
        watch: is given the coordinator before it begins.
    """
    # A connection that died unseen must not stop everything for long.
    patience_s = max(RETRY_S, settings.leader_lease)
    settings = settings.replace(reply_timeout=min(settings.reply_timeout, patience_s))
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    warn_if_unsigned(settings)
    store = Store.connect(settings)
    Eviction(store.link).warn()
    coordinator = Coordinator(store, CelerySide(settings, store, app))
    if watch is not None:
        watch(coordinator)
    coordinator.run(stop)
