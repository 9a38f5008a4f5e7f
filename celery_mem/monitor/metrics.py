"""Gauges for Prometheus, at Flower's `/metrics`."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily
from redis.exceptions import RedisError

from celery_mem.errors import CeleryMemError
from celery_mem.monitor.reading import Reading


class MemoryCollector:
    """Reads the namespace when Prometheus asks; while Redis is away, `celery_mem_up` is 0 and alone."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading

    def describe(self) -> list[GaugeMetricFamily]:
        """Name nothing, so that registering reads nothing."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield all gauges."""
        try:
            picture = self._reading.picture()
        except (CeleryMemError, RedisError):
            yield GaugeMetricFamily("celery_mem_up", "1 if the namespace could be read.", value=0)
            return
        yield GaugeMetricFamily("celery_mem_up", "1 if the namespace could be read.", value=1)
        tasks = GaugeMetricFamily("celery_mem_tasks", "Tasks by state.", labels=["state"])
        for state, count in picture["tasks"].items():
            tasks.add_metric([state], count)
        memory = GaugeMetricFamily(
            "celery_mem_node_bytes", "Bytes of a node by kind of memory.", labels=["node", "kind"]
        )
        slots = GaugeMetricFamily("celery_mem_slots", "Slots of a node.", labels=["node"])
        busy = GaugeMetricFamily("celery_mem_slots_busy", "Slots that run a task.", labels=["node"])
        for name, node in picture["nodes"].items():
            for kind, size in node["memory"].items():
                memory.add_metric([name, kind], size)
            slots.add_metric([name], node["slots"])
            busy.add_metric([name], node["busy"])
        results = GaugeMetricFamily(
            "celery_mem_result_bytes", "Size of all results.", value=picture["nbytes"]
        )
        yield from (tasks, memory, slots, busy, results)
