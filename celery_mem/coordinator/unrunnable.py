"""Unrunnable: tasks that no worker may run err after `mem_no_workers_timeout`; without one they wait."""

from __future__ import annotations

import logging

from celery_mem.coordinator.duty import CALLS_AT_ONCE, Duty
from celery_mem.errors import NoValidWorkerError
from celery_mem.graph.constraints import why_nobody_may_run
from celery_mem.graph.errors import encode_error
from celery_mem.memory.seal import Kind, seal_of

log = logging.getLogger("celery_mem.coordinator")


class Unrunnable(Duty):
    """Gives up tasks for which the right worker did not come in time."""

    name = "unrunnable"
    every_s = 0.5

    def run_once(self, fence: str) -> int:
        timeout_s = self.store.settings.no_workers_timeout
        found = self.store.unrunnable()  # also where nothing errs: that call notes since when it is so
        if not found or not timeout_s:
            return 0
        now_ms = self.store.now_ms if self.store.now_ms is not None else self.store.server_ms()
        due = {name: count for name, (count, since) in found.items() if now_ms - since >= timeout_s * 1000}
        infos = self.store.node_infos() if due else {}
        calls = 0
        for constraint, count in due.items():
            reason = why_nobody_may_run(constraint, infos) or "no worker is there"
            log.error("%d tasks err, as no worker may run them: %s", count, reason)
            error = seal_of(self.store.settings).close(
                Kind.ERROR, "", encode_error(NoValidWorkerError(reason, timeout_s))
            )
            left = 1
            while left and calls < CALLS_AT_ONCE:
                left, tickets = self.store.refuse(constraint, error, fence=fence)
                self.send_tickets(tickets)
                calls += 1
        return calls
