"""Copies: where more than one was asked for, the number is restored when one is lost or a node joins."""

from __future__ import annotations

from typing import Any

from celery_mem.coordinator.duty import Duty
from celery_mem.coordinator.errands import Errands
from celery_mem.coordinator.plans import nodes_of, plan_copies


class Copies(Duty):
    """Has the copies made that are missing of those asked for."""

    name = "copies"
    every_s = 0.25

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._errands = Errands(self.store, self.now_s)

    def run_once(self, fence: str) -> int:
        keys = self.store.copied_keys()
        if not keys:
            return 0
        located = {r.key: r for r in self.store.locate(keys) if r is not None}
        nodes = nodes_of(self.store.node_infos(), self.store.settings.memory_target)
        plan = plan_copies(self._errands.with_expected(located.values()), nodes)
        return self._errands.send(plan, lambda key: located[key].places)
