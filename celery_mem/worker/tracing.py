"""The OpenTelemetry span of a task that was submitted inside one."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

from celery_mem.graph.calls import call
from celery_mem.graph.errors import error_line
from celery_mem.graph.tracing import OFF, tracer
from celery_mem.state.store import Done, Failed, Missing, Taken
from celery_mem.worker.interrupts import CANCELLED
from celery_mem.worker.shown import name_in_display, shown_name
from celery_mem.worker.standing_in import stand_in_of_thread
from celery_mem.worker.watching import Watcher, is_cancelled

log = logging.getLogger("celery_mem.worker")

SUCCEEDED, FAILED, AGAIN = "succeeded", "failed", "again"
"""Outcomes; the last one of an attempt that came to nothing: the task runs again, here or elsewhere."""


class TaskSpan(Watcher):
    """The span of one attempt, a child of the one that was current when the task was submitted."""

    def __init__(self, context: bytes, task: Taken, attributes: dict[str, str]) -> None:
        from opentelemetry import propagate, trace

        self._key = task.key
        self._outcome = AGAIN
        self._before: Any = None
        self._span = tracer().start_span(
            name_in_display(task.key, ""),
            context=propagate.extract(json.loads(context)),
            kind=trace.SpanKind.CONSUMER,
            attributes={"celery_mem.key": task.key, "celery_mem.attempt": int(task.attempt), **attributes},
        )

    def calls(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Name it after its function, and make it the current span."""
        from opentelemetry import context, trace

        name = name_in_display(self._key, "" if func is call else shown_name(func))
        self._span.update_name(name)
        self._span.set_attribute("celery_mem.function", name)
        self._before = context.attach(trace.set_span_in_context(self._span))

    def raised(self, error: BaseException, data: bytes) -> None:
        """Note that the task failed, or was cancelled, whatever the exception does when it is looked at."""
        from opentelemetry.trace import Status, StatusCode

        self._outcome = CANCELLED if is_cancelled(error) else FAILED
        self._span.set_status(Status(StatusCode.ERROR, error_line(data)))
        try:
            self._span.record_exception(error)
        except Exception:
            log.debug("the exception of %s cannot be recorded", self._key)

    def ends(self, outcome: Done | Failed | Missing | None) -> None:
        """End it, and make the span current that was so before."""
        from opentelemetry import context

        if self._before is not None:
            context.detach(self._before)
        self._span.set_attribute(
            "celery_mem.outcome", SUCCEEDED if isinstance(outcome, Done) else self._outcome
        )
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
    stand_in = stand_in_of_thread()
    about = None if stand_in is None or stand_in.ticket is None else stand_in.ticket.request.delivery_info
    return str((about or {}).get("routing_key") or "")
