"""Jobs: what a client asked for that takes a while. Each is a line of JSON in Redis, and says how far it is.

The client waits on a list for the answer. A job holds all that it takes to go on with it, so a coordinator
may end anywhere in it, and the next one takes over.
"""

from __future__ import annotations

import json
import logging
import time
from typing import Any

from celery_mem.coordinator.duty import Duty
from celery_mem.coordinator.job_kinds import JobKind, Moves, Rebalance, Replicate, Retire
from celery_mem.errors import FencedError, NamespaceResetError, RedisUnavailableError

log = logging.getLogger("celery_mem.coordinator")

KINDS: dict[str, type[JobKind]] = {
    "move": Moves,
    "rebalance": Rebalance,
    "replicate": Replicate,
    "retire": Retire,
}
REPLY_S = 60
"""For how long an answer waits for its client."""
REST = 4
"""After a run a job rests for so many times what it took: large ones must not keep the coordinator busy."""


class Jobs(Duty):
    """Goes on with each job, and tells the client when it is over."""

    name = "jobs"
    every_s = 0.05

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._kinds = {name: kind(self.store, self.outside, self.now_s) for name, kind in KINDS.items()}
        self._rest_until: dict[str, float] = {}

    def run_once(self, fence: str) -> int:
        jobs = self.store.jobs()
        self._rest_until = {job: until for job, until in self._rest_until.items() if job in jobs}
        n = 0
        for name, job in sorted(jobs.items()):
            if self.now_s() < self._rest_until.get(name, 0.0):
                continue
            started = time.monotonic()
            before = json.dumps(job)
            self._advance(name, job)
            if job["status"] != "running":
                self._end(name, job, fence)
            elif json.dumps(job) != before:
                self.store.post_job(name, job, fence=fence)
            self._rest_until[name] = self.now_s() + REST * (time.monotonic() - started)
            n += 1
        return n

    def _advance(self, name: str, job: dict[str, Any]) -> None:
        kind = self._kinds.get(job["kind"])
        try:
            if kind is None:
                raise ValueError(f"a coordinator of this version knows no job {job['kind']!r}")
            kind.advance(job)
        except (FencedError, NamespaceResetError, RedisUnavailableError):
            raise
        except Exception as error:  # it would fail again and again, and its client would wait for ever
            log.exception("job %s failed", name)
            job.update(status="failed", reason=f"{type(error).__name__}: {error}")

    def _end(self, name: str, job: dict[str, Any], fence: str) -> None:
        """Tell the client, then forget the job: told twice does no harm, never told would."""
        if job["status"] == "failed":
            log.error("job %s (%s): %s", name, job["kind"], job["reason"])
        else:
            log.info("job %s (%s) is done: %s", name, job["kind"], job["done"])
        reply = self.store.keys.of("reply", name)
        answer = json.dumps({part: job.get(part) for part in ("status", "reason", "done", "total")})
        self.store.link.batch([("RPUSH", reply, answer), ("EXPIRE", reply, REPLY_S)])
        self.store.end_job(name, fence=fence)
