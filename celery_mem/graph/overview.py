"""What a person or a monitor wants to know of a namespace and its memory; nothing is unpickled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from redis.exceptions import NoPermissionError

from celery_mem.graph.constraints import why_nobody_may_run
from celery_mem.state.inspect import TaskRow, namespace_status
from celery_mem.state.store import Store

MEMORY = ("files", "live", "spilled", "pool", "processes")


def overview(store: Store, see: Callable[[TaskRow], None] | None = None) -> dict[str, Any]:
    """Count and measure a namespace.

    Args:
        see: is called with every task.

    Returns:
        what `celery_mem.state.inspect.namespace_status` returns, and
        - nodes, each: keys (with a copy there), memory (bytes by kind), freed (copies, by its agent),
          limit (bytes), resources (amounts by name), status (running, paused, retiring or stopping)
        - copies: number of keys of which more than one copy is wanted
        - jobs: id -> kind, done, total
        - unrunnable: constraint, tasks (number), waiting (s) and reason, for tasks that no node may run
    """
    status = namespace_status(store, see)
    infos = store.node_infos()
    for name, node in status["nodes"].items():
        node.update(_memory_of(store, name, infos.get(name, {})))
    status["copies"] = store.link.call("SCARD", store.keys.fixed("copies"))
    status["jobs"] = {
        name: {part: job.get(part) for part in ("kind", "done", "total")}
        for name, job in sorted(store.jobs().items())
    }
    status["unrunnable"] = _unrunnable(store, status, infos)
    return status


def _memory_of(store: Store, name: str, info: dict[str, Any]) -> dict[str, Any]:
    memory = info.get("memory") or {}
    return {
        "keys": store.link.call("SCARD", store.keys.of("node_keys", name)),
        "memory": {kind: int(memory[kind]) for kind in MEMORY if kind in memory},
        "freed": int(memory.get("freed", 0)),
        "limit": int(memory.get("limit") or info.get("limit") or 0) or None,
        "resources": info.get("resources") or {},
        "status": info.get("status") or "running",
    }


def _unrunnable(store: Store, status: dict[str, Any], infos: dict[str, Any]) -> list[dict[str, Any]]:
    if not status["generation"]:
        return []  # there is no namespace, and to ask would begin one
    joined = Store(store.link, store.settings, status["generation"], now_ms=store.now_ms)
    try:
        found = joined.unrunnable()
    except (
        NoPermissionError
    ):  # that script also notes since when it is so; who may only read does not learn it
        return []
    return [
        {
            "constraint": constraint,
            "tasks": count,
            "waiting": round(max(0.0, status["clock"] - since_ms / 1000), 3),
            "reason": why_nobody_may_run(constraint, infos) or "no worker is there",
        }
        for constraint, (count, since_ms) in sorted(found.items())
    ]
