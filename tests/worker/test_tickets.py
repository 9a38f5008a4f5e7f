"""What happens to a slot after errors that are not its tasks'."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from redis.exceptions import ConnectionError

from celery_mem import Client
from celery_mem.errors import RedisUnavailableError
from celery_mem.graph import inside
from celery_mem.state.audit import read
from celery_mem.worker import slot as slot_module
from celery_mem.worker import tickets
from celery_mem.worker.slot import Slot
from tests.conftest import delete_namespace
from tests.deployment import wait_until
from tests.tasks import inc
from tests.worker.conftest import Space

ran: list[Any] = []


def note(x: Any) -> Any:
    ran.append(x)
    return x


@pytest.fixture
def run_ticket(space: Space, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """Run a ticket as a worker in this process does."""
    monkeypatch.setattr(slot_module, "RETRY_PAUSE_S", 0.01)
    settings = space.settings.replace(retry_timeout=0.05)
    ran.clear()
    app: Any = SimpleNamespace()
    yield lambda: tickets.run_ticket(app, settings, "node", "1")
    if tickets._local.slot is not None:
        tickets._local.slot.close()
        tickets._local.slot = None
    inside.worker = None


def cut(slot: Slot, when: Callable[[Any], bool]) -> threading.Event:
    """Let every command for which `when` holds fail until the returned event is set."""
    mended = threading.Event()
    once = slot.store.link._batch_once

    def fail(commands: Any) -> Any:
        if not mended.is_set() and when(commands[-1]):
            raise ConnectionError("cut")
        return once(commands)

    slot.store.link._batch_once = fail  # type: ignore[method-assign]
    return mended


def test_a_slot_that_cannot_report_is_replaced_and_its_reports_arrive_later(
    space: Space, run_ticket: Callable[[], int]
) -> None:
    run_ticket()
    first = tickets._local.slot
    futures = space.map(note, range(20))
    first.seconds_per_task = 1e-6
    mended = cut(first, lambda command: bool(ran))
    with pytest.raises(RedisUnavailableError):
        run_ticket()
    space.submit(note, "other").result  # noqa: B018 (only submitted)
    run_ticket()
    assert tickets._local.slot is not first
    mended.set()
    assert space.client.gather(futures, timeout=10) == list(range(20))
    assert sorted(x for x in ran if x != "other") == list(range(20))
    wait_until(lambda: first.name not in read(space.store).slots, "the retired slot to sign off")


def test_a_task_whose_inputs_cannot_be_read_for_long_is_handed_back_and_has_not_failed(
    space: Space, run_ticket: Callable[[], int]
) -> None:
    future = space.submit(inc, 1)
    run_ticket()
    assert future.result(timeout=10) == 2
    first = tickets._local.slot
    mended = cut(first, lambda command: command[0] == "GET")
    future = space.submit(note, 1)
    with pytest.raises(RedisUnavailableError):
        run_ticket()
    wait_until(lambda: read(space.store).records[future.key].state == "ready", "the task to be ready again")
    run_ticket()
    assert future.result(timeout=10) == 1
    mended.set()


def test_after_a_reset_of_the_namespace_a_slot_begins_anew(
    space: Space, run_ticket: Callable[[], int]
) -> None:
    run_ticket()
    first = tickets._local.slot
    delete_namespace(space.store)
    with Client(space.settings.url, namespace=space.settings.namespace, set_as_default=False) as client:
        future = client.submit(inc, 1)
        assert run_ticket() == 0
        assert run_ticket() == 1
        assert future.result(timeout=10) == 2
    assert tickets._local.slot is not first


def test_a_ticket_that_cannot_be_sent_does_not_end_the_slot(
    space: Space, run_ticket: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no broker")

    space.store.heartbeat("node", queue="queue", slots="2")
    futures = space.map(note, range(10))
    run_ticket()
    broken: Any = SimpleNamespace(
        connection_for_write=refuse, conf=SimpleNamespace(task_default_queue="queue")
    )
    tickets._local.slot.send_tickets = lambda t: tickets.send_tickets(broken, t)
    futures += space.map(note, range(10, 20))
    run_ticket()
    assert space.client.gather(futures, timeout=10) == list(range(20))
    space.store.leave_node("node")
