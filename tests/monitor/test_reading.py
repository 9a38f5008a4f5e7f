"""How often the namespace is read, and what a monitor says while it cannot be."""

from __future__ import annotations

from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from celery_mem.monitor import reading
from celery_mem.monitor.reading import PERIOD_S, Reading

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


def test_the_dashboard_asks_for_gauges_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    import json
    import re
    from pathlib import Path

    from celery_mem.monitor.metrics import DutyCollector, MemoryCollector

    node = {"memory": {}, "slots": 1, "busy": 0, "freed": 0}
    picture = {"tasks": {}, "nodes": {"a": node}, "nbytes": 0, "at_work": []}
    monkeypatch.setattr(reading, "memory_picture", lambda store: picture)
    families = [
        *MemoryCollector(Reading(None)).collect(),  # type: ignore[arg-type]
        *DutyCollector({"nodes": 1}).collect(),
    ]
    there = {f.name + ("_total" if f.type == "counter" else "") for f in families}
    file = Path(__file__).parents[2] / "docker" / "grafana" / "celery-mem.json"
    panels = json.loads(file.read_text(encoding="utf-8"))["panels"]
    forms = r"(celery_mem_\w+)|rate\((celery_mem_\w+_total)\[5m\]\)"
    found = [re.fullmatch(forms, t["expr"]) for p in panels for t in p["targets"]]
    asked = {match[1] or match[2] for match in found if match}
    assert len(found) > 1
    assert all(found)
    assert asked <= there
