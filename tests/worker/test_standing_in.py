"""Who is Celery's current task while a slot runs tasks of the graph; log records outside of tasks."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import pytest
from celery._state import _task_stack, get_current_task, get_current_worker_task
from celery.utils.log import get_task_logger

from celery_mem import TaskKeyFilter
from celery_mem.worker.run import call_task
from celery_mem.worker.standing_in import standing_in

TASK = SimpleNamespace(key="inc-1")
SLOT = SimpleNamespace(
    name="w@host|1.1", node="w@host", runner=SimpleNamespace(name_of=lambda task: task.key[:-2])
)


def current() -> tuple[str, str]:
    task = get_current_task()
    return task.name, task.request.id


def test_it_is_the_task_that_runs_and_between_two_the_slot() -> None:
    driver: Any = SimpleNamespace(slot=SLOT, task=None)
    with standing_in(driver):
        assert current() == ("celery_mem.ticket", "w@host|1.1")
        driver.task = TASK
        assert current() == ("inc", "inc-1")
        assert get_current_worker_task() is None, "it is no parent of messages that the task sends"
    assert get_current_task() is None


def test_in_the_thread_of_a_ticket_that_is_it_between_two_tasks() -> None:
    driver: Any = SimpleNamespace(slot=SLOT, task=None)
    ticket = SimpleNamespace(request=SimpleNamespace(id="t-1", called_directly=False))
    _task_stack.push(ticket)
    try:
        with standing_in(driver):
            assert current() == ("celery_mem.ticket", "t-1")
            driver.task = TASK
            assert current() == ("inc", "inc-1")
            assert get_current_worker_task() is ticket
        assert get_current_task() is ticket
    finally:
        _task_stack.pop()


def test_a_coroutine_inside_another_is_the_same_task() -> None:
    """It runs in an event loop of its own, in another thread."""

    async def inner() -> tuple[str, str]:
        return current()

    async def outer() -> Any:
        return call_task(inner, (), {})

    driver: Any = SimpleNamespace(slot=SLOT, task=TASK)
    with standing_in(driver):
        assert call_task(outer, (), {}) == ("inc", "inc-1")


def test_records_outside_of_tasks_have_no_key(caplog: pytest.LogCaptureFixture) -> None:
    caplog.handler.addFilter(only := TaskKeyFilter())
    try:
        with caplog.at_level(logging.INFO, "celery.task"):
            get_task_logger("some").info("hello")
            get_task_logger("some").info("hello", extra={"task_id": "known", "task_name": "before"})
    finally:
        caplog.handler.removeFilter(only)
    fields = [(record.task_id, record.task_name) for record in caplog.records]  # type: ignore[attr-defined]
    assert fields == [("-", "-"), ("known", "before")]


def test_a_loop_leaves_nobody_behind() -> None:
    async def fails() -> None:
        raise ValueError

    async def outer() -> Any:
        return call_task(fails, (), {})

    driver: Any = SimpleNamespace(slot=SLOT, task=TASK)
    with pytest.raises(ValueError), standing_in(driver):  # noqa: PT011 (it has no text)
        asyncio.run(outer())
    assert get_current_task() is None
