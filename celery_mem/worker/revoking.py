"""Celery's `revoke` and `terminate`, as Flower's buttons and `app.control` send them, in the graph too.

They name a task by the id under which its events came, and of a task of the graph that is the key. Every
worker hears them; the first one to ask Redis cancels the task. The others find that it was, and do no more:
Celery would write into the app's result backend that a task of this id is revoked.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any

from celery.utils.functional import maybe_list
from celery.worker.control import Panel, ok
from redis.exceptions import ResponseError

from celery_mem.errors import CeleryMemError
from celery_mem.graph.broker import line_of
from celery_mem.graph.tickets import send_tickets
from celery_mem.state.keys import TASK
from celery_mem.state.store import Store

log = logging.getLogger("celery_mem.worker")

ASK_S = 2.0
"""How long Redis is tried. Meanwhile the worker's main process does nothing else."""
MARK_S = 60
"""How long it is known of a task that it was revoked: all workers hear it at about the same time."""
REASON = "revoked"


def hear_revoke() -> None:
    """Have these commands of this process cancel tasks of the graph, and do what they do with all others.

    Both, as `terminate` of Celery's does not ask for the `revoke` that is registered. What goes by stamps
    (`revoke_by_stamped_headers`) concerns no task of the graph, nor a ticket: these bear none.
    """
    for name in ("revoke", "terminate"):
        known = Panel.data[name]
        if not hasattr(known, "__wrapped__"):
            Panel.data[name] = _for_graph(known)


def _for_graph(command: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(command)
    def for_any(state: Any, task_id: Any, **kwargs: Any) -> Any:  # the panel gives arguments by name
        ids = [str(one) for one in maybe_list(task_id) or []]
        cancelled = cancel(state.app, ids) if hasattr(state.app, "mem_settings") else []
        others = [one for one in ids if one not in cancelled]
        if cancelled and not others:
            return ok(f"tasks {cancelled} of the graph cancelled")
        return command(state, task_id=others, **kwargs)

    return for_any


def cancel(app: Any, ids: list[str]) -> list[str]:
    """Cancel those of the tasks that are in the graph, whoever holds them.

    Returns:
        their keys, and those that another worker has just cancelled.
    """
    try:
        store = Store.connect(app.mem_settings().replace(retry_timeout=ASK_S))
        try:
            # In this order: a mark is there before its record goes.
            found = store.link.batch([("HEXISTS", store.keys.of("task", one), TASK["core"]) for one in ids])
            marked = store.link.batch([("EXISTS", store.keys.of("revoked", one)) for one in ids])
            keys = [one for one, is_there in zip(ids, found, strict=True) if is_there]
            if keys:
                with contextlib.suppress(ResponseError):  # a full Redis, which cancelling may relieve
                    store.link.batch(
                        [("SET", store.keys.of("revoked", key), "", "EX", MARK_S) for key in keys]
                    )
                send_tickets(app, store.cancel("", keys, force=True, reason=REASON)[1])
                line_of(app).hang_up()
            return [*keys, *(one for one, n in zip(ids, marked, strict=True) if n and one not in keys)]
        finally:
            store.link.close()
    except CeleryMemError as error:
        log.warning("cannot tell whether %s are tasks of the graph: %s", ids, error)
        return []
