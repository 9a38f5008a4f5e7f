"""When the broker hears that a ticket is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery
from celery.worker import state
from kombu import Connection

from celery_mem.graph.tickets import TASK_NAME
from celery_mem.worker.install import install
from celery_mem.worker.ticket_requests import ACK_BY_S, TicketRequest, acknowledge_old_tickets


@pytest.fixture
def receive() -> Iterator[Callable[[], TicketRequest]]:
    """A function that sends one ticket and receives it, as a worker does."""
    app = install(Celery("shop", broker="memory://", set_as_current=False), url="redis://localhost")
    task = app.tasks[TASK_NAME]
    kept: list[Any] = []

    def send_and_receive() -> TicketRequest:
        task.apply_async(("1",))
        queue = connection.SimpleQueue(app.conf.task_default_queue)
        message = queue.get_nowait()
        request = TicketRequest(message, on_ack=message.ack_log_error, app=app, task=task)
        state.task_reserved(request)
        kept.extend((queue, request))
        return request

    with Connection("memory://") as connection:
        yield send_and_receive
    for request in kept[1::2]:
        state.task_ready(request)
    app.close()


def test_apps_of_one_process_have_a_ticket_each_and_others_have_none() -> None:
    """Celery would share the task among all of them, with a warning where a second one has it too."""
    apps = [install(Celery(n, set_as_current=False), url="redis://localhost") for n in ("one", "two")]
    other = Celery("other", set_as_current=False)
    assert [a.tasks[TASK_NAME].app.main for a in apps] == ["one", "two"]
    assert TASK_NAME not in other.tasks


def test_it_does_at_last_after_five_minutes_whether_the_ticket_runs_or_waits(
    receive: Callable[[], TicketRequest],
) -> None:
    runs, waits, is_new = receive(), receive(), receive()
    state.task_accepted(runs)
    runs.came -= ACK_BY_S + 1
    waits.came -= ACK_BY_S + 1
    acknowledge_old_tickets()
    assert [r.message.acknowledged for r in (runs, waits, is_new)] == [True, True, False]
    acknowledge_old_tickets()
    runs.acknowledge()  # when it is over
    is_new.acknowledge()
    assert is_new.message.acknowledged
