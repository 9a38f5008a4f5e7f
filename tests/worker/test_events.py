"""What the events of tasks cost: messages, and a share of the time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from celery.events.dispatcher import EventDispatcher

from celery_mem.graph.errors import encode_error
from celery_mem.state.store import Input, Taken
from celery_mem.worker.events import PERIOD_S, SHARE, TaskEvents


def task(key: str, *inputs: str) -> Taken:
    return Taken(key, "1", "f", b"", "", [Input(name, "v", b"") for name in inputs])


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, str]]:
    """What was published: the body, and its routing key."""
    found: list[tuple[Any, str]] = []
    monkeypatch.setattr(
        EventDispatcher, "_publish", lambda self, body, producer, key, **_: found.append((body, key))
    )
    return found


@pytest.fixture
def app() -> Iterator[Celery]:
    app = Celery(broker="memory://", set_as_current=False)
    yield app
    app.close()


def test_many_tasks_are_one_message(app: Celery, messages: list[tuple[Any, str]]) -> None:
    events = TaskEvents(app, "w@host", is_capped=False)
    for n in range(100):
        run = events.begin(task(f"int-{n}", *([f"int-{n - 1}"] if n else [])))
        assert run is not None
        run.calls(int, (n,), {})
        run.returned(n, 0.001)
    events.close()

    [(batch, routing_key)] = messages
    assert routing_key == "task.multi"
    assert [event["type"] for event in batch] == ["task-received", "task-started", "task-succeeded"] * 100
    assert {event["hostname"] for event in batch} == {"w@host"}
    last = batch[-3]
    assert (last["uuid"], last["name"], last["args"]) == ("int-99", "int", "(99,)")
    assert (last["parent_id"], last["root_id"]) == ("int-98", "int-0")


def test_a_sample_is_as_large_as_its_share_of_the_time(app: Celery, messages: list[tuple[Any, str]]) -> None:
    events = TaskEvents(app, "w@host", is_capped=True)
    events._cost_s = PERIOD_S * SHARE / 3.5
    events._make_room()
    shown = [events.begin(task(f"int-{n}")) for n in range(10)]
    assert [run is not None for run in shown] == [True] * 3 + [False] * 7
    for n in range(10):
        events.failed(task(f"bad-{n}"), encode_error(ValueError("no")))
    for run in shown[:3]:
        assert run is not None
        run.ends(None)
    events.close()

    [(batch, _)] = messages
    failed = [event["uuid"] for event in batch if event["type"] == "task-failed"]
    assert failed == ["bad-0", "bad-1"]


def test_a_task_that_runs_shows_before_it_ends(app: Celery, messages: list[tuple[Any, str]]) -> None:
    events = TaskEvents(app, "w@host", is_capped=True)
    run = events.begin(task("int-1"))
    assert run is not None
    run.calls(int, ("1",), {})
    events._send()
    run.returned(1, 60.0)
    events.close()

    kinds = [[event["type"] for event in batch] for batch, _ in messages]
    assert kinds == [["task-received", "task-started"], ["task-succeeded"]]


def test_a_broker_that_is_away_stops_nothing(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("the broker is away")

    monkeypatch.setattr(EventDispatcher, "_publish", away)
    events = TaskEvents(app, "w@host", is_capped=True)
    for _ in range(2):
        run = events.begin(task("int-1"))
        assert run is not None
        run.returned(1, 0.0)
    events.close()
    assert not events._thread.is_alive()
