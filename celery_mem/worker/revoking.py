"""Celery's `revoke`, as Flower's buttons and `app.control` send it, for tasks of the graph too.

It names a task by the id under which its events came, and of a task of the graph that is the key. Every
worker hears it; the first one to ask Redis cancels the task, and the others find nothing left to do.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from celery.utils.functional import maybe_list
from celery.worker.control import Panel, ok

from celery_mem.errors import CeleryMemError
from celery_mem.graph.broker import line_of
from celery_mem.graph.tickets import send_tickets
from celery_mem.state.keys import TASK
from celery_mem.state.store import Store

log = logging.getLogger("celery_mem.worker")

ASK_S = 2.0
"""How long Redis is tried. Meanwhile the worker's main process does nothing else."""
REASON = "revoked"


def hear_revoke() -> None:
    """Have the `revoke` of this process cancel tasks of the graph, and do what it does with all others."""
    known = Panel.data["revoke"]
    if not hasattr(known, "__wrapped__"):
        Panel.data["revoke"] = _for_graph(known)


def _for_graph(revoke: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(revoke)
    def revoke_any(state: Any, task_id: Any, *args: Any, **kwargs: Any) -> Any:
        ids = [str(one) for one in maybe_list(task_id) or []]
        cancelled = cancel(state.app, ids) if hasattr(state.app, "mem_settings") else []
        others = [one for one in ids if one not in cancelled]
        if cancelled and not others:
            return ok(f"tasks {cancelled} of the graph cancelled")
        return revoke(state, others, *args, **kwargs)

    return revoke_any


def cancel(app: Any, ids: list[str]) -> list[str]:
    """Cancel those of the tasks that are in the graph, whoever holds them; returns their keys."""
    try:
        store = Store.connect(app.mem_settings().replace(retry_timeout=ASK_S))
        try:
            found = store.link.batch([("HEXISTS", store.keys.of("task", one), TASK["core"]) for one in ids])
            keys = [one for one, is_there in zip(ids, found, strict=True) if is_there]
            if keys:
                send_tickets(app, store.cancel("", keys, force=True, reason=REASON)[1])
                line_of(app).hang_up()
            return keys
        finally:
            store.link.close()
    except CeleryMemError as error:
        log.warning("cannot tell whether %s are tasks of the graph: %s", ids, error)
        return []
