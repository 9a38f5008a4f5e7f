"""Failures: errors of tasks that run though nobody holds them (fire and forget) are logged."""

from __future__ import annotations

import logging

from celery_mem.coordinator.duty import CALLS_AT_ONCE, Duty
from celery_mem.graph.errors import error_line

log = logging.getLogger("celery_mem.coordinator")


class Failures(Duty):
    """Logs what nobody else would learn."""

    name = "failures"
    every_s = 0.5

    def run_once(self, fence: str) -> int:
        n = logged = 0
        for _ in range(CALLS_AT_ONCE):
            failures = self.store.log_failures(fence, logged=logged)
            if not failures:
                break
            for key, blame, error in failures:
                because = "" if blame == key else f", because of {blame}"
                why = error_line(error) if error else "its data is lost"
                log.error("task %s, which nobody waited for, failed%s: %s", key, because, why)
            logged = len(failures)
            n += logged
        return n
