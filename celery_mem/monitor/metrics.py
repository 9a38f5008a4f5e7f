"""Metrics for Prometheus: at Flower's `/metrics`, or at a port of the coordinator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from redis.exceptions import RedisError

from celery_mem.errors import CeleryMemError
from celery_mem.monitor.reading import AT_WORK, Reading
from celery_mem.state.counts import LATE, STEP, TICKET, histogram
from celery_mem.state.store import Store


class MemoryCollector:
    """Reads the namespace when Prometheus asks; while Redis is away, `celery_mem_up` is 0 and alone."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading

    def describe(self) -> list[Metric]:
        """Name nothing, so that registering reads nothing."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield all that a reading tells."""
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
        freed = CounterMetricFamily(
            "celery_mem_node_freed", "Copies of results that a node was told to drop.", labels=["node"]
        )
        for name, node in picture["nodes"].items():
            freed.add_metric([name], node["freed"])
            for kind, size in node["memory"].items():
                memory.add_metric([name, kind], size)
            slots.add_metric([name], node["slots"])
            busy.add_metric([name], node["busy"])
        results = GaugeMetricFamily(
            "celery_mem_result_bytes", "Size of all results.", value=picture["nbytes"]
        )
        queues = GaugeMetricFamily(
            "celery_mem_queue_tasks", "Tasks at work by queue.", labels=["queue", "state"]
        )
        for row in picture["at_work"]:
            for state in AT_WORK:
                queues.add_metric([row["queue"], state], row[state])
        yield from (tasks, memory, slots, busy, results, freed, queues)
        yield from _happened(picture["counts"])


def _happened(counts: Mapping[str, int]) -> Iterator[Metric]:
    """Yield what was counted since the namespace began; a restart of it begins anew, as Prometheus allows."""
    yield CounterMetricFamily(
        "celery_mem_freed", "Results dropped because nobody wanted them any more.", value=counts["freed"]
    )
    recoveries = CounterMetricFamily(
        "celery_mem_recoveries",
        "Tasks that run again: their result is gone and wanted (lineage), or their slot died (slot).",
        labels=["cause"],
    )
    recoveries.add_metric(["lineage"], counts["remade"])
    recoveries.add_metric(["slot"], counts["rerun"])
    yield recoveries
    yield CounterMetricFamily(
        "celery_mem_steals", "Tasks taken from the queue of another node.", value=counts["stolen"]
    )
    yield CounterMetricFamily(
        "celery_mem_late_tickets",
        "Tickets that began after they had been given up.",
        value=counts.get(LATE, 0),
    )
    for kind, name, what in (
        (TICKET, "celery_mem_ticket_seconds", "Time from the sending of a ticket to its begin in a slot."),
        (STEP, "celery_mem_step_seconds", "Round trip in which a slot reports tasks and takes more."),
    ):
        found = histogram(counts, kind)
        yield HistogramMetricFamily(name, what, buckets=found.buckets, sum_value=found.total_s)


class DutyCollector:
    """What the coordinator of this process did while it led; nothing is read."""

    def __init__(self, totals: Mapping[str, int]) -> None:
        self._totals = totals

    def collect(self) -> Iterator[Metric]:
        """Yield one counter, by duty."""
        duties = CounterMetricFamily(
            "celery_mem_duty",
            "What the duties of this coordinator did: nodes given up, clients expired, tickets sent.",
            labels=["duty"],
        )
        for name, total in self._totals.items():
            duties.add_metric([name], total)
        yield duties


def serve(address: str, port: int, store: Store, totals: Mapping[str, int]) -> None:
    """Answer Prometheus in a thread, for those who run no Flower."""
    registry = CollectorRegistry()
    registry.register(MemoryCollector(Reading(store)))
    registry.register(DutyCollector(totals))
    start_http_server(port, address, registry=registry)
