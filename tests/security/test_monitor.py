"""The monitor: whatever lies in Redis, it unpickles nothing, and it shows no secret."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

import cloudpickle
import pytest
from redis import Redis

from celery_mem.memory import serialize
from celery_mem.monitor.reading import Reading
from celery_mem.state.keys import TASK
from tests.monitor.test_flower import get, serving
from tests.security.conftest import KEY, Intruder
from tests.tasks import inc
from tests.worker.conftest import Space

pytest.importorskip("flower")

PASSWORD = "a-password-that-no-page-may-show"
PAGES = (
    *("/", "/tasks", "/broker", "/memory", "/memory/json", "/metrics", "/healthcheck"),
    *("/api/workers", "/api/tasks", "/api/task/types", "/api/queues/length"),
)


def fail(x: int) -> None:
    raise ValueError(x)


@pytest.fixture
def key(space: Space, intruder: Intruder) -> Iterator[str]:
    """A task whose result is a trap, like all that is stored of it and of those around it."""
    first = space.submit(inc, 1)
    space.slot().run_ticket("t")
    assert first.result(timeout=10) == 2
    second = space.submit(fail, first, key="failed")
    space.slot().run_ticket("t")
    assert second.exception(timeout=10) is not None
    third = space.submit(inc, first, key="waits")
    futures = [first, second, third]
    for future in futures:
        for field in ("payload", "value", "error"):
            if space.store.link.call("HEXISTS", space.store.keys.of("task", future.key), TASK[field]):
                intruder.write(future, field, intruder.pickle())
        intruder.write_function(future, intruder.pickle())
    yield str(first.key)
    futures.clear()


@pytest.fixture
def address(space: Space, redis_server: str) -> Iterator[str]:
    """The address of the same Redis for a user with a password."""
    with Redis.from_url(redis_server) as redis:
        redis.acl_setuser(
            "watcher",
            enabled=True,
            passwords=f"+{PASSWORD}",
            keys=["*"],
            channels=["*"],
            categories=["+@all"],
        )
    return f"unix://watcher:{PASSWORD}@{urlsplit(redis_server).path}"


def test_no_page_of_flower_shows_a_secret_or_unpickles(
    space: Space, intruder: Intruder, key: str, address: str, tmp_path: Path
) -> None:
    command = ["celery_mem.cli", "flower", "-u", address, "-n", space.settings.namespace]
    secrets = {"CELERY_MEM_SECRET_KEY": KEY, "FLOWER_UNAUTHENTICATED_API": "true"}
    with serving(command, tmp_path, **secrets) as site:
        shown = {page: get(site + page) for page in (*PAGES, f"/memory/graph?key={quote(key)}")}
    assert key in shown["/memory/json"]
    assert '"memory"' in shown[f"/memory/graph?key={quote(key)}"]
    assert "celery_mem_up 1.0" in shown["/metrics"]
    shown["the log"] = (tmp_path / "log").read_text()
    for page, text in shown.items():
        assert PASSWORD not in text, page
        assert KEY not in text, page
    assert not intruder.trace.exists()


def test_no_reading_calls_pickle(
    space: Space, intruder: Intruder, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from celery_mem.monitor.metrics import MemoryCollector

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a monitor unpickles")

    for module in (pickle, cloudpickle):
        for name in ("load", "loads"):
            monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    monkeypatch.setattr(serialize, "_Unpickler", refuse)
    reading = Reading(space.store)
    assert {row["key"] for row in reading.picture()["largest"]} == {key, "failed", "waits"}
    graph = reading.graph(key)
    assert graph is not None
    assert graph["states"][key] == "memory"
    assert list(MemoryCollector(reading).collect())
    assert not intruder.trace.exists()
