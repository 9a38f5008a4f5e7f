"""Surplus: where memory is short, copies go that nobody asked for and that are elsewhere too."""

from __future__ import annotations

import logging
from typing import Any

from celery_mem.coordinator.duty import Duty
from celery_mem.coordinator.plans import nodes_of, plan_surplus
from celery_mem.coordinator.shedding import shed

log = logging.getLogger("celery_mem.coordinator")

REST_S = 10.0
"""Where there is nothing to give up, the results of a full node are not looked through again at once."""


class Surplus(Duty):
    """Drops extra copies on nodes that hold more than their target."""

    name = "surplus"
    every_s = 1.0

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._rest_until_s = 0.0

    def run_once(self, fence: str) -> int:
        nodes = nodes_of(self.store.node_infos(), self.store.settings.memory_target)
        full = [name for name, node in nodes.items() if node.excess]
        if not full or self.now_s() < self._rest_until_s:
            return 0
        keys = dict.fromkeys(key for node in full for key in self.store.on_node(node))
        plan = plan_surplus([r for r in self.store.locate(list(keys)) if r is not None], nodes)
        if not plan:
            self._rest_until_s = self.now_s() + REST_S
            return 0
        n = shed(self.store, plan)
        log.info("memory is short on %s: %d extra copies given up", ", ".join(full), n)
        return n
