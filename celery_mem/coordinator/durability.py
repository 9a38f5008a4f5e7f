"""Durability: results that are to outlive all nodes get there, and their files go when nobody wants them."""

from __future__ import annotations

import logging
from typing import Any

from celery_mem.coordinator.duty import Duty
from celery_mem.memory.durable import durable_files
from celery_mem.state.letters import keep_copy
from celery_mem.state.store import OUTLIVE_NODES

log = logging.getLogger("celery_mem.coordinator")

PATIENCE_S = 10.0
"""The script that recorded the result asked a node, which should be done by then; its agent may have died."""
DROPPED_AT_ONCE = 100
RETRY_S = 30.0


class Durability(Duty):
    """Asks again for durable copies that are late, and deletes durable files that no record names."""

    name = "durability"
    every_s = 0.5

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._asked_s: dict[str, float] = {}
        self._rest_until_s = 0.0

    def run_once(self, fence: str) -> int:
        return self._ask_again() + self._drop(fence)

    def _ask_again(self) -> int:
        now = self.now_s()
        keys = self.store.undurable_keys()
        self._asked_s = {key: self._asked_s.get(key, now) for key in keys}
        late = [key for key, asked in self._asked_s.items() if now - asked >= PATIENCE_S]
        n = 0
        for found in self.store.locate(late):
            if found is None:
                continue
            self._asked_s[found.key] = now
            nodes = [place for place in found.places if place not in OUTLIVE_NODES]
            n += any(self.store.mail(node, keep_copy(found.token, found.key)) for node in nodes)
        return n

    def _drop(self, fence: str) -> int:
        tokens = self.store.debris()[:DROPPED_AT_ONCE]
        if not tokens or self.now_s() < self._rest_until_s:
            return 0
        done = []
        try:
            files = durable_files(self.store.settings)
            if files is None:
                raise OSError("mem_durable_url is not set for the coordinator")
            for token in tokens:
                files.drop(token)
                done.append(token)
        except OSError as error:
            log.warning("durable files that nobody wants any more cannot be deleted: %s", error)
            self._rest_until_s = self.now_s() + RETRY_S
        if done:
            self.store.clear_debris(done, fence=fence)
        return len(done)
