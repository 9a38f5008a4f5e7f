"""A Redis that evicts keys when it is full: it must not, for any key of a namespace may be in use."""

from __future__ import annotations

import logging
import re

from redis.exceptions import ResponseError

from celery_mem.errors import CeleryMemError
from celery_mem.state.link import Link

log = logging.getLogger("celery_mem.state")

_POLICY = re.compile(rb"^maxmemory_policy:(\S+)", re.MULTILINE)
_EVICTED = re.compile(rb"^evicted_keys:(\d+)", re.MULTILINE)


class Eviction:
    """What Redis does when it is full, and how often it did so."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._is_likely = False
        self._evicted = 0

    def warn(self) -> bool:
        """Say it loudly if Redis may evict keys that do not expire; returns whether it may."""
        policy = self._figure("memory", _POLICY).decode()
        self._is_likely = policy.startswith("allkeys")
        if self._is_likely:
            self._evicted = int(self._figure("stats", _EVICTED) or 0)
            log.warning(
                "maxmemory-policy of the Redis at %s is %s: when it is full it deletes what is in use, and "
                "tasks or results are lost; set it to noeviction",
                self._link.address,
                policy,
            )
        return self._is_likely

    def happened(self) -> bool:
        """Tell whether keys were evicted since the last call; asks only where the policy allows it."""
        if not self._is_likely:
            return False
        before, self._evicted = self._evicted, int(self._figure("stats", _EVICTED) or 0)
        return self._evicted > before

    def _figure(self, section: str, pattern: re.Pattern[bytes]) -> bytes:
        try:
            info = self._link.call("INFO", section)
        except (ResponseError, CeleryMemError):
            return b""  # not permitted, or a stand-in without INFO
        found = pattern.search(info) if isinstance(info, bytes) else None
        return found[1] if found else b""
