"""How often the namespace is read, and what a monitor says while it cannot be."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from celery_mem.monitor import reading
from celery_mem.monitor.reading import PERIOD_S, Reading
from celery_mem.state.counts import LATE, STEP, Tally

pytest.importorskip("flower")


def test_many_who_look_cost_one_reading_per_period(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    read: list[float] = []
    monkeypatch.setattr(reading, "memory_picture", lambda store: {"number": read.append(now[0])})
    source = Reading(None, clock=lambda: now[0])  # type: ignore[arg-type]
    for _ in range(10):
        source.picture()
        now[0] += PERIOD_S / 4
    assert read == [0.0, PERIOD_S, 2 * PERIOD_S]


def test_without_redis_the_gauges_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from celery_mem.monitor.metrics import MemoryCollector

    def away(store: Any) -> Any:
        raise RedisConnectionError("redis://:password@host is away")

    monkeypatch.setattr(reading, "memory_picture", away)
    [up] = MemoryCollector(Reading(None)).collect()  # type: ignore[arg-type]
    assert [sample.value for sample in up.samples] == [0]
    assert "password" not in repr(up)


PICTURE = {
    "tasks": {"memory": 3},
    "nodes": {"a": {"memory": {"files": 10}, "slots": 1, "busy": 0, "freed": 0}},
    "nbytes": 0,
    "at_work": [{"queue": "any node", "ready": 1, "processing": 0, "erred": 0}],
    "counts": {"freed": 5, "remade": 2, "rerun": 3, "stolen": 4, LATE: 1},
}


def families(monkeypatch: pytest.MonkeyPatch, picture: dict[str, Any]) -> list[Any]:
    from celery_mem.monitor.metrics import DutyCollector, MemoryCollector

    monkeypatch.setattr(reading, "memory_picture", lambda store: picture)
    collector = MemoryCollector(Reading(None))  # type: ignore[arg-type]
    return [*collector.collect(), *DutyCollector({"nodes": 1}).collect()]


def values(found: list[Any]) -> dict[tuple[str, ...], float]:
    """Value by name and labels."""
    return {(s.name, *s.labels.values()): s.value for family in found for s in family.samples}


def test_the_dashboard_asks_for_metrics_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [s for family in families(monkeypatch, PICTURE) for s in family.samples]
    labels = {s.name: set(s.labels) for s in samples}
    file = Path(__file__).parents[2] / "docker" / "grafana" / "celery-mem.json"
    panels = json.loads(file.read_text(encoding="utf-8"))["panels"]
    assert len({p["id"] for p in panels}) == len(panels)
    places = {(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels}
    assert len(places) == len(panels)
    for target in (t for p in panels for t in p["targets"]):
        names = re.findall(r"celery_mem_\w+", target["expr"])
        assert names
        for name in names:
            assert name in labels, target["expr"]
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= labels[name]
            assert set(re.findall(r"by \((\w+)\)", target["expr"])) <= labels[name]
            is_rate = f"rate({name}[5m])" in target["expr"]
            assert is_rate == name.endswith(("_total", "_bucket")), target["expr"]


def test_what_happened_is_counted_by_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    found = values(families(monkeypatch, PICTURE))
    assert found[("celery_mem_freed_total",)] == 5
    assert found[("celery_mem_recoveries_total", "lineage")] == 2
    assert found[("celery_mem_recoveries_total", "slot")] == 3
    assert found[("celery_mem_steals_total",)] == 4
    assert found[("celery_mem_late_tickets_total",)] == 1


def test_times_of_slots_become_histograms(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = [Tally(), Tally()]
    for seconds in (0.0005, 0.0006, 20.0):
        slots[0].note(STEP, seconds)
    slots[1].note_ticket(40)
    counts = {"freed": 0, "remade": 0, "rerun": 0, "stolen": 0, **slots[0].take(), **slots[1].take()}
    assert slots[0].take() == {}

    found = values(families(monkeypatch, {**PICTURE, "counts": counts}))
    steps = {name[1]: value for name, value in found.items() if name[0] == "celery_mem_step_seconds_bucket"}
    assert list(steps.values()) == sorted(steps.values())
    assert (steps["0.0005"], steps["0.001"], steps["10.0"], steps["+Inf"]) == (1, 2, 2, 3)
    assert found[("celery_mem_step_seconds_count",)] == 3
    assert found[("celery_mem_step_seconds_sum",)] == pytest.approx(20.0011)
    assert found[("celery_mem_ticket_seconds_bucket", "0.025")] == 0
    assert found[("celery_mem_ticket_seconds_bucket", "0.05")] == 1
