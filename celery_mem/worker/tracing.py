"""The OpenTelemetry span of a task that was submitted inside one."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery_mem.errors import TaskInterrupt
from celery_mem.graph.calls import call
from celery_mem.graph.errors import message_of
from celery_mem.graph.tracing import OFF, tracer
from celery_mem.worker.interrupts import CANCELLED
from celery_mem.worker.shown import name_in_display, shown_name

if TYPE_CHECKING:
    from celery_mem.state.store import Taken

log = logging.getLogger("celery_mem.worker")

SUCCEEDED, FAILED, AGAIN = "succeeded", "failed", "again"
"""Outcomes; the last one of an attempt that came to nothing: the task runs again, here or elsewhere."""


class TaskSpan:
    """The span of one attempt, a child of the one that was current when the task was submitted."""

    def __init__(self, context: bytes, task: Taken, attributes: dict[str, str]) -> None:
        from opentelemetry import propagate, trace

        self._key = task.key
        self._outcome = AGAIN
        self._span = tracer().start_span(
            name_in_display(task.key, ""),
            context=propagate.extract(json.loads(context)),
            kind=trace.SpanKind.CONSUMER,
            attributes={"celery_mem.key": task.key, "celery_mem.attempt": int(task.attempt), **attributes},
        )

    def enter(self, func: Callable[..., Any]) -> Any:
        """Name it after its function, and make it the current span; returns what `leave` takes."""
        from opentelemetry import context, trace

        name = name_in_display(self._key, "" if func is call else shown_name(func))
        self._span.update_name(name)
        self._span.set_attribute("celery_mem.function", name)
        return context.attach(trace.set_span_in_context(self._span))

    def leave(self, token: Any) -> None:
        """Make the span current that was so before."""
        from opentelemetry import context

        context.detach(token)

    def raised(self, error: BaseException) -> None:
        """Note that the task failed, or was cancelled, whatever the exception does when it is looked at."""
        from opentelemetry.trace import Status, StatusCode

        self._outcome = FAILED
        self._span.set_status(Status(StatusCode.ERROR))
        try:
            if isinstance(error, TaskInterrupt) and error.reason == CANCELLED:
                self._outcome = CANCELLED
            self._span.set_status(Status(StatusCode.ERROR, f"{type(error).__name__}: {message_of(error)}"))
            self._span.record_exception(error)
        except Exception:
            log.debug("the exception of %s cannot be recorded", self._key)

    def end(self, *, is_done: bool) -> None:
        """End it. What neither is done nor raised runs again."""
        self._span.set_attribute("celery_mem.outcome", SUCCEEDED if is_done else self._outcome)
        self._span.end()


def begin_span(mode: str, context: bytes, task: Taken, *, node: str, namespace: str) -> TaskSpan | None:
    """Begin the span of an attempt; None without OpenTelemetry, or if nobody wants it.

    Args:
        mode: the setting `mem_tracing`.
        context: what `current_context` returned where the task was submitted.
    """
    if mode == OFF:
        return None
    where = {"celery_mem.worker": node, "celery_mem.namespace": namespace}
    if queue := _queue_of_ticket():
        where["celery_mem.queue"] = queue
    try:
        return TaskSpan(context, task, where)
    except ImportError:
        return None
    except Exception as error:  # tracing is no promise, and must not cost a result
        log.debug("no span for %s: %s", task.key, error)
        return None


def _queue_of_ticket() -> str:
    """Return the Celery queue of the ticket that this thread runs; empty in a thread that helps another."""
    from celery._state import get_current_task

    ticket = get_current_task()
    about = None if ticket is None else ticket.request.delivery_info
    return str((about or {}).get("routing_key") or "")
