"""Celery's signatures as graphs: a chain, group or chord becomes tasks that depend on each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from celery_mem.graph.app_tasks import AppTask

if TYPE_CHECKING:
    from celery_mem.client.client import Client

WITHOUT_EFFECT = frozenset(
    {
        "ignore_result",
        "serializer",
        "compression",
        "reply_to",
        "group_id",
        "root_id",
        "parent_id",
        "chord",
        "retry",
    }
)
"""Options about messages and result backends, of which there are none here."""
Made = Any
"""A future; for a group a list of what its members made."""


def is_signature(x: Any) -> bool:
    """Tell whether something is a signature of Celery."""
    return isinstance(x, dict) and hasattr(x, "subtask_type") and hasattr(x, "apply_async")


def submit_signature(client: Client, sig: Any, args: Sequence[Any], options: dict[str, Any]) -> Made:
    """Submit all tasks of a signature.

    Args:
        args: go ahead of the signature's own arguments, as with `sig.delay(*args)`.
        options: of `Client.submit`, for each task.
    Raises:
        ValueError: an option of a signature means nothing in a graph; nothing was submitted of that task.
    """
    kind = sig.subtask_type
    if kind == "chain":
        made: Made = None
        for i, part in enumerate(sig.tasks):
            made = submit_signature(client, part, args if i == 0 else (made,), options)
        return made
    if kind == "group":
        return [submit_signature(client, part, args, options) for part in _members(sig)]
    if kind == "chord":
        header = [submit_signature(client, part, args, options) for part in _members(sig)]
        return submit_signature(client, sig.body, (header,), options)
    given = () if sig.immutable else tuple(args)
    return _submit_one(client, sig, (*given, *sig.args), options)


def _members(sig: Any) -> Sequence[Any]:
    tasks = sig.tasks
    return list(tasks.tasks) if is_signature(tasks) else list(tasks)


def _submit_one(client: Client, sig: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Made:
    own: dict[str, Any] = {}
    for name, value in sig.options.items():
        if value is None or value == [] or name in WITHOUT_EFFECT:
            continue
        if name == "task_id":
            own["key"] = value
        elif name == "queue":
            own["queue"] = getattr(value, "name", value)
        elif name == "priority":
            own["priority"] = value
        elif name in ("time_limit", "soft_time_limit"):
            own["timeout"] = min(value, own.get("timeout", value))
        else:
            raise ValueError(
                f"{sig.task}: the option {name}={value!r} of its signature means nothing in a graph; take it "
                "away, or send the signature by Celery itself"
            )
    return client.submit(AppTask(sig.task), *args, **{**sig.kwargs, **options, **own})
